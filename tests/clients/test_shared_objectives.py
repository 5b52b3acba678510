"""SCAFFOLD and FedDyn: equal to plain loops, and the server's part lasts as the clients' does."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import SCAFFOLD, CoordinateMedian, ErrorFeedback, FedDyn, LBGMFederated, SignSGD, TopK
from lightning_lbgm.compression import Context
from lightning_lbgm.payloads import Dense
from lightning_lbgm.protocol import ClientEnd, Message, ServerEnd, WireChannel
from lightning_lbgm.server.objective import ServerObjective
from lightning_lbgm.simulation import undo
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy import session

SIZES, ROUNDS, EPOCHS = (8, 16, 16, 24, 16), 5, 2
EXECUTIONS = ["sequential", "vectorized"]
OBJECTIVES = [SCAFFOLD(), FedDyn(0.3)]


class Module(pl.LightningModule):
    """An MLP in double precision with two parameter groups, the same weights at each call."""

    def __init__(self, rates=(0.2, 0.2), decay=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.rates, self.decay = rates, decay

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip(self.net[::2], self.rates)]
        return torch.optim.SGD(groups, lr=0.2, weight_decay=self.decay)


def make_loaders():
    """Clients with different numbers of examples, in batches of 8 that come in the same order every time."""
    loaders = []
    for client, size in enumerate(SIZES):
        x, y = make_data(size, seed=client).tensors
        loaders.append(DataLoader(TensorDataset(x.double(), y), batch_size=8))
    return loaders


def train(root, objective, module=None, trainer=None, ckpt_path=None, rounds=ROUNDS, **settings):
    """Train with a loader a client; return (federation, global parameters, cohorts, reports)."""
    module, recorder = module or Module(), Recorder()
    defaults = {"local_epochs": EPOCHS, "uplink": [], "seed": 0, "clients_per_round": 3, "vectorized_chunk": 3}
    strategy = LBGMFederated(num_clients=None, objective=objective, **{**defaults, **settings})
    extra = trainer or {}
    callbacks = [recorder, *extra.pop("callbacks", [])]
    trainer = build_trainer(root, strategy, max_epochs=rounds, callbacks=callbacks, **extra)
    trainer.fit(module, make_loaders(), ckpt_path=ckpt_path)
    cohorts = [[c.client_id for c in report.clients] for report in recorder.reports]
    return strategy._federation, flat_params(module), cohorts, recorder.reports


def kept(federation, name):
    """Return what each client keeps for its objective, by client, copied."""
    found = {k: federation.clients[k].get("objective") for k in federation.clients}
    return {k: state[name].clone() for k, state in found.items() if state}


# Equal to a plain loop


def cut(vector, parameters):
    return [part.view(p.shape) for part, p in zip(vector.split([p.numel() for p in parameters]), parameters)]


def weights_of(cohort, weighting):
    sizes = [SIZES[k] if weighting == "examples" else 1 for k in cohort]
    return [size / sum(sizes) for size in sizes]


def scaffold_by_hand(module, cohorts, weighting):
    """SCAFFOLD, option II, as one writes it; return the model, the clients' control variates and the server's."""
    parameters, loaders = list(module.parameters()), make_loaders()
    rates = [module.rates[0]] * 2 + [module.rates[1]] * 2
    x, c = flat_params(module), torch.zeros_like(flat_params(module))
    own = {}
    for cohort in cohorts:
        mean, change = torch.zeros_like(x), torch.zeros_like(x)
        for client, weight in zip(cohort, weights_of(cohort, weighting)):
            y, ck, steps = x.clone(), own.get(client, torch.zeros_like(x)), 0
            for batch in [batch for _ in range(EPOCHS) for batch in loaders[client]]:
                nn.utils.vector_to_parameters(y, parameters)
                g = torch.cat([t.flatten() for t in torch.autograd.grad(module.loss(batch), parameters)])
                step = g - ck + c + module.decay * y
                for part, direction, rate in zip(cut(y, parameters), cut(step, parameters), rates):
                    part -= rate * direction
                steps += 1
            eta = torch.cat([torch.full_like(p.detach(), rate).flatten() for p, rate in zip(parameters, rates)])
            new = torch.where(eta > 0, ck - c + (x - y) / (steps * eta), ck)
            change += new - ck
            own[client] = new
            mean += weight * y
        x, c = mean, c + change / len(SIZES)
    return x, own, c


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize(
    "settings", [{}, {"rates": (0.1, 0.3)}, {"rates": (0.0, 0.3)}, {"decay": 0.1}], ids=["", "groups", "still", "decay"]
)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_scaffold_equals_a_plain_loop(tmp_path, execution, settings, weighting):
    module = Module(**settings)
    federation, params, cohorts, _ = train(tmp_path, SCAFFOLD(), module, execution=execution, weighting=weighting)
    expected, own, server = scaffold_by_hand(Module(**settings), cohorts, weighting)
    torch.testing.assert_close(params, expected, rtol=0, atol=1e-12)
    found = kept(federation, "control")
    assert found.keys() == own.keys()
    for client, control in own.items():
        torch.testing.assert_close(found[client], control, rtol=0, atol=1e-11)
    shared = federation.objective.state["control"]
    torch.testing.assert_close(shared, server, rtol=0, atol=1e-11)
    # By induction c is the mean of all clients' c_k, those of clients that never took part being 0.
    torch.testing.assert_close(shared, sum(found.values()) / len(SIZES), rtol=0, atol=1e-11)
    _, plain, _, _ = train(tmp_path, None, Module(**settings), weighting=weighting)
    assert (plain - expected).abs().max() > 1e-3


def feddyn_by_hand(module, cohorts, alpha, rate, median=False):
    """FedDyn with SGD clients as one writes it; return the model, the clients' h_k and the server's h."""
    parameters, loaders = list(module.parameters()), make_loaders()
    theta = flat_params(module)
    h, own = torch.zeros_like(theta), {}
    for cohort in cohorts:
        arrived = []
        for client in cohort:
            y, hk = theta.clone(), own.get(client, torch.zeros_like(theta))
            for batch in [batch for _ in range(EPOCHS) for batch in loaders[client]]:
                nn.utils.vector_to_parameters(y, parameters)
                g = torch.cat([t.flatten() for t in torch.autograd.grad(module.loss(batch), parameters)])
                y = y - rate * (g - hk + alpha * (y - theta))
            own[client] = hk - alpha * (y - theta)
            arrived.append(y)
        arrived = torch.stack(arrived)
        h = h - alpha * (arrived - theta).sum(0) / len(SIZES)
        middle = arrived.median(0).values if median else arrived.mean(0)
        theta = middle - h / alpha
    return theta, own, h


@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_feddyn_equals_a_plain_loop(tmp_path, execution, median):
    aggregation = CoordinateMedian() if median else None
    federation, params, cohorts, _ = train(
        tmp_path, FedDyn(0.3), execution=execution, weighting="uniform", aggregation=aggregation
    )
    expected, own, server = feddyn_by_hand(Module(), cohorts, 0.3, 0.2, median)
    torch.testing.assert_close(params, expected, rtol=0, atol=1e-12)
    found = kept(federation, "sum")
    assert found.keys() == own.keys()
    for client, h in own.items():
        torch.testing.assert_close(0.3 * found[client], h, rtol=0, atol=1e-12)
    torch.testing.assert_close(0.3 * federation.objective.state["sum"], server, rtol=0, atol=1e-12)


# Lossy uplinks


@given(st.integers(0, 2**16), st.sampled_from(OBJECTIVES), st.booleans())
def test_both_ends_learn_the_same_from_a_lossy_uplink(seed, objective, uniform):
    """The client has its own message, the server the bytes: both come to the same states, without a word more."""
    generator = torch.Generator().manual_seed(seed)
    uplink, size = [ErrorFeedback([TopK(0.4), SignSGD()])], 10
    ends = {k: (ClientEnd(k, uplink), ServerEnd(uplink, [4, 6])) for k in range(3)}
    server = ServerObjective(objective, 3, torch.zeros(size))
    own: dict = {k: {} for k in ends}
    known = dict(own)
    for round_index in range(3):
        server.begin_round()
        for k, (client, receiver) in ends.items():
            step_sizes = (0.5, 0.5) if uniform else (0.5, 0.25)
            update = Dense(torch.randn(size, generator=generator), [4, 6])
            context = Context(round_index)
            message, encoded = client.encode(update, round_index, context, {})
            own[k] = objective.learn(own[k], server.state, encoded.decoded, step_sizes)
            received = receiver.receive(Message.from_bytes(message.to_bytes(), receiver.layout), round_index, context)
            known[k] = server.receive(known[k], received.update, step_sizes)
            ((name, vector),) = own[k].items()
            assert torch.equal(vector, known[k][name])
        server.finish(torch.zeros(size))
        mean = sum(state[name] for state in own.values()) / 3
        torch.testing.assert_close(server.state[name], mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_lost_update_changes_neither_client_nor_server(tmp_path, monkeypatch, objective):
    count = 0

    def transport(data):
        nonlocal count
        count += 1
        return None if count > 3 else data  # all of the first round arrive, none of the second

    def make(flat, uplink, *rest, **settings):
        channel = WireChannel(uplink, flat.layout, {}, transport)
        return Federation(flat, uplink, *rest, **{**settings, "channel": channel})

    one, params, _, _ = train(tmp_path, objective, rounds=1)
    monkeypatch.setattr(session, "Federation", make)
    two, others, _, reports = train(tmp_path, objective, rounds=2)
    assert [c.rejected for c in reports[1].clients] == [True] * 3
    (name,) = one.objective.state
    assert torch.equal(one.objective.state[name], two.objective.state[name])
    mine, theirs = kept(one, name), kept(two, name)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert torch.equal(params, others)


# What it costs


def test_what_goes_down_more_is_counted(tmp_path):
    entries = 6 * 5 + 5 + 5 * 3 + 3
    for objective, factor in ((SCAFFOLD(), 2), (FedDyn(0.3), 1), (None, 1)):
        _, _, _, reports = train(tmp_path, objective, rounds=2)
        assert {c.downlink_bits for r in reports for c in r.clients} == {factor * 64 * entries}
        assert {c.dense_downlink_bits for r in reports for c in r.clients} == {64 * entries}
        assert {c.uplink_bits for r in reports for c in r.clients} == {64 * entries}
    one, *_, plain = train(tmp_path, None, downlink=[TopK(0.2)])
    two, *_, shared = train(tmp_path, SCAFFOLD(), downlink=[TopK(0.2)])
    more = {b.downlink_bits - a.downlink_bits for r, s in zip(plain, shared) for a, b in zip(r.clients, s.clients)}
    assert more == {64 * entries}
    assert not torch.equal(one.downlink.held, two.downlink.held)


# Steps that do not count, and optimizers that do not fit


class Single(Module):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.float()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float(), batch[1]


def test_steps_that_mixed_precision_skips_do_not_count(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    received = []

    class Watching(SCAFFOLD):
        def receive(self, totals, shared, update, step_sizes):
            received.append(step_sizes)
            super().receive(totals, shared, update, step_sizes)

    trainer = {"plugins": [plugin]}
    train(tmp_path, Watching(), Single(), trainer=trainer, rounds=1, clients_per_round=5, execution="sequential")
    steps = [round(sizes[0] / 0.2) for sizes in received]
    made = [EPOCHS * size // 8 for size in SIZES]
    assert all(step <= most for step, most in zip(steps, made))
    assert 0 < sum(steps) < sum(made)  # the scaler halves the scale after each step that overflows


def test_a_client_without_a_step_changes_nothing(tmp_path):
    class NoLoss(Module):
        def training_step(self, batch, batch_idx):
            return None

    federation, *_ = train(tmp_path, SCAFFOLD(), NoLoss(), rounds=2)
    assert not federation.objective.state["control"].any()
    assert kept(federation, "control") == {}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.1), "Adam"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"SGD\(momentum=0.9\)"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), r"SGD\(maximize=True\)"),
    ],
)
def test_scaffold_refuses_other_optimizers_with_the_remedy(tmp_path, make, found):
    class Other(Module):
        def configure_optimizers(self):
            return make(self.parameters())

    with pytest.raises(MisconfigurationException, match=rf"plain SGD.*returns `{found}`.*Use `torch.optim.SGD"):
        train(tmp_path, SCAFFOLD(), Other())
    train(tmp_path, FedDyn(0.3), Other(), rounds=1)  # which goes with any


@pytest.mark.parametrize(("alpha", "error"), [("1", TypeError), (True, TypeError), (0, ValueError), (-1.0, ValueError)])
def test_the_weight_of_feddyn_is_a_finite_number_above_zero(alpha, error):
    with pytest.raises(error, match=r"`FedDyn\(alpha=...\)`"):
        FedDyn(alpha)
    with pytest.raises(ValueError, match=r"`FedDyn\(alpha=...\)`"):
        FedDyn(float("nan"))


# What lasts


def same(one, two):
    (name,) = one.objective.state
    mine, theirs = kept(one, name), kept(two, name)
    return (
        torch.equal(one.objective.state[name], two.objective.state[name])
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[k], theirs[k]) for k in mine)
    )


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_resuming_goes_on_to_the_bit(tmp_path, objective, execution, store):
    settings = {"execution": execution, "uplink": [TopK(0.5)], "rounds": 4}
    if store == "disk":
        settings["client_store"] = str(tmp_path / "store")
    callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    saving = {"callbacks": [callback], "enable_checkpointing": True}
    whole, params, _, _ = train(tmp_path, objective, trainer=saving, **settings)
    rest, resumed, _, _ = train(tmp_path, objective, ckpt_path=tmp_path / "step=2.ckpt", **settings)
    assert torch.equal(params, resumed)
    assert same(whole, rest)
    with pytest.raises(MisconfigurationException, match="`objective="):
        train(tmp_path, FedDyn(0.2), ckpt_path=tmp_path / "step=2.ckpt", **settings)


class Breaks(pl.Callback):
    """Breaks the third round off after the server's step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.index == 2:
            raise RuntimeError("boom")


class BreaksAmong(Module):
    """Breaks the third round off in its last client's turn."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += self.trainer.global_step == 2
        if self.steps == 6:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["after", "among", "among, saved"])
@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_round_that_breaks_off_is_taken_back_at_both_ends(tmp_path, objective, store, where):
    settings = {"execution": "sequential", "client_store": "memory" if store == "memory" else str(tmp_path / "store")}
    before, params, _, _ = train(tmp_path, objective, rounds=2, **settings)
    module = Module() if where == "after" else BreaksAmong()
    strategy = LBGMFederated(
        num_clients=None, objective=objective, local_epochs=EPOCHS, uplink=[], seed=0, clients_per_round=3, **settings
    )
    callbacks = [Breaks()] if where == "after" else []
    if where == "among, saved":
        callbacks.append(ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True, save_top_k=1))
    saving = {"enable_checkpointing": True} if where == "among, saved" else {}
    trainer = build_trainer(tmp_path, strategy, max_epochs=3, callbacks=callbacks, **saving)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, make_loaders())
    assert same(before, strategy._federation)
    assert torch.equal(flat_params(module), params)


def test_what_clients_keep_for_it_is_taken_back_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(undo, "_MAX_KEPT_BYTES", 0)
    before, *_ = train(tmp_path, SCAFFOLD(), rounds=2)
    strategy = LBGMFederated(
        num_clients=None, objective=SCAFFOLD(), local_epochs=EPOCHS, uplink=[], seed=0, clients_per_round=3
    )
    trainer = build_trainer(tmp_path, strategy, max_epochs=3, callbacks=[Breaks()])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(Module(), make_loaders())
    assert same(before, strategy._federation)


def test_a_checkpoint_that_lacks_clients_lets_all_start_anew(tmp_path):
    """Half of the control variates without the others would leave a bias for ever."""
    callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = {"callbacks": [callback], "enable_checkpointing": True}
    train(tmp_path, SCAFFOLD(), trainer=trainer, rounds=2)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    del checkpoint["lightning_lbgm"]["objective"]
    torch.save(checkpoint, tmp_path / "lacks.ckpt")
    with pytest.warns(UserWarning, match=r"lacks what some clients keep for `objective=SCAFFOLD\(\)`.*start anew"):
        federation, *_ = train(tmp_path, SCAFFOLD(), ckpt_path=tmp_path / "lacks.ckpt", rounds=3)
    found = kept(federation, "control")
    assert len(found) == 3  # of the third round alone
    torch.testing.assert_close(federation.objective.state["control"], sum(found.values()) / 5, rtol=0, atol=1e-12)


def test_settings_show_it_and_it_is_pickled(tmp_path):
    for objective in OBJECTIVES:
        assert repr(pickle.loads(pickle.dumps(objective))) == repr(copy.deepcopy(objective)) == repr(objective)
    assert (repr(SCAFFOLD()), repr(FedDyn(0.3))) == ("SCAFFOLD()", "FedDyn(alpha=0.3)")
    torch.manual_seed(0)
    strategy = LBGMFederated(num_clients=3, objective=SCAFFOLD(), seed=0)
    build_trainer(tmp_path, strategy).fit(TinyModule(), DataLoader(make_data(), batch_size=8))
    assert strategy.settings()["objective"] == "SCAFFOLD()"
