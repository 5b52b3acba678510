"""Nodes and a server come to the same as the simulation, to the bit, with whatever is set."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch

pytest.importorskip("flwr")

from in_process import TRAIN, MemoryGrid, Net, make_apps, make_net, parts, same, serve, simulate

from lightning_lbgm import (
    QSGD,
    CoordinateMedian,
    ErrorFeedback,
    FedAvgM,
    FedProx,
    LayerRecycling,
    LookBack,
    PowerOfChoice,
    RandK,
    SignSGD,
    TargetSavings,
    TopK,
)


class Scheduled(Net):
    """Learning rates that depend on the round, by a schedule and by Lightning's counters."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch + 0.1 * self.global_step)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def scheduled():
    torch.manual_seed(0)
    return Scheduled()


CASES = {
    "both ways": {"uplink": [TopK(0.2), LookBack(0.3)], "downlink": [TopK(0.3), QSGD(7, bucket_size=64)]},
    "batch norm": {"uplink": [], "net": lambda: make_net(norm=True), "aggregation": CoordinateMedian()},
    "own values": {"uplink": [], "net": lambda: make_net(norm=True), "buffers": "client", "personal": ["net.4.*"]},
    "random": {"uplink": [ErrorFeedback(RandK(0.2))], "objective": FedProx(mu=0.5), "weighting": "uniform"},
    "told by the server": {"uplink": [LookBack(TargetSavings(0.5))], "net": scheduled, "clients_per_round": 2},
    "layers": {"uplink": [LayerRecycling(1)], "server_optimizer": FedAvgM()},
    "sampler": {
        "uplink": [SignSGD(), LookBack(0.5)],
        "clients_per_round": 2,
        "sampler": PowerOfChoice(3),
        "client_capacity": 1,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_nodes_come_to_the_same_as_the_simulation(case, tmp_path):
    settings = {"local_steps": 2, **CASES[case]}
    expected, wanted, _ = simulate(tmp_path, rounds=3, **settings)
    grid = MemoryGrid(make_apps(**settings))
    settings.pop("objective", None)
    module, seen, strategy, result = serve(tmp_path, grid, rounds=3, **settings)
    assert same(module, expected)
    assert strategy.refusals == {}
    for one, other in zip(seen.reports, wanted.reports):
        assert [
            (c.client_id, c.num_examples, c.local_steps, c.uplink_bits, c.downlink_bits, c.outcome) for c in one.clients
        ] == [
            (c.client_id, c.num_examples, c.local_steps, c.uplink_bits, c.downlink_bits, c.outcome)
            for c in other.clients
        ]
    for one, other in zip(seen.metrics, wanted.metrics):
        assert other.keys() <= one.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    assert result.evaluate_metrics_serverapp[3]["val_acc"] == pytest.approx(wanted.metrics[-1]["val_acc"], abs=0.2)


def test_only_messages_of_the_announced_size_leave_a_node(tmp_path):
    grid = MemoryGrid(make_apps(uplink=[LookBack(1.0)]))
    _, seen, _, _ = serve(tmp_path, grid, rounds=2, uplink=[LookBack(1.0)])
    trained = [reply.content["lbgm"] for reply in grid.received if reply.metadata.message_type == "train"]
    # The first update in full, then one coefficient: 36 bytes of a header, and the ledger's.
    assert [len(one["message"]) for one in trained] == [
        36 + c.uplink_bits // 8 for r in seen.reports for c in r.clients
    ]
    assert [len(one["message"]) for one in trained[3:]] == [36 + 4] * 3
    for one in trained:
        assert not any(isinstance(value, bytes) for name, value in one.items() if name != "message")


def test_flowers_own_options_say_how_many_nodes_train(tmp_path):
    grid = MemoryGrid(make_apps(uplink=[]))
    settings = {"uplink": [], "min_train_nodes": 1, "min_available_nodes": 2, "num_clients": 5}
    _, seen, _, _ = serve(tmp_path, grid, rounds=2, fraction_train=0.4, **settings)
    assert [len(report.clients) for report in seen.reports] == [1, 1]
    assert [report.num_available for report in seen.reports] == [3, 3]
    _, seen, _, _ = serve(tmp_path, grid, rounds=1, fraction_train=0.4, **{**settings, "min_train_nodes": 2})
    assert [len(report.clients) for report in seen.reports] == [2]


def test_the_server_waits_until_enough_nodes_are_there(tmp_path, monkeypatch):
    grid = MemoryGrid(make_apps(uplink=[]))
    grid.offline = {102}
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        grid.offline = set()

    monkeypatch.setattr("lightning_lbgm.flower.reception.time.sleep", sleep)
    _, seen, _, _ = serve(tmp_path, grid, rounds=1, uplink=[])
    assert len(slept) == 1
    assert len(seen.reports[0].clients) == 3


def test_a_node_without_a_number_gets_the_next_free_one(tmp_path):
    apps = make_apps(uplink=[])
    grid = MemoryGrid(apps, configs={100: {"client-id": 2}, 101: {}, 102: {}})
    _, seen, _, _ = serve(tmp_path, grid, rounds=1, uplink=[])
    sizes = [len(part) for part in parts(TRAIN)]
    assert [client.num_examples for client in seen.reports[0].clients] == [sizes[1], sizes[2], sizes[0]]


def test_initial_arrays_and_evaluate_fn_are_flowers(tmp_path):
    from flwr.app import ArrayRecord, MetricRecord
    from in_process import SEED

    from lightning_lbgm.flower import LBGMStrategy

    module, start = make_net(), make_net()
    with torch.no_grad():
        start.net[0].weight.fill_(0.25)
    strategy = LBGMStrategy(
        module,
        uplink=[],
        seed=SEED,
        trainer={"accelerator": "cpu", "default_root_dir": tmp_path},
        min_available_nodes=3,
    )
    seen = {}

    def evaluate(server_round, arrays):
        seen[server_round] = float(arrays.to_torch_state_dict()["net.0.weight"].mean())
        return MetricRecord({"round": server_round})

    grid = MemoryGrid(make_apps(uplink=[]))
    result = strategy.start(grid, ArrayRecord(start.state_dict()), num_rounds=2, evaluate_fn=evaluate)
    assert seen[0] == pytest.approx(0.25)
    assert sorted(seen) == [0, 1, 2]
    assert not math.isclose(seen[2], 0.25)
    assert {k: dict(v) for k, v in result.evaluate_metrics_serverapp.items()} == {k: {"round": k} for k in (0, 1, 2)}
    assert torch.equal(result.arrays.to_torch_state_dict()["net.0.weight"], module.net[0].weight)


class Steps(pl.Callback):
    """Collects what a node's Trainer says at each local step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append((trainer.current_epoch, trainer.global_step, trainer.precision))


def test_a_node_trains_with_the_trainer_that_it_is_given(tmp_path):
    steps = Steps()
    trainer = {"precision": "bf16-mixed", "callbacks": [steps], "gradient_clip_val": 0.5}
    grid = MemoryGrid(make_apps(num_clients=2, uplink=[], trainer=trainer))
    _, _, strategy, _ = serve(tmp_path, grid, rounds=2, num_clients=2, uplink=[], local_steps=2)
    assert steps.seen == [(0, 0, "bf16-mixed")] * 4 + [(1, 1, "bf16-mixed")] * 4
    assert strategy.refusals == {}
