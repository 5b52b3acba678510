"""Clients' states on disk: what is written when, and runs that equal those in memory bit for bit."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, fit_tiny
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lbgm import DIANA, ErrorFeedback, LBGMFederated, LookBack, TopK
from lightning_lbgm.simulation.client_store import ClientFiles, checkpoint_folder, prune, read_index

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path) -> ClientFiles:
    return ClientFiles(str(tmp_path / "store"), CPU)


def names(files: ClientFiles) -> set[str]:
    return {path.name for path in files.folder.iterdir()}


def test_a_state_comes_back_as_it_was(files):
    state = {
        "uplink": {"lbgs": {0: {"payloads": [{"values": torch.tensor([1.0, -0.0, 3.0])}], "gram": [[10.0]]}}},
        "half": torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int32),
        "nothing": torch.empty(0, 3),
        "rest": [None, True, "text", 0.1],
    }
    files[3] = state
    found = files[3]
    assert found["uplink"]["lbgs"][0]["gram"] == [[10.0]]
    assert found["rest"] == [None, True, "text", 0.1]
    for got, wanted in (
        (found["uplink"]["lbgs"][0]["payloads"][0]["values"], torch.tensor([1.0, -0.0, 3.0])),
        *((found[name], state[name]) for name in ("half", "scalar", "nothing")),
    ):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got, wanted)
    assert (list(files), len(files), 3 in files, files.get(4)) == ([3], 1, True, None)


def test_only_what_changed_is_written_and_what_went_is_deleted(files):
    files[0] = {"kept": torch.zeros(3), "changed": torch.zeros(3), "gone": torch.zeros(3)}
    first = names(files)
    state = files[0]
    state["changed"].add_(1)
    del state["gone"]
    state["new"] = torch.ones(2)
    files[0] = state
    second = names(files)
    assert (len(first), len(second), len(first & second)) == (3, 3, 1)
    assert {name: tensor.tolist() for name, tensor in files[0].items()} == {
        "kept": [0, 0, 0],
        "changed": [1, 1, 1],
        "new": [1, 1],
    }
    del files[0]
    assert names(files) == set()


def test_what_is_not_put_back_does_not_reach_the_file(files):
    files[0] = {"values": torch.zeros(3)}
    files[0]["values"].add_(1)
    assert files[0]["values"].tolist() == [0, 0, 0]


def test_a_state_that_another_reading_overtook_is_written_whole(files):
    files[0] = {"values": torch.zeros(3)}
    mine = files[0]
    files.get(0)
    mine["values"].add_(2)
    files[0] = mine
    assert files[0]["values"].tolist() == [2, 2, 2]


def test_two_stores_in_one_directory_do_not_meet_and_leave_nothing(tmp_path):
    one, two = ClientFiles(str(tmp_path), CPU), ClientFiles(str(tmp_path), CPU)
    one[0], two[0] = {"values": torch.ones(2)}, {"values": torch.zeros(2)}
    assert one[0]["values"].tolist() == [1, 1]
    assert len(list(tmp_path.iterdir())) == 2
    del one, two
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_not_changed_by_what_follows(files, tmp_path):
    files[0], files[1] = {"values": torch.zeros(2)}, {"values": torch.ones(2)}
    folder = tmp_path / "a.ckpt.clients"
    old = files.snapshot(folder, instead={1: None})
    state = files[0]
    state["values"].add_(5)
    files[0] = state
    assert {k: s["values"].tolist() for k, s in read_index(old).items()} == {0: [0, 0]}
    new = files.snapshot(folder)
    assert len(list(folder.iterdir())) == 3  # the old checkpoint stays whole until the new one is written
    prune({"clients": new})
    assert len(list(folder.iterdir())) == 2
    again = ClientFiles(str(tmp_path / "again"), CPU)
    again[9] = {}
    again.restore(new)
    assert {k: s["values"].tolist() for k, s in again.items()} == {0: [5, 5], 1: [1, 1]}


def test_a_file_outside_the_folder_is_refused(files, tmp_path):
    entry = {"tensor_file": "../secret", "dtype": "float32", "shape": [1]}
    with pytest.raises(ValueError, match="outside its folder"):
        files.restore({"folder": str(tmp_path), "skeletons": {0: {"values": entry}}})


def test_a_remote_checkpoint_has_no_folder():
    assert checkpoint_folder("s3://bucket/a.ckpt") is None
    assert checkpoint_folder("dir/a.ckpt") == Path("dir/a.ckpt.clients")


# Whole runs

UPLINKS = {
    "look-back": ([LookBack(0.3)], {}),
    "layers, bfloat16, capacity": ([LookBack(0.4, "layer", 2, dtype="bfloat16")], {"client_capacity": 3}),
    "error feedback around a chain": ([ErrorFeedback([TopK(0.5), LookBack(0.6, rank=2)])], {}),
    "rows in error feedback": ([ErrorFeedback(LookBack(0.6, rank=2, rowwise=True))], {}),
    "inside DIANA": ([DIANA(LookBack(0.5), rate=0.5)], {}),
}


def run(root, uplink, buffers="average", store="memory", capacity=None, **kwargs):
    recorder = Recorder()
    strategy = LBGMFederated(
        6,
        uplink=uplink,
        clients_per_round=4,
        local_steps=2,
        buffers=buffers,
        seed=3,
        client_store=store,
        client_capacity=capacity,
    )
    callbacks = [recorder, *kwargs.pop("callbacks", [])]
    trainer, _ = fit_tiny(root, strategy, batch_size=5, shuffle=True, max_epochs=6, callbacks=callbacks, **kwargs)
    return trainer, recorder


def assert_same(one: Recorder, two: Recorder) -> None:
    assert len(one.params) == len(two.params) > 0
    assert all(torch.equal(a, b) for a, b in zip(one.params, two.params))
    for a, b in zip(one.reports, two.reports):
        assert [(c.client_id, c.outcome, c.uplink_bits) for c in a.clients] == [
            (c.client_id, c.outcome, c.uplink_bits) for c in b.clients
        ]


@pytest.mark.parametrize(("uplink", "settings"), UPLINKS.values(), ids=UPLINKS)
def test_on_disk_equals_in_memory_and_resumes_bitwise(tmp_path, uplink, settings):
    capacity = settings.get("client_capacity")
    _, in_memory = run(tmp_path, uplink, capacity=capacity)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer, on_disk = run(
        tmp_path,
        uplink,
        store=str(tmp_path / "store"),
        capacity=capacity,
        callbacks=[saving],
        enable_checkpointing=True,
    )
    assert_same(in_memory, on_disk)
    assert any(c.outcome == "recycled" for report in on_disk.reports for c in report.clients)
    assert isinstance(trainer.strategy._federation.clients, ClientFiles)
    # The checkpoint stands for itself, also elsewhere.
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "saved", moved)
    _, resumed = run(
        tmp_path, uplink, store=str(tmp_path / "other"), capacity=capacity, ckpt_path=moved / "step=3.ckpt"
    )
    on_disk.params, on_disk.reports = on_disk.params[3:], on_disk.reports[3:]
    assert_same(on_disk, resumed)


@pytest.mark.filterwarnings("ignore:.*buffers='client'")
def test_a_memory_checkpoint_goes_on_on_disk(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    _, unbroken = run(tmp_path, [LookBack(0.3)], "client", callbacks=[saving], enable_checkpointing=True)
    assert not (tmp_path / "step=3.ckpt.clients").exists()
    store = str(tmp_path / "store")
    _, resumed = run(tmp_path, [LookBack(0.3)], "client", store, ckpt_path=tmp_path / "step=3.ckpt")
    unbroken.params, unbroken.reports = unbroken.params[3:], unbroken.reports[3:]
    assert_same(unbroken, resumed)


def test_a_disk_checkpoint_goes_on_in_memory(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    store = str(tmp_path / "store")
    _, unbroken = run(tmp_path, [LookBack(0.3)], store=store, callbacks=[saving], enable_checkpointing=True)
    _, resumed = run(tmp_path, [LookBack(0.3)], ckpt_path=tmp_path / "step=3.ckpt")
    unbroken.params, unbroken.reports = unbroken.params[3:], unbroken.reports[3:]
    assert_same(unbroken, resumed)


def test_the_folder_goes_with_its_checkpoint_and_is_missed(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=1, monitor=None, filename="{step}")
    uplink, store = [LookBack(0.3)], str(tmp_path / "store")
    run(tmp_path, uplink, store=store, callbacks=[saving], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step=6.ckpt", "step=6.ckpt.clients"]
    shutil.rmtree(tmp_path / "step=6.ckpt.clients")
    with pytest.raises(FileNotFoundError, match=r"step=6\.ckpt\.clients.*move that folder"):
        run(tmp_path, uplink, store=store, ckpt_path=tmp_path / "step=6.ckpt")


def test_a_weights_only_checkpoint_has_no_folder(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")
    run(tmp_path, [LookBack(0.3)], store=str(tmp_path / "s"), callbacks=[saving], enable_checkpointing=True)
    assert (tmp_path / "weights.ckpt").exists()
    assert not (tmp_path / "weights.ckpt.clients").exists()


@pytest.mark.parametrize("num_rounds", [0, 2])
def test_a_round_that_breaks_off_leaves_the_files_of_the_round_before(tmp_path, num_rounds):
    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.strategy.last_report.round_index == num_rounds:
                raise RuntimeError("boom")

    def clients(strategy):
        return {k: repr(state) for k, state in sorted(strategy._federation.clients.items())}

    def make(name):
        uplink = [ErrorFeedback(LookBack(0.3, rank=2))]
        return LBGMFederated(num_clients=3, uplink=uplink, seed=0, client_store=str(tmp_path / name))

    broken, expected = make("a"), make("b")
    with pytest.raises(RuntimeError, match="boom"):
        fit_tiny(tmp_path, broken, callbacks=[Failing()], max_epochs=4)
    if num_rounds:
        fit_tiny(tmp_path, expected, max_epochs=num_rounds)
        assert clients(broken) == clients(expected)
        assert len(names(broken._federation.clients)) == len(names(expected._federation.clients))
    else:
        assert clients(broken) == {}
        assert names(broken._federation.clients) == set()
