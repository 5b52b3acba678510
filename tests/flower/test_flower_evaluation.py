"""Nodes evaluate the global model on their own validation data, and training is as without it."""

from __future__ import annotations

import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from in_process import (
    SEED,
    TRAIN,
    Data,
    MemoryGrid,
    Net,
    dataset,
    make_apps,
    make_net,
    parts,
    same,
    serve,
    simulate,
    subset,
)
from torch.utils.data import DataLoader

from lightning_lbgm import ClientEvaluation, LookBack, TopK
from lightning_lbgm.flower import LBGMStrategy, federated_client_app
from lightning_lbgm.flower.evaluation import choose
from lightning_lbgm.flower.records import RecordError, Refusal, Score, Task, Trial, read, write
from lightning_lbgm.protocol import HEADER_BYTES

SIZES = (30, 60, 130)  # the last in two batches
VALS = [dataset(size, seed=20 + k) for k, size in enumerate(SIZES)]
SETTINGS = {"uplink": [LookBack(0.9)], "downlink": [TopK(0.2)], "local_steps": 1}
ALL = {"fraction_evaluate": 1.0}


def norm_net():
    return make_net(norm=True)


class Counting(Net):
    """Logs what a simulation's evaluation would have too."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log_dict({"epoch": float(self.current_epoch), "round": float(self.global_step), "random": torch.rand(1)})


def counting():
    torch.manual_seed(0)
    return Counting(norm=True)


def accuracy(module, data):
    x, y = data.tensors
    with torch.no_grad():
        return (module.eval().net(x).argmax(1) == y).double().mean().item()


def asked(grid, kind="evaluate"):
    """Clients that were asked in each round."""
    rounds = {}
    for message in grid.sent:
        if message.metadata.message_type == kind:
            rounds.setdefault(int(message.metadata.group_id), []).append(message.metadata.dst_node_id - 100)
    return rounds


def test_scores_are_those_of_the_rounds_result_on_each_nodes_data(tmp_path):
    seen = result = None
    for rounds in (1, 2):
        grid = MemoryGrid(make_apps(net=norm_net, val=VALS, **SETTINGS))
        module, seen, strategy, result = serve(tmp_path, grid, rounds=rounds, net=norm_net, **SETTINGS, **ALL)
        scores = [accuracy(module, data) for data in VALS]
        assert len(set(scores)) == 3
        mean = sum(score * size for score, size in zip(scores, SIZES)) / sum(SIZES)
        for found in (seen.metrics[-1], result.evaluate_metrics_clientapp[rounds]):
            assert found["clients/val_acc_mean"] == pytest.approx(mean, rel=1e-6)
            assert found["clients/val_acc_worst"] == pytest.approx(min(scores), rel=1e-6)
            assert found["clients/val_acc_std"] == pytest.approx(
                torch.tensor(scores).std(correction=0).item(), rel=1e-4
            )
            assert found["fl/evaluated_clients"] == 3
        assert strategy.refusals == {}
    # The whole model is counted, and no other message's size depends on it.
    trials = [m.content["lbgm"]["model"] for m in grid.sent if m.metadata.message_type == "evaluate"]
    assert seen.metrics[-1]["comm/evaluation_bytes"] == sum(len(model) - HEADER_BYTES for model in trials[3:])
    assert len(trials[0]) > 4 * sum(p.numel() for p in module.parameters())
    # Flower's result has each number in its place.
    assert not any(name.startswith("clients/") for name in result.train_metrics_clientapp[2])
    assert set(result.evaluate_metrics_serverapp[2]) == {"val_acc"}


def test_a_node_evaluates_with_what_is_its_own_and_trains_as_without(tmp_path):
    settings = {"uplink": [], "net": counting, "buffers": "client", "personal": ["net.4.*"], "local_steps": 1}
    evaluation = ClientEvaluation(data=VALS, every_n_rounds=1, own_models=False, table=False)
    expected, wanted, _ = simulate(tmp_path, rounds=2, callbacks=[evaluation], **settings)
    grids = [MemoryGrid(make_apps(val=VALS, **settings)) for _ in range(2)]
    module, seen, _, _ = serve(tmp_path, grids[0], rounds=2, **settings, **ALL)
    plain, unseen, _, result = serve(tmp_path, grids[1], rounds=2, **settings)
    assert same(module, expected)
    assert same(module, plain)
    for one, other in zip(seen.metrics, wanted.metrics):
        for metric in ("val_acc", "epoch", "round"):
            for part in ("mean", "worst", "p10", "std"):
                name = f"clients/{metric}_{part}"
                assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    messages = [[r.content["lbgm"]["message"] for r in g.received if r.metadata.message_type == "train"] for g in grids]
    assert messages[0] == messages[1]
    # Without the option nothing is asked, and nothing logged.
    assert asked(grids[1]) == {}
    assert result.evaluate_metrics_clientapp == {}
    assert not any(n.startswith("clients/") or "evaluat" in n for n in unseen.metrics[-1])


def test_flowers_options_say_how_many_nodes_evaluate(tmp_path):
    for least, number, rounds in ((1, 1, 2), (9, 3, 1)):
        grid = MemoryGrid(make_apps(val=VALS, uplink=[], local_steps=1))
        options = {"fraction_evaluate": 0.4, "min_evaluate_nodes": least}
        serve(tmp_path, grid, rounds=rounds, uplink=[], local_steps=1, **options)
        expected = {index + 1: list(choose([0, 1, 2], number, SEED, index)) for index in range(rounds)}
        assert asked(grid) == expected
        assert [len(clients) for clients in expected.values()] == [number] * rounds
        assert asked(grid, "train") == {index + 1: [0, 1, 2] for index in range(rounds)}


@given(st.sets(st.integers(0, 50)).map(sorted), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_choice_is_some_of_those_that_are_there(clients, size, seed, round_index):
    chosen = choose(clients, size, seed, round_index)
    assert len(chosen) == min(size, len(clients))
    assert list(chosen) == sorted(set(chosen) & set(clients))
    assert chosen == choose(clients, size, seed, round_index)


def test_choices_differ_from_round_to_round_and_leave_nobody_out():
    counts = torch.zeros(5)
    for round_index in range(200):
        counts[list(choose(list(range(5)), 2, SEED, round_index))] += 1
    # 80 each is expected, with a deviation of sqrt(200 * 0.4 * 0.6) = 7.
    assert counts.min() > 50
    assert counts.max() < 110


def changed(**values):
    def change(reply):
        content = RecordDict({"lbgm": ConfigRecord({**dict(reply.content["lbgm"]), **values})})
        fresh = Message(content, 1, "evaluate")
        fresh.metadata.__dict__.update(reply.metadata.__dict__)
        return [fresh]

    return change


def crash(reply):
    message = Message(RecordDict(), reply.metadata.src_node_id, "evaluate")
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return [Message(Error(0, "out of memory"), reply_to=message)]


CASES = {
    "nan": (changed(metric_values=[math.nan]), "'metric_values' is out of range"),
    "wrong names": (changed(metric_names=["loss"]), "['loss', 'val_acc'] are here alone, or missing"),
    "more names": (changed(metric_names=["val_acc", "b"], metric_values=[0.5, 1.0]), "['b'] are here alone"),
    "giant count": (changed(num_examples=2**50), "'num_examples' is out of range"),
    "another client": (changed(client_id=0), "answer is of client 0"),
    "another ticket": (changed(ticket="0" * 16), "another ticket"),
    "crash": (crash, "out of memory"),
    "silence": (lambda reply: [], "No answer"),
}


def test_scores_that_are_none_are_refused_and_each_round_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    names = list(CASES)  # one a round
    trials = {"uplink": [], "local_steps": 1}

    def tamper(reply, message):
        is_hostile = message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 101
        return CASES[names[int(message.metadata.group_id) - 1]][0](reply) if is_hostile else [reply]

    grid = MemoryGrid(make_apps(val=VALS, **trials), tamper=tamper)
    module, seen, strategy, result = serve(tmp_path, grid, rounds=len(CASES), **trials, **ALL)
    lines = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert len(lines) == len(CASES)
    for number, (name, line) in enumerate(zip(names, lines)):
        assert line.startswith(f"Evaluation after round {number}: client 1 (node 101) is left out: "), name
        assert CASES[name][1] in line, name
    assert strategy.refusals == {1: len(CASES)}
    scores = [accuracy(module, VALS[k]) * SIZES[k] for k in (0, 2)]
    assert seen.metrics[-1]["clients/val_acc_mean"] == pytest.approx(sum(scores) / (SIZES[0] + SIZES[2]), rel=1e-6)
    assert [found["fl/evaluated_clients"] for found in result.evaluate_metrics_clientapp.values()] == [2] * len(CASES)
    assert all(metrics["fl/rejected_clients"] == 0 for metrics in seen.metrics)  # all of them trained


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metric_values", [-math.inf]),
        ("metric_values", [0.5, 0.5]),
        ("metric_names", ["a\n"]),
        ("metric_names", [""]),
        ("metric_names", ["a" * 201]),
        ("num_examples", 0),
        ("num_examples", -(2**40)),
    ],
)
def test_a_score_out_of_range_is_not_read(name, value):
    record = dict(write(Score(3, 2, 5, ["val/acc"], [0.5]))["lbgm"])
    with pytest.raises(RecordError, match="out of range"):
        read(RecordDict({"lbgm": ConfigRecord({**record, name: value})}), Score)
    with pytest.raises(RecordError, match="out of range"):
        Score(3, 2, 5, ["a", "a"], [0.5, 0.5])


class NoValidation(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(subset(TRAIN, parts(TRAIN)[1]), batch_size=10, shuffle=True)


class Empty(NoValidation):
    def val_dataloader(self):
        return []


class NoStep(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)


@pytest.mark.parametrize(
    ("module", "data", "words"),
    [
        (make_net, NoValidation, "`NoValidation` has no `val_dataloader`"),
        (make_net, Empty, "no validation data"),
        (NoStep, Empty, "`NoStep` has no `validation_step`"),
        (lambda: Net().requires_grad_(False), lambda: Data(None, VALS[0]), "no trainable parameter"),
    ],
)
def test_a_node_that_cannot_evaluate_says_why(module, data, words):
    app = federated_client_app(module(), data(), trainer={"accelerator": "cpu"})
    trial = Trial("name", "digest", 1, 1, 0, 0, b"", "ticket")
    (reply,) = MemoryGrid({100: app}).send_and_receive([Message(write(trial), 100, "evaluate")])
    answer = read(reply.content, Refusal)
    assert answer.ticket == "ticket"
    assert words in answer.reason


def test_a_model_that_does_not_fit_is_refused_by_the_node(tmp_path):
    grid = MemoryGrid(make_apps(val=VALS, **SETTINGS))
    serve(tmp_path, grid, rounds=1, **SETTINGS, **ALL)
    (message, *_) = [m for m in grid.sent if m.metadata.message_type == "evaluate"]
    trial = read(message.content, Trial)
    for change, words in (
        ({"settings": "other"}, "differ from those at the server"),
        ({"model": trial.model[:-1]}, "checksum does not match"),
        ({"model": b""}, "truncated"),
    ):
        (reply,) = grid.send_and_receive([Message(write(Trial(**{**vars(trial), **change})), 100, "evaluate")])
        assert words in read(reply.content, Refusal).reason
    (reply,) = grid.send_and_receive([Message(write(trial), 100, "evaluate")])
    assert read(reply.content, Score).num_examples == SIZES[0]


class Broken(Counting):
    """Has a validation that fails if it is told to."""

    broken = False

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.broken:
            raise ValueError("broken")


def test_an_evaluation_leaves_a_nodes_module_as_it_was(tmp_path):
    apps = make_apps(net=norm_net, val=VALS, **SETTINGS)
    grid = MemoryGrid(apps)
    serve(tmp_path, grid, rounds=1, net=norm_net, **SETTINGS, **ALL)
    (message, *_) = [m for m in grid.sent if m.metadata.message_type == "evaluate"]
    module = Broken(norm=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    options = {name: value for name, value in SETTINGS.items() if name != "local_steps"}
    app = federated_client_app(module, Data(None, VALS[0]), trainer={"accelerator": "cpu"}, **options)
    scores = []
    for module.broken in (False, False, True):
        random = torch.get_rng_state()
        (reply,) = MemoryGrid({100: app}).send_and_receive([Message(message.content, 100, "evaluate")])
        if module.broken:
            assert reply.error.reason == "broken"
        else:
            scores.append(read(reply.content, Score))
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        torch.rand(1)
    assert scores[0] == scores[1]  # also what is drawn at random in it


class NotFinite(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_acc", math.nan)


def test_a_node_without_validation_data_trains_and_is_asked_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    apps = make_apps(val=VALS, **SETTINGS)
    options = {name: value for name, value in SETTINGS.items() if name != "local_steps"}
    apps[101] = federated_client_app(make_net(), NoValidation(), trainer={"accelerator": "cpu"}, **options)
    broken = Data(subset(TRAIN, parts(TRAIN)[2]), VALS[2])
    apps[102] = federated_client_app(NotFinite(), broken, trainer={"accelerator": "cpu"}, **options)
    grid = MemoryGrid(apps)
    _, seen, strategy, _ = serve(tmp_path, grid, rounds=2, **SETTINGS, **ALL)
    assert asked(grid) == {1: [0, 1, 2], 2: [0, 2]}  # what is not finite now may be later
    assert strategy.refusals == {1: 1, 2: 2}
    assert "`NoValidation` has no `val_dataloader`. It is not asked again." in caplog.text
    assert caplog.text.count("['val_acc'] are not finite on this node's validation data.\n") == 2
    assert [metrics["fl/evaluated_clients"] for metrics in seen.metrics] == [1, 1]
    assert [len(report.clients) for report in seen.reports] == [3, 3]


def test_a_restart_changes_no_evaluation(tmp_path):
    some = {"fraction_evaluate": 0.4, "min_evaluate_nodes": 2}
    whole = serve(tmp_path, MemoryGrid(make_apps(val=VALS, **SETTINGS)), rounds=2, **SETTINGS, **some)[3]
    nodes, state = tmp_path / "nodes", tmp_path / "server"
    for rounds in (1, 2):
        grid = MemoryGrid(make_apps(val=VALS, state_dir=nodes, **SETTINGS))
        result = serve(tmp_path, grid, rounds=rounds, state_dir=state, **SETTINGS, **some)[3]
    assert set(result.evaluate_metrics_clientapp) == {2}
    assert dict(result.evaluate_metrics_clientapp[2]) == dict(whole.evaluate_metrics_clientapp[2])


def test_a_round_without_an_answer_has_no_scores(tmp_path):
    grid = MemoryGrid(
        make_apps(val=VALS, **SETTINGS),
        tamper=lambda reply, message: [] if message.metadata.message_type == "evaluate" else [reply],
    )
    _, _, strategy, result = serve(tmp_path, grid, rounds=1, **SETTINGS, **ALL)
    assert set(result.evaluate_metrics_clientapp[1]) == {"comm/evaluation_bytes", "fl/evaluated_clients"}
    assert result.evaluate_metrics_clientapp[1]["fl/evaluated_clients"] == 0
    assert strategy.refusals == {0: 1, 1: 1, 2: 1}


def test_records_of_an_evaluation_survive_flowers_serialisation():
    for record in (Trial("name", "digest", 1, 1, 3, 2, b"\x08"), Score(3, 2, 5, ["val/acc"], [0.5], "ticket")):
        content = write(record)
        crossed = RecordDict({"lbgm": ConfigRecord.inflate(content["lbgm"].deflate())})
        assert read(crossed, Task, type(record)) == record


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction_evaluate": 1.5}, "`fraction_evaluate` must be in"),
        ({"fraction_evaluate": -0.1}, "0 for none"),
        ({"fraction_evaluate": True}, "`fraction_evaluate` must be in"),
        ({"min_evaluate_nodes": 0}, "`min_evaluate_nodes` must be"),
    ],
)
def test_options_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LBGMStrategy(make_net(), **settings)
