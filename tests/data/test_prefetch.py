"""Workers go on to the round to come; where it turns out to be another one, no batch is lost or mixed up."""

import multiprocessing
import os
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_lbgm.data import BatchPlan, ClientFeed, RoundLoader

PARTITIONS = [torch.arange(first, first + 4) for first in range(0, 24, 4)]  # six clients of four examples


class Noted(Dataset):
    """Each example is its index, a random number and the process that loaded it; loaded examples are counted."""

    def __init__(self):
        self.loaded = multiprocessing.Value("i", 0)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        with self.loaded.get_lock():
            self.loaded.value += 1
        return torch.tensor([float(index), float(torch.rand(())), float(os.getpid())], dtype=torch.float64)


def make_rounds(num_workers, cohort_size=6):
    """A loader of rounds whose index the test sets, and its dataset."""
    dataset, at = Noted(), [0]
    loader = DataLoader(dataset, num_workers=num_workers)
    feed = ClientFeed(loader, BatchPlan(batch_size=3, local_epochs=1, shuffle=True), PARTITIONS, seed=1)
    return RoundLoader(feed, cohort_size, 1, lambda: at[0]), at, dataset


def play(rounds, at, index, take=2, clients=None):
    """Draw ``take`` of each client's two batches in round ``index``; return them without the processes."""
    at[0] = index
    (round_,) = rounds
    drawn = []
    for number, (client_id, batches) in enumerate(round_.clients()):
        if number == clients:
            break
        drawn.append((client_id, [(b.data[:, :2].tolist(), b.size) for _, b in zip(range(take), batches)]))
    return drawn


@pytest.mark.parametrize("cohort_size", [6, 2])
def test_batches_are_those_without_workers_whatever_round_comes_next(cohort_size):
    alone, alone_at, _ = make_rounds(0, cohort_size)
    shared, shared_at, _ = make_rounds(2, cohort_size)
    # In order; once more; ahead; back, as after a resume; broken off after one client; and on from there.
    for index, take, clients in [
        (0, 2, None), (1, 2, None), (2, 1, None), (2, 2, None), (7, 2, None), (3, 2, None), (4, 2, 1), (5, 1, None),
        (6, 2, None), (6, 0, None), (7, 2, None),
    ]:  # fmt: skip
        expected = play(alone, alone_at, index, take, clients)
        assert play(shared, shared_at, index, take, clients) == expected, index


def test_a_part_of_a_cohort_is_streamed_as_in_the_whole():
    alone, alone_at, _ = make_rounds(0)
    shared, _, dataset = make_rounds(1)
    for index in range(3):
        expected = [batches for client_id, batches in play(alone, alone_at, index) if client_id in (1, 4)]
        streamed = [
            [(b.data[:, :2].tolist(), b.size) for b in batches] for _, batches in shared.feed.stream(index, (1, 4))
        ]
        assert streamed == expected, index
    # Nothing but these clients' eight examples a round, and at most the two batches ahead of the last.
    assert 24 <= dataset.loaded.value <= 24 + 2 * 3


def test_workers_load_the_next_round_before_it_starts():
    rounds, at, dataset = make_rounds(1)
    play(rounds, at, 0)
    deadline = time.monotonic() + 20
    while dataset.loaded.value < 28 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Round 0 has 24 examples in batches of 3 and 1; one worker is two batches ahead: the next round's first client.
    assert dataset.loaded.value == 28
    play(rounds, at, 1)
    time.sleep(0.05)
    assert dataset.loaded.value <= 48 + 4  # what was loaded ahead was used


def test_the_same_workers_serve_all_rounds():
    rounds, at, _ = make_rounds(2)
    processes = set()
    for index in (0, 1, 5, 2):
        at[0] = index
        (round_,) = rounds
        for _, batches in round_.clients():
            for batch in batches:
                processes |= set(batch.data[:, 2].tolist())
    assert len(processes) == 2
    assert os.getpid() not in processes
