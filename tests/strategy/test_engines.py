"""Processes that another engine has made: its world is the federation's, and never two federations side by side."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.environments import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only

from lightning_lbgm import LBGMFederated

HERE = Path(__file__).parents[1]
CASES = ("devices", "engine", "engine+group+twin", "engine+group+raises")
VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

UNSET = (*VARIABLES, "OMP_NUM_THREADS", "PL_GLOBAL_SEED")


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    for name in (*VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    yield
    rank_zero_only.rank = utilities_rank_zero_only.rank = 0


# What environments say


class Engine(LightningEnvironment):
    """An engine's environment, which knows its processes and is not told them."""

    creates_processes_externally = True

    def __init__(self, rank=0, size=2, local_rank=0, node_rank=0) -> None:
        super().__init__()
        self.rank, self.size, self.places = rank, size, (local_rank, node_rank)

    def world_size(self):
        return self.size

    def global_rank(self):
        return self.rank

    def local_rank(self):
        return self.places[0]

    def node_rank(self):
        return self.places[1]

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass


def world_of(trainer):
    return trainer.world_size, trainer.global_rank, trainer.is_global_zero


@pytest.mark.parametrize(
    ("engine", "devices", "world"),
    [
        (Engine(rank=0, size=2), 1, (2, 0, True)),
        (Engine(rank=1, size=2, local_rank=1), 1, (2, 1, False)),
        (Engine(rank=3, size=4, local_rank=1, node_rank=1), 2, (4, 3, False)),  # nobody has set `num_nodes=2`
        (Engine(rank=0, size=1), 1, (1, 0, True)),
    ],
)
def test_the_world_is_the_engines(make_trainer, engine, devices, world):
    trainer = make_trainer(LBGMFederated(num_clients=4), devices=devices, plugins=[engine])
    assert world_of(trainer) == world
    assert trainer.strategy.is_distributed == (world[0] > 1)
    assert (trainer.strategy.launcher is None) == (world[0] == 1)
    assert trainer.strategy.root_device == torch.device("cpu")
    assert rank_zero_only.rank == utilities_rank_zero_only.rank == world[1]


@pytest.mark.parametrize(
    ("environment", "variables", "world"),
    [
        (TorchElasticEnvironment, {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}, (1, 0, True)),
        (KubeflowEnvironment, {"WORLD_SIZE": 3, "RANK": 2}, (3, 2, False)),
        (KubeflowEnvironment, {}, (1, 0, True)),
        (LightningEnvironment, {"LOCAL_RANK": 0, "WORLD_SIZE": 5}, (1, 0, True)),  # what a finished fit leaves behind
        (SLURMEnvironment, {}, (1, 0, True)),  # on a laptop
        # In an interactive job the script is started once, by hand.
        (SLURMEnvironment, {"NTASKS": 2, "NTASKS_PER_NODE": 2, "JOB_NAME": "bash", "PROCID": 0}, (1, 0, True)),
        (SLURMEnvironment, {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}, (1, 0, True)),
    ],
)
def test_environments_of_one_device_a_process(make_trainer, monkeypatch, environment, variables, world):
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}" if environment is SLURMEnvironment else name, str(value))
    trainer = make_trainer(LBGMFederated(num_clients=4), devices=1, plugins=[environment()])
    assert world_of(trainer) == world


def test_lsf_says_its_world(make_trainer, monkeypatch, tmp_path):
    import socket

    (tmp_path / "ranks").write_text("\n".join(["launch", socket.gethostname(), socket.gethostname()]))
    variables = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": str(tmp_path / "ranks")}
    for name, value in {**variables, "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JSM_NAMESPACE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "")  # set by the environment, and so put back
    assert LSFEnvironment.detect()
    trainer = make_trainer(LBGMFederated(num_clients=4), devices=1)
    assert isinstance(trainer.strategy.cluster_environment, LSFEnvironment)
    assert world_of(trainer) == (2, 1, False)


def test_slurm_and_torchrun_refuse_another_number_of_devices(make_trainer, monkeypatch):
    for name, value in {"NTASKS": 4, "NTASKS_PER_NODE": 4, "PROCID": 1, "LOCALID": 1, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(ValueError, match=r"`devices=1` in Lightning, but .* HINT: Set `devices=4`"):
        make_trainer(LBGMFederated(num_clients=4), devices=1)
    assert world_of(make_trainer(LBGMFederated(num_clients=4), devices=4)) == (4, 1, False)
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"does not match the world size \(2\)"):
        make_trainer(LBGMFederated(num_clients=4), devices=1, plugins=[TorchElasticEnvironment()])


# What does not fit


def test_a_rank_outside_the_world_is_refused(make_trainer, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")  # and nobody has set `num_nodes=2`
    with pytest.raises(MisconfigurationException, match=r"the rank 2 in a world of 2\. Set `Trainer\(devices="):
        make_trainer(LBGMFederated(num_clients=4), devices=2)


def test_a_process_without_a_device_is_refused(make_trainer):
    engine = Engine(rank=2, size=3, local_rank=2)
    trainer = make_trainer(LBGMFederated(num_clients=4), devices=2, plugins=[engine])
    with pytest.raises(MisconfigurationException, match=r"local rank 2 has no device: .* gives its node 2"):
        trainer.strategy.root_device  # noqa: B018


def test_one_of_several_processes_does_not_fit_a_federation_of_its_own(fit, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(MisconfigurationException, match=r"LightningEnvironment says that it is number 1 of several"):
        fit(LBGMFederated(num_clients=4), devices=1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    trainer, _ = fit(LBGMFederated(num_clients=4), devices=1)
    assert trainer.global_step == 3


# Two workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Return the folder with what each case's workers have saved, of all cases at once."""
    folder = tmp_path_factory.mktemp("workers")
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    cases = [how for how in CASES if "twin" not in how or importlib.util.find_spec("pytorch_lightning")]
    command = [sys.executable, HERE / "engine_script.py", folder, *cases]
    process = subprocess.Popen(
        list(map(str, command)), env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=900)  # until all workers have ended, which write to it
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]
    assert set(json.loads((folder / "codes.json").read_text())) == {0}, errors[-3000:]
    return folder


def load(folder):
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["engine", "engine+group+twin"])
def test_an_engines_two_workers_are_two_devices(workers, how):
    if "twin" in how:
        pytest.importorskip("pytorch_lightning")
    expected, got = load(workers / "devices"), load(workers / how)
    assert [result["error"] for result in got] == [None, None]
    assert [result["place"] for result in got] == [(0, 2, True), (1, 2, False)]
    for one, two in zip(got, expected):
        assert torch.equal(one["params"], two["params"])
        for what in ("place", "rounds", "clients", "metrics", "seen"):
            assert one[what] == two[what], what
    assert torch.equal(got[0]["params"], got[1]["params"])
    assert sorted(got[0]["clients"] + got[1]["clients"]) == [0, 1, 2, 3, 4]
    assert [result["seen"] for result in got] == [4 * 21, 4 * 21]  # of 41 examples, in each of four rounds
    assert files(workers / how) == files(workers / "devices")  # written once
    if "group" in how:
        assert [result["group_sum"] for result in got] == [2.0, 2.0]  # it still works
        for result in got:
            assert "torch's process group has 2. Each of the processes would train the whole" in result["refused"]


@pytest.mark.slow
def test_an_error_leaves_the_engines_group_alone_and_ends_both_workers(workers):
    first, second = load(workers / "engine+group+raises")
    assert "connection to another process of the federation broke" in first["error"]
    assert "a mistake in training_step" in second["error"]
    assert first["has_group"]
    assert second["has_group"]
