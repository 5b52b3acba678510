"""Several processes: the same federation as in one, and an end for all where one ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import objective_script
import personal_script
import processes_death
import processes_script
import pytest
import torch
import two_devices_script
from hypothesis import given
from hypothesis import strategies as st
from lightning import pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only

from lightning_lbgm import LBGMFederated
from lightning_lbgm.simulation.placement import deal
from lightning_lbgm.simulation.world import World

HERE = Path(__file__).parents[1]
FITS = ("noisy", "resumed", "alone", "diana", "rare", "downlink", "turnout", "network", "evaluated", "loaders")

# The deal

ROUNDS = st.integers(1, 4).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(st.tuples(st.integers(1, 50), st.none() | st.integers(0, size - 1)), min_size=1, max_size=12),
    )
)


def loads_of(ranks, work, size):
    return [sum(w for w, rank in zip(work, ranks) if rank == r) for r in range(size)]


@given(ROUNDS)
def test_a_deal_leaves_no_move_that_makes_the_round_a_twentieth_shorter(drawn):
    size, clients = drawn
    work = [w for w, _ in clients]
    placement = {k: home for k, (_, home) in enumerate(clients) if home is not None}
    ranks = deal(range(len(work)), work, placement, size)
    assert ranks == deal(range(len(work)), work, dict(reversed(placement.items())), size)
    loads = loads_of(ranks, work, size)
    most, least = max(loads), min(loads)
    for w in (w for w, rank in zip(work, ranks) if loads[rank] == most and rank == loads.index(most)):
        assert max(most - w, least + w) > 0.95 * most - 1e-9


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 3))
def test_a_deal_of_new_clients_is_within_a_third_of_the_best(work, size):
    """Largest first to the least loaded is at most 4/3 of the optimum (Graham 1969); moves only shorten it."""
    best = (
        min(max(loads_of(ranks, work, size)) for ranks in itertools.product(range(size), repeat=len(work)))
        if len(work) <= 6
        else max(max(work), sum(work) / size)
    )
    got = max(loads_of(deal(range(len(work)), work, {}, size), work, size))
    assert got <= (4 / 3 * best if len(work) <= 6 else best + max(work)) + 1e-9


def test_clients_stay_at_home_unless_a_move_makes_the_round_shorter():
    # 60 against 40 and all equal: one move makes it 50 against 50, the first of the longer side.
    placement = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    assert deal([1, 2, 3, 4, 5], [20] * 5, placement, 2) == (0, 0, 0, 1, 1)
    assert deal([1, 2, 3, 4], [20, 20, 20, 20], {1: 0, 2: 0, 3: 0, 4: 1}, 2) == (1, 0, 0, 1)
    # New clients fill the gap, so that nobody moves.
    assert deal([1, 2, 3, 9], [20, 20, 20, 60], {1: 0, 2: 0, 3: 0}, 2) == (0, 0, 0, 1)
    # 51 against 49: a move would gain a fiftieth, for which no state is sent.
    work, placement = [1] * 100, {k: int(k >= 51) for k in range(100)}
    assert deal(range(100), work, placement, 2) == tuple(placement.values())


def test_the_deal_of_one_rank_is_trivial():
    assert deal([4, 7], [1, 2], {4: 0}, 1) == (0, 0)


# One process


def test_one_device_has_neither_launcher_nor_process_group(fit):
    trainer, _ = fit(LBGMFederated(num_clients=4), devices=1)
    assert trainer.strategy.launcher is None
    assert not torch.distributed.is_initialized()
    assert type(trainer.strategy.world) is World
    assert (trainer.world_size, trainer.global_rank, trainer.strategy.is_distributed) == (1, 0, False)


def test_devices_and_nodes_make_ranks(make_trainer):
    class Second(LightningEnvironment):
        """The first of three processes on the second of two nodes."""

        creates_processes_externally = True

        def node_rank(self):
            return 1

    trainer = make_trainer(LBGMFederated(num_clients=4), devices=3, num_nodes=2, plugins=[Second()])
    try:
        assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (6, 3, 0, 1)
        assert not trainer.is_global_zero
        assert trainer.strategy.launcher is not None
    finally:
        rank_zero_only.rank = utilities_rank_zero_only.rank = 0


# Two processes


def launch(*command):
    """Run Python; how long it takes is not tested. Processes that wait for each other do so for half an hour."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PL_GLOBAL_SEED", "MASTER_PORT")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=900)  # until all processes have ended, which write to it
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the results of one process, and those of each of two processes."""
    root = tmp_path_factory.mktemp("processes")
    one, again, two = root / "one", root / "again", root / "two"
    for folder in (one, again, two):
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "5")
        patch.setenv("PL_SEED_WORKERS", "0")
        processes_script.main(1, one)
        done = launch(HERE / "processes_script.py", 2, two, one / "step=4.ckpt")
        assert done.returncode == 0, done.stderr[-3000:]
        pl.seed_everything(5)
        resumed = processes_script.resume(1, again, two / "step=4.ckpt")
    load = lambda path: torch.load(path, weights_only=False)  # noqa: E731
    single = load(one / "rank0.pt")
    single["resumed"] = resumed
    return single, [load(two / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", FITS)
def test_two_processes_equal_one(runs, name, rank):
    one, two = runs[0][name], runs[1][rank][name]
    for what in ("cohorts", "dropped", "outcomes", "ledger", "rounds"):
        assert two[what] == one[what], what
    torch.testing.assert_close(two["params"], one["params"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["errors"], one["errors"], rtol=0, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(two["buffers"], one["buffers"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["frozen"], one["frozen"], rtol=0, atol=1e-5)
    for round_two, round_one in zip(two["round_metrics"], one["round_metrics"]):
        assert round_two.keys() == round_one.keys()
        shared = [k for k in round_one if not k.startswith("val/") or name == "noisy"]
        assert [round_two[k] for k in shared] == pytest.approx([round_one[k] for k in shared], abs=1e-4, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_both_ranks_measure_the_whole_rounds_errors(runs, name):
    """``test_two_processes_equal_one`` compares them with one process's; here, that there is something to compare."""
    _, (first, second) = runs
    names = [k for k in first[name]["round_metrics"][-1] if k.startswith("convergence/")]
    assert len(names) == 9
    for one, two in zip(first[name]["round_metrics"], second[name]["round_metrics"]):
        assert [one[k] for k in names] == pytest.approx([two[k] for k in names], rel=0, abs=0, nan_ok=True)
    lossy = name not in ("alone", "rare")  # these may send everything in full
    assert not lossy or max(metrics["convergence/gap_relative"] for metrics in first[name]["round_metrics"]) > 0.01


@pytest.mark.slow
def test_the_parameters_are_the_same_to_the_bit_on_both_ranks(runs):
    _, (first, second) = runs
    for name in FITS:
        assert torch.equal(first[name]["params"], second[name]["params"])
        for kind in ("buffers", "frozen"):
            assert first[name][kind].keys() == second[name][kind].keys()
            assert all(torch.equal(tensor, second[name][kind][key]) for key, tensor in first[name][kind].items())
    assert {"lowest", "hidden", "made"} <= first["noisy"]["buffers"].keys()
    assert first["noisy"]["buffers"]["steps"] == 0  # no average of integers


@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_in_two_and_the_other_way_round(runs):
    single, pair = runs
    for results in (single, *pair):
        assert len(results["resumed"]["cohorts"]) == 4
        assert results["resumed"]["cohorts"] == results["noisy"]["cohorts"][4:]
        for kind in ("params", "buffers", "frozen"):
            torch.testing.assert_close(results["resumed"][kind], single["noisy"][kind], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_client_has_its_state_on_one_rank(runs):
    single, (first, second) = runs
    for name in FITS:
        assert sorted(first[name]["own_clients"] + second[name]["own_clients"]) == single[name]["own_clients"]
        assert name == "alone" or (first[name]["own_clients"] and second[name]["own_clients"])


@pytest.mark.slow
def test_processes_agree_on_the_time_of_rounds(runs):
    single, (first, second) = runs
    assert any(single["network"]["dropped"])
    seconds = [result["network"]["ledger"]["seconds"] for result in (single, first, second)]
    assert seconds[0] == seconds[1] == seconds[2] > 0


@pytest.mark.slow
def test_processes_agree_on_who_takes_part_and_on_what_the_sampler_learned(runs):
    single, (first, second) = runs
    turnout = single["turnout"]
    assert min(map(len, turnout["cohorts"])) == 0 < max(map(len, turnout["cohorts"]))
    assert any(turnout["dropped"])
    assert first["sampling"] == second["sampling"]
    assert first["sampling"]["losses"].keys() == single["sampling"]["losses"].keys()


def test_all_ranks_keep_the_same_of_each_clients_evaluation(runs):
    single, (first, second) = runs
    assert first["evaluation"] == second["evaluation"]
    one, two = single["evaluation"], first["evaluation"]
    assert one["history"]["uplink_bytes"] == two["history"]["uplink_bytes"]
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert {"clients/val/metric_worst", "clients/tuned/val/loss_p10"} <= two["metrics"].keys()
    assert {k: pytest.approx(own, abs=1e-4) for k, own in one["history"]["own"].items()} == two["history"]["own"]


@pytest.mark.slow
def test_a_clients_loader_is_iterated_by_the_process_that_trains_it(runs):
    single, (first, second) = runs
    assert [one + two for one, two in zip(first["passes"], second["passes"])] == single["passes"]
    assert min(sum(first["passes"]), sum(second["passes"])) > 0


@pytest.mark.slow
def test_evaluation_is_shared_and_predictions_are_not_repeated(runs):
    single, (first, second) = runs
    assert (single["predicted"], first["predicted"], second["predicted"]) == (41, 21, 20)
    assert first["tested"] == second["tested"] == pytest.approx(single["tested"], abs=1e-5)


@pytest.mark.slow
def test_a_rank_knows_its_place_and_takes_one_thread(runs):
    single, (first, second) = runs
    assert (single["rank"], first["rank"], second["rank"]) == ((0, 1, True), (0, 2, True), (1, 2, False))
    assert first["threads"] == second["threads"] == 1
    assert first["logged"] == second["logged"] == single["logged"]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Return the folder with what scripts have saved in two processes that torchrun has started."""
    folder = tmp_path_factory.mktemp("torchrun")
    for script in (objective_script, personal_script, two_devices_script):
        (folder / script.__name__).mkdir()
    script = HERE / "torchrun_script.py"
    done = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def in_one_and_two(script, torchrun, one):
    """Run a script in one process; return what it and each rank of two saved, and the states of both ranks together."""
    script.main(1, one)
    two = torchrun / script.__name__
    single, first, second = (torch.load(p, weights_only=True) for p in (one / "rank0.pt", *sorted(two.glob("*.pt"))))
    homes = [{seen.get(client) for seen in first["homes"]} - {None} for client in range(5)]
    assert {0, 1} in homes  # one had its turns on both ranks
    assert not first["states"].keys() & second["states"].keys()
    together = {**first["states"], **second["states"]}
    assert together.keys() == single["states"].keys()
    return single, first, second, together


@pytest.mark.slow
def test_a_local_objectives_state_moves_with_its_client(torchrun, tmp_path):
    single, first, second, together = in_one_and_two(objective_script, torchrun, tmp_path)
    for client, state in single["states"].items():
        assert together[client]["rounds"] == state["rounds"]
        torch.testing.assert_close(together[client]["control"], state["control"], rtol=0, atol=1e-5)
    for rank in (first, second):
        torch.testing.assert_close(rank["params"], single["params"], rtol=0, atol=1e-5)
    # Objectives that the server has a part in: it is the same on every rank, to the bit.
    for name, alone in single["shared"].items():
        one, two = first["shared"][name], second["shared"][name]
        for key, vector in alone["server"].items():
            assert torch.equal(one["server"][key], two["server"][key])
            torch.testing.assert_close(one["server"][key], vector, rtol=0, atol=1e-5)
        assert torch.equal(one["params"], two["params"])
        torch.testing.assert_close(one["params"], alone["params"], rtol=0, atol=1e-5)
        assert one["ledger"] == two["ledger"] == alone["ledger"]
        assert not one["clients"].keys() & two["clients"].keys()
        torch.testing.assert_close({**one["clients"], **two["clients"]}, alone["clients"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The trainable parameters changed")
def test_personal_parameters_move_with_their_client(torchrun, tmp_path):
    single, first, second, together = in_one_and_two(personal_script, torchrun, tmp_path)
    for client, values in single["states"].items():
        assert together[client].keys() == values.keys()
        assert len(values) == 7
        torch.testing.assert_close(together[client], values, rtol=0, atol=1e-5)
    for rank in (first, second):
        torch.testing.assert_close(rank["params"], single["params"], rtol=0, atol=1e-5)
    assert torch.equal(first["params"], second["params"])
    # The checkpoint holds all clients' values, wherever they were trained.
    saved = torch.load(torchrun / "personal_script" / "last.ckpt", weights_only=True)["lightning_lbgm"]["clients"]
    assert sorted(saved["skeletons"]) == sorted(together)


@pytest.mark.slow
def test_two_devices_train_what_one_does(torchrun, tmp_path):
    two_devices_script.main("cpu", 1, tmp_path)
    paths = (tmp_path / "results1.pt", torchrun / "two_devices_script" / "results2.pt")
    two_devices_script.assert_as_one(*(torch.load(path, weights_only=True) for path in paths), "gloo")


@pytest.mark.slow
def test_torchrun_starts_the_processes_too(torchrun):
    folder = torchrun / "objective_script"
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["params"], second["params"])
    assert (first["rank"], second["rank"]) == ((0, 2, True), (1, 2, False))


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """Return the folder with what processes have left, and their exit codes."""
    folder = tmp_path_factory.mktemp("deaths")
    done = launch(HERE / "processes_death.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, dict(zip(processes_death.CASES, json.loads((folder / "codes.json").read_text())))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lives0", "lives1", "killed0", "killed1"])
def test_where_one_rank_ends_the_other_ends_with_an_error(deaths, how):
    folder, codes = deaths[0] / how, deaths[1]
    dead, left = int(how[-1]), 1 - int(how[-1])
    assert codes[how, left] == 1
    assert "connection to another process of the federation broke" in (folder / f"rank{left}.txt").read_text()
    if how.startswith("lives"):
        assert codes[how, dead] == 1
        assert "a mistake in training_step" in (folder / f"rank{dead}.txt").read_text()
    # What is left is saved, without waiting for who is dead.
    if how != "killed0":
        checkpoint = torch.load(folder / "on_exception.ckpt", weights_only=True)
        assert checkpoint["lightning_lbgm"]["round_index"] == 2
