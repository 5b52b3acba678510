"""The thread that sends: in order, in few batches, and nothing is lost."""

from __future__ import annotations

import threading

import pytest

from lightning_lbgm.callbacks import sender as _sender
from lightning_lbgm.callbacks.sender import Entry, Sender


class Store:
    """Takes batches, and waits or fails where it is told to."""

    def __init__(self):
        self.batches, self.kept, self.errors = [], [], []
        self.open = threading.Event()
        self.open.set()
        self.fails = lambda batch: False
        self.sender = Sender(self.send, self.keep)

    def send(self, batch):
        self.open.wait(20)
        if self.fails(batch):
            raise OSError("down")
        self.batches.append([entry.step for entry in batch])

    def keep(self, batch, error):
        self.kept += [entry.step for entry in batch]
        self.errors.append(error)

    @property
    def taken(self):
        return [step for batch in self.batches for step in batch]


@pytest.fixture
def store():
    return Store()


def test_entries_arrive_in_order_and_together(store):
    for step in range(300):
        store.sender.put(Entry(step, {"a": 1.0, "b": 2.0}))
    store.sender.close()
    assert store.taken == list(range(300))
    assert len(store.batches) < 30
    assert store.kept == []


def test_a_batch_has_no_more_values_than_mlflow_takes(store):
    store.open.clear()
    for step in range(400):
        store.sender.put(Entry(step, dict.fromkeys("abcdefg", 1.0)))
    store.open.set()
    store.sender.close()
    assert store.taken == list(range(400))
    assert max(7 * len(batch) for batch in store.batches) in range(900, 1001)


def test_an_entry_does_not_wait_for_the_end(store):
    arrived = threading.Event()
    store.fails = lambda batch: arrived.set()
    store.sender.put(Entry(0, {"a": 1.0}))
    assert arrived.wait(20)
    store.sender.close()


def test_it_can_go_on_after_its_end(store):
    for step in range(3):
        store.sender.put(Entry(step, {"a": 1.0}))
        thread = store.sender._thread
        store.sender.close()
        thread.join(20)
        assert not thread.is_alive()
    store.sender.close()
    assert store.batches == [[0], [1], [2]]


def test_what_fails_is_handed_back_and_the_next_is_tried(store):
    store.fails = lambda batch: batch[0].step == 1
    for step in range(3):
        store.sender.put(Entry(step, {"a": 1.0}))
        store.sender.close()
    assert (store.taken, store.kept) == ([0, 2], [1])


def test_after_three_failures_nothing_more_is_tried(store):
    tried = []
    store.fails = lambda batch: tried.append(batch[0].step) or True
    for step in range(5):
        store.sender.put(Entry(step, {"a": 1.0}))
        store.sender.close()
    assert tried == [0, 1, 2]
    assert store.kept == [0, 1, 2, 3, 4]


def test_an_end_without_an_answer_hands_back_all(store, monkeypatch):
    monkeypatch.setattr(_sender, "_PATIENCE", 0.2)
    store.open.clear()
    for step in range(3):
        store.sender.put(Entry(step, {"a": 1.0}))
    store.sender.close()
    assert sorted(store.kept) == [0, 1, 2]
    assert isinstance(store.errors[0], TimeoutError)
    store.sender.put(Entry(3, {"a": 1.0}))  # is not waited for again
    assert sorted(store.kept) == [0, 1, 2, 3]
    store.open.set()


def test_a_round_waits_where_very_many_are_waiting(store, monkeypatch):
    monkeypatch.setattr(_sender, "_CAPACITY", 10)
    store.open.clear()
    for step in range(10):
        store.sender.put(Entry(step, {"a": 1.0}))
    opener = threading.Timer(0.5, store.open.set)
    opener.start()
    for step in range(10, 40):
        store.sender.put(Entry(step, {"a": 1.0}))
        assert len(store.sender._entries) <= 10
    store.sender.close()
    assert store.taken == list(range(40))
