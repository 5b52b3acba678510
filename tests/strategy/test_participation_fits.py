"""Who takes part, in whole fits: weights, states in step, rounds without anybody, and how a run goes on."""

from __future__ import annotations

import copy
import csv
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from states import assert_same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lbgm import (
    ConvergenceMonitor,
    CoordinateMedian,
    Dropout,
    ErrorFeedback,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    PowerOfChoice,
    Sampler,
    SizeSampler,
    TopK,
    UniformSampler,
)
from lightning_lbgm.protocol import WireChannel
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy import session

OWNER = [0] * 4 + [1] * 8 + [2] * 12 + [3] * 16 + [4] * 20  # with a batch size of 4: 1, 2, 3, 4, 5 local steps
TURNS = {
    "dropout": {"dropout": Dropout(0.2, 0.3)},
    "power of choice": {"sampler": PowerOfChoice(4), "clients_per_round": 2},
    "all": {
        "sampler": PowerOfChoice(5),
        "clients_per_round": 2,
        "availability": lambda round_index, client_id: 0.0 if round_index == 3 else 0.8,
        "over_select": 1.5,
        "deadline": 4,
        "dropout": Dropout(0.1, 0.3),
    },
}


class Turns(Recorder):
    """Also collect each round's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.losses.append(float(outputs["loss"]))

    @property
    def cohorts(self):
        return [[client.client_id for client in report.clients] for report in self.reports]

    @property
    def dropped(self):
        return [[client.client_id for client in report.dropped] for report in self.reports]


def run(fit, rounds=8, callbacks=(), module=None, given=None, **settings):
    """Train the federation of ``OWNER``; return the trainer, its module and what was recorded."""
    trainer_settings = {k: settings.pop(k) for k in list(settings) if k in TRAINER_SETTINGS}
    federation = {"num_clients": 5, "partitioner": NaturalPartitioner(OWNER), "uplink": [LookBack(0.5)], "seed": 2}
    turns = Turns()
    trainer, module = fit(
        given or LBGMFederated(**{**federation, **settings}),
        module=module,
        batch_size=4,
        shuffle=True,
        max_epochs=rounds,
        callbacks=[turns, *callbacks],
        **trainer_settings,
    )
    return trainer, module, turns


TRAINER_SETTINGS = ("ckpt_path", "enable_checkpointing", "val", "logger", "enable_progress_bar", "dataset")


# Weights


def plain_lbgm(cohorts, lr=0.3, threshold=0.5):
    """LBGM of full-batch clients with one local step, written out for given cohorts: weights n_k over the cohort's."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    (x, y), owner = make_data().tensors, torch.tensor(OWNER)
    theta, lbgs = torch.cat([p.detach().reshape(-1) for p in net.parameters()]), {}
    for cohort in cohorts:
        total = torch.zeros_like(theta)
        for k in cohort:
            nn.utils.vector_to_parameters(theta.clone(), net.parameters())
            loss = nn.functional.cross_entropy(net(x[owner == k]), y[owner == k])
            g = lr * torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, net.parameters())])
            lbg = lbgs.get(k)
            if lbg is not None and 1 - (g @ lbg) ** 2 / ((g @ g) * (lbg @ lbg)) <= threshold:
                g = (g @ lbg) / (lbg @ lbg) * lbg
            else:
                lbgs[k] = g
            total += OWNER.count(k) / sum(OWNER.count(j) for j in cohort) * g
        theta = theta - total
    return theta


def test_weights_renormalise_over_those_that_remain(fit):
    turns = Turns()
    strategy = LBGMFederated(
        num_clients=5, partitioner=NaturalPartitioner(OWNER), uplink=[LookBack(0.5)], seed=2,
        availability=0.7, dropout=Dropout(0.1, 0.3),
    )  # fmt: skip
    _, module = fit(strategy, max_epochs=15, callbacks=[turns])
    assert any(turns.dropped)
    assert min(map(len, turns.cohorts)) < max(map(len, turns.cohorts))
    torch.testing.assert_close(flat_params(module), plain_lbgm(turns.cohorts), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rules", [TURNS["dropout"], TURNS["all"]], ids=["dropout", "all"])
def test_vectorised_clients_come_to_the_same(fit, rules):
    """Full batches, so that there are chunks."""
    results = []
    for execution in ("sequential", "vectorized"):
        turns = Turns()
        given = {"num_clients": 5, "seed": 2, "local_steps": 2, "execution": execution, **rules}
        _, module = fit(LBGMFederated(**given), max_epochs=6, callbacks=[turns])
        results.append((flat_params(module), turns.cohorts, turns.dropped))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    assert results[0][1:] == results[1][1:]


# States in step


@pytest.mark.parametrize("rules", [TURNS["dropout"], TURNS["all"]], ids=["dropout", "all"])
def test_both_ends_stay_in_step_over_the_wire(fit, monkeypatch, rules):
    def make(flat, uplink, server, buffers, *rest, **settings):
        settings["channel"] = WireChannel(uplink, flat.layout)
        return Federation(flat, uplink, server, buffers, *rest, **settings)

    uplink = [ErrorFeedback([TopK(0.5), LookBack(0.6, rank=2)])]
    shared, wired = [], []
    for results in (shared, wired):
        if results is wired:
            monkeypatch.setattr(session, "Federation", make)
        trainer, module, turns = run(fit, uplink=uplink, downlink=[TopK(0.5)], **rules)
        results += [flat_params(module), trainer.strategy.ledger.state_dict(), turns.cohorts]
        results += [[[c.outcome for c in r.chosen] for r in turns.reports]]
    assert torch.equal(shared[0], wired[0])
    assert shared[1:] == wired[1:]
    assert "rejected" not in str(shared)


class Watch(pl.Callback):
    """See that the clients that dropped out keep their states."""

    def __init__(self) -> None:
        self.checked = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = copy.deepcopy(dict(trainer.strategy._federation.clients))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = dict(trainer.strategy._federation.clients)
        for client_id in set(range(5)) - set(batch.cohort):
            assert_same(self.before.get(client_id, {}), now.get(client_id, {}))
            self.checked += client_id in now and client_id in (*batch.dropped, *batch.unreached)


def test_a_dropped_clients_state_is_as_before_its_turn(fit, tmp_path):
    for store in ("memory", str(tmp_path / "store")):
        watch = Watch()
        uplink = [ErrorFeedback([TopK(0.5), LookBack(0.6)])]
        run(fit, rounds=12, callbacks=[watch], uplink=uplink, buffers="client", client_store=store, **TURNS["dropout"])
        assert watch.checked > 10


# What is counted


def test_dropped_clients_are_counted_with_what_they_got(fit, tmp_path):
    bits, logger = 21 * 32, CSVLogger(tmp_path)
    trainer, _, turns = run(fit, rounds=10, logger=logger, **TURNS["dropout"])
    ledger = trainer.strategy.ledger
    reached = 0
    for report, metrics in zip(turns.reports, turns.callback_metrics):
        everyone = sorted([c.client_id for c in report.clients] + [c.client_id for c in report.dropped])
        assert everyone == list(range(5)) == [c.client_id for c in report.chosen]
        assert (metrics["fl/dropped_clients"], metrics["fl/cohort_size"]) == (len(report.dropped), len(report.clients))
        assert metrics["fl/available_clients"] == 5
        late = [c for c in report.dropped if c.downlink_bits]
        assert all((c.downlink_bits, c.dense_downlink_bits, c.whole_model) == (bits, bits, True) for c in late)
        unreached = [c for c in report.dropped if not c.downlink_bits]
        assert not any(c.dense_downlink_bits or c.whole_model for c in unreached)
        assert not any(c.uplink_bits or c.dense_bits or c.local_steps for c in report.dropped)
        assert metrics["comm/downlink_bytes"] == (len(report.clients) + len(late)) * bits / 8
        reached += len(report.clients) + len(late)
    assert ledger.downlink_bits == ledger.dense_downlink_bits == reached * bits
    assert ledger.dense_uplink_bits == sum(map(len, turns.cohorts)) * bits
    with open(f"{logger.log_dir}/clients.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["round"]), int(r["client"])) for r in rows] == [(t, k) for t in range(10) for k in range(5)]
    dropped = [row for row in rows if row["decision"] == "dropped"]
    assert [(int(r["round"]), int(r["client"])) for r in dropped] == [
        (t, k) for t, clients in enumerate(turns.dropped) for k in clients
    ]
    assert {float(row["downlink_bytes"]) for row in dropped} == {0.0, bits / 8}
    assert {(row["uplink_bytes"], row["loss"], row["local_steps"]) for row in dropped} == {("0.0", "nan", "0")}
    assert {int(row["num_examples"]) for row in dropped} <= {4, 8, 12, 16, 20}


def test_the_rounds_a_client_was_absent_count_those_in_which_it_dropped_out(fit):
    _, _, turns = run(fit, rounds=10, **TURNS["dropout"])
    last: dict[int, int] = {}
    for t, (cohort, metrics) in enumerate(zip(turns.cohorts, turns.callback_metrics)):
        absent = [t - last[k] for k in cohort if k in last]
        assert metrics["fl/rounds_absent_mean"] == pytest.approx(np.mean(absent) if absent else math.nan, nan_ok=True)
        last.update(dict.fromkeys(cohort, t))


def test_over_selection_takes_the_fastest_and_a_deadline_drops_the_slowest(fit):
    trainer, _, turns = run(fit, clients_per_round=2, over_select=1.5, rounds=10)
    for cohort, dropped in zip(turns.cohorts, turns.dropped):
        assert len(cohort) == 2
        assert len(dropped) == 1
        assert max(cohort) < dropped[0]  # client k makes k + 1 steps
    assert trainer.strategy.cohort_size == 2
    _, _, turns = run(fit, deadline=3, rounds=3)
    assert turns.cohorts == [[0, 1, 2]] * 3
    assert turns.dropped == [[3, 4]] * 3


def test_downlink_messages_reach_those_that_drop_out_later(fit):
    """A client that got the model needs no message of an earlier round next time; one that was unreached does."""
    late = {(1, 0)}  # round and client; one of them drops out almost surely
    for settings, expected in (({"after": 0.999999}, 1), ({"before": 0.999999}, 2)):

        def rule(round_index, client_id, settings=settings):
            return Dropout(**settings) if (round_index, client_id) in late else 0.0

        trainer, _, turns = run(fit, rounds=3, downlink=[TopK(0.1)], dropout=rule)
        assert turns.dropped == [[], [0], []]
        one_message = turns.reports[2].clients[1].downlink_bits
        got = turns.reports[2].clients[0].downlink_bits
        assert got == (one_message if expected == 1 else one_message + turns.reports[1].broadcast.bits)
        assert trainer.strategy.ledger.downlink_bits == sum(r.downlink_bits for r in turns.reports)


# Rounds without anybody

NOBODY = np.array([[1] * 5, [0] * 5, [0] * 5, [1] * 5])


@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
@pytest.mark.parametrize("aggregation", [None, CoordinateMedian()])
def test_a_round_without_anybody_passes(fit, execution, aggregation):
    steps = []

    class Momentum(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    class Scheduled(TinyModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}]

    torch.manual_seed(0)
    stopping = EarlyStopping("val/loss", patience=20, check_finite=True)
    training = EarlyStopping("train/loss", patience=20, check_finite=True)
    trainer, _, turns = run(
        fit,
        module=Scheduled(),
        callbacks=[stopping, training, ConvergenceMonitor(), ModelCheckpoint(monitor="val/loss")],
        val=True,
        enable_checkpointing=True,
        enable_progress_bar=True,
        local_steps=2,
        execution=execution,
        aggregation=aggregation,
        availability=NOBODY,
        downlink=[TopK(0.5)],
        server_optimizer=lambda params: Momentum(params, lr=0.5, momentum=0.9),
    )
    assert [len(cohort) for cohort in turns.cohorts] == [5, 0, 0, 5] * 2
    assert trainer.global_step == trainer.strategy.round_index == 8
    assert len(steps) == 4
    assert [math.isnan(loss) for loss in turns.losses] == [False, True, True, False] * 2
    for t in (1, 2, 5, 6):
        assert torch.equal(turns.params[t], turns.params[t - 1])
        report, metrics = turns.reports[t], turns.callback_metrics[t]
        assert report.update_norm == report.downlink_bits == report.uplink_bits == 0
        assert (metrics["fl/available_clients"], metrics["fl/cohort_size"], metrics["fl/dropped_clients"]) == (0, 0, 0)
        assert math.isnan(metrics["comm/downlink_error"])
        assert metrics["val/loss"] > 0
        assert metrics["train/loss"] == turns.callback_metrics[t - 1]["train/loss"]  # nothing was logged
    assert not torch.equal(turns.params[3], turns.params[2])
    # The clients hold what they did: the messages that they get are numbered on.
    assert turns.reports[3].clients[0].downlink_bits == turns.reports[3].broadcast.bits > 0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3 * 0.9**8)


def test_a_run_may_begin_with_nobody_and_end_with_everybody_dropped(fit):
    _, module, turns = run(fit, rounds=3, val=True, availability=NOBODY[1:], dropout=lambda t, k: (t == 2) * 0.9999999)
    assert turns.cohorts == [[], [], []]
    assert turns.dropped == [[], [], [0, 1, 2, 3, 4]]
    torch.manual_seed(0)
    assert torch.equal(flat_params(module), flat_params(TinyModule()))
    assert turns.reports[2].downlink_bits == 5 * 21 * 32
    assert all(math.isnan(loss) for loss in turns.losses)


# Going on


@pytest.mark.parametrize("rules", [TURNS["dropout"], TURNS["all"]], ids=["dropout", "all"])
def test_a_resumed_run_draws_the_cohorts_of_the_unbroken_one(fit, tmp_path, rules):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, module, turns = run(fit, callbacks=[save], enable_checkpointing=True, **rules)
    resumed, again, later = run(fit, ckpt_path=tmp_path / "step=4.ckpt", client_store=str(tmp_path / "store"), **rules)
    assert later.cohorts == turns.cohorts[4:]
    assert later.dropped == turns.dropped[4:]
    assert torch.equal(flat_params(module), flat_params(again))
    assert resumed.strategy.ledger == whole.strategy.ledger
    assert resumed.strategy._federation.sampling == whole.strategy._federation.sampling


def test_the_rules_may_change_in_a_resumed_run(fit, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run(fit, callbacks=[save], enable_checkpointing=True, rounds=4, **TURNS["power of choice"])
    path = tmp_path / "step=4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lightning_lbgm"]["sampling"]["of"] == "PowerOfChoice"
    losses = checkpoint["lightning_lbgm"]["sampling"]["state"]["losses"]
    trainer, _, turns = run(fit, ckpt_path=path, rounds=5, sampler=PowerOfChoice(5), clients_per_round=1)
    (client,) = turns.reports[0].clients
    assert losses[client.client_id] == max(losses.values())
    assert trainer.strategy._federation.sampling == {"losses": {**losses, client.client_id: client.loss}}
    trainer, _, turns = run(fit, ckpt_path=path, rounds=6, sampler=SizeSampler(), clients_per_round=1, dropout=0.1)
    assert trainer.strategy._federation.sampling == {}
    assert len(turns.reports) == 2
    # From a run that knew no sampler: its clients have reported nothing yet.
    run(fit, callbacks=[ModelCheckpoint(tmp_path, filename="plain")], enable_checkpointing=True, rounds=1)
    assert "sampling" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)["lightning_lbgm"]
    trainer, _, turns = run(fit, ckpt_path=tmp_path / "plain.ckpt", rounds=2, **TURNS["power of choice"])
    assert sorted(trainer.strategy._federation.sampling["losses"]) == turns.cohorts[0]


class Breaking(TinyModule):
    """Breaks off in a round, before or after the server's step."""

    place: str | None = None

    def break_at(self, place, index=4):
        if self.place == place and self.trainer.strategy.round_index >= index:
            raise RuntimeError("boom")

    def training_step(self, batch, batch_idx):
        self.break_at("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        self.break_at("on_train_batch_end")


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize("rules", [TURNS["all"]], ids=["all"])
def test_a_round_that_breaks_off_is_taken_back_with_what_the_sampler_learned(fit, make_trainer, rules, place):
    torch.manual_seed(0)
    _, whole, turns = run(fit, module=Breaking(), **rules)
    torch.manual_seed(0)
    module, again = Breaking(), Turns()
    settings = {"num_clients": 5, "partitioner": NaturalPartitioner(OWNER), "uplink": [LookBack(0.5)], "seed": 2}
    trainer = make_trainer(LBGMFederated(**settings, **rules), max_epochs=8, callbacks=[again])
    loader = DataLoader(make_data(), batch_size=4, shuffle=True)
    module.place = place
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, loader)
    done = trainer.strategy.round_index
    losses = {c.client_id: c.loss for report in turns.reports[:done] for c in report.clients}
    assert trainer.strategy._federation.sampling == {"losses": pytest.approx(losses)}
    module.place = None
    trainer.fit(module, loader)
    assert torch.equal(flat_params(module), flat_params(whole))
    assert again.cohorts[-(8 - done) :] == turns.cohorts[done:]
    assert trainer.strategy._federation.sampling == {
        "losses": {c.client_id: c.loss for report in turns.reports for c in report.clients}
    }


def test_power_of_choice_follows_the_losses_of_the_run(fit):
    """With everybody a candidate the cohorts follow from the reports: first who has not been there, then by loss."""
    _, _, turns = run(fit, sampler=PowerOfChoice(5), clients_per_round=2, rounds=10)
    losses = dict.fromkeys(range(5), math.inf)
    for report in turns.reports:
        chosen = {c.client_id for c in report.clients}
        assert min(losses[k] for k in chosen) >= max(losses[k] for k in set(range(5)) - chosen)
        losses.update({c.client_id: c.loss for c in report.clients})


def test_frozen_parameters_leave_the_sampler_what_it_knows(fit):
    class Freezes(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            if batch.index == 2:
                self.net.bias.requires_grad_(False)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="trainable parameters changed"):
        trainer, _, turns = run(fit, module=Freezes(), rounds=3, sampler=PowerOfChoice(5), clients_per_round=2)
    assert sorted(trainer.strategy._federation.sampling["losses"]) == sorted({k for c in turns.cohorts for k in c})


# Data


class Plain(Dataset):
    """Not tensors, so that workers load it."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        x, y = make_data().tensors
        return x[index], y[index]


@pytest.mark.parametrize(
    "rules", [TURNS["power of choice"], {"availability": NOBODY[:2], **TURNS["dropout"]}, {"sampler": SizeSampler()}]
)
def test_workers_load_the_batches_of_those_who_take_part(fit, rules):
    results = []
    for workers in (0, 1):
        torch.manual_seed(0)
        module, turns = TinyModule(), Turns()
        strategy = LBGMFederated(num_clients=5, partitioner=NaturalPartitioner(OWNER), seed=2, **rules)
        trainer, _ = fit(strategy, module=module, max_epochs=0)
        trainer.fit_loop.max_epochs = 4
        trainer.callbacks.append(turns)
        persistent = {"num_workers": workers, "persistent_workers": bool(workers)}
        trainer.fit(module, DataLoader(Plain(), batch_size=4, shuffle=True, **persistent))
        results.append((flat_params(module), turns.cohorts))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_loaders_of_the_clients_own_take_part_by_the_same_rules(make_trainer):
    sizes = {"a": 4, "b": 8, "c": 12, "d": 16}
    loaders = {name: DataLoader(make_data(n, seed=n), batch_size=4) for name, n in sizes.items()}
    turns = Turns()
    strategy = LBGMFederated(
        num_clients=None, clients_per_round=2, over_select=1.5, deadline=3, sampler=PowerOfChoice(4), seed=0,
        availability={"a": [(0, 2)], "c": [(0, 2)], "d": [(1, 2)]},
    )  # fmt: skip
    make_trainer(strategy, max_epochs=4, callbacks=[turns]).fit(TinyModule(), loaders)
    assert turns.cohorts == [[0, 2]] * 4
    assert turns.dropped == [[], [3], [], [3]]  # 'd' needs 4 steps
    assert [report.num_available for report in turns.reports] == [2, 3, 2, 3]


# Settings


def test_the_settings_that_are_set_are_shown(fit):
    plain, _, turns = run(fit, rounds=1)
    new = {"sampler", "availability", "over_select", "deadline", "dropout"}
    assert not new & plain.strategy.settings().keys()
    assert not {"fl/available_clients", "fl/dropped_clients"} & turns.callback_metrics[0].keys()
    trainer, _, _ = run(fit, rounds=1, **{**TURNS["all"], "availability": 0.5})
    shown = trainer.strategy.settings()
    assert {name: shown[name] for name in new} == {
        "sampler": "PowerOfChoice(d=5)",
        "availability": 0.5,
        "over_select": 1.5,
        "deadline": 4,
        "dropout": "Dropout(before=0.1, after=0.3)",
    }


def test_a_uniform_sampler_changes_nothing(fit):
    one, other = run(fit, clients_per_round=3), run(fit, clients_per_round=3, sampler=UniformSampler())
    assert one[2].cohorts == other[2].cohorts
    assert torch.equal(flat_params(one[1]), flat_params(other[1]))


class Alternating(Sampler):
    """A user's own, with a state."""

    def init(self):
        return {"round": 0}

    def sample(self, draw, state):
        return draw.clients[state["round"] % 2 :: 2]

    def end_round(self, state, losses):
        return {"round": state["round"] + 1}


def test_a_sampler_of_the_users_own_keeps_its_state(fit, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    _, _, turns = run(fit, rounds=3, sampler=Alternating(), callbacks=[save], enable_checkpointing=True)
    assert turns.cohorts == [[0, 2, 4], [1, 3], [0, 2, 4]]
    _, _, turns = run(fit, rounds=5, sampler=Alternating(), ckpt_path=tmp_path / "step=3.ckpt")
    assert turns.cohorts == [[1, 3], [0, 2, 4]]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"over_select": 1.5}, ValueError, "all 10 clients already"),
        ({"sampler": PowerOfChoice(2), "clients_per_round": 3}, ValueError, "fewer candidates than the 3 clients"),
        ({"sampler": "uniform"}, TypeError, "`sampler` must be"),
        ({"availability": 2.0}, ValueError, "availability=2.0"),
        ({"dropout": -0.1}, ValueError, "must be a probability"),
        ({"d": 3}, TypeError, r"Use `sampler=PowerOfChoice\(d=\.\.\.\)`"),
        ({"stragglers": 0.1}, TypeError, "`dropout=...`, `over_select=...` or `deadline=...`"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        LBGMFederated(**settings)


def test_settings_that_do_not_go_with_the_data_are_refused_before_the_first_round(fit):
    for settings, message in (
        ({"availability": [[1, 1]]}, "has 2 columns, but there are 5 clients"),
        ({"local_steps": 4, "deadline": 3}, "`deadline=3` local steps would drop every client.*deadline=4"),
    ):
        with pytest.raises(ValueError, match=message):
            run(fit, **settings)


def test_the_advice_knows_how_many_are_available(fit):
    settings = {"uplink": [LookBack(0.5)], "num_clients": 30, "partitioner": None, "rounds": 1}
    with pytest.warns(UserWarning, match="Cohorts of 6 of 30 clients: a client's turn comes every 5 rounds"):
        run(fit, **settings, availability=0.2)
