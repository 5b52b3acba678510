"""Local objectives: FedProx equals a loop with the term in the loss, and a client's state lasts as its other state."""

from __future__ import annotations

import functools

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import FedProx, LBGMFederated, LookBack
from lightning_lbgm.clients import LocalObjective

CLIENTS, ROUNDS, EPOCHS, LR = 4, 3, 2, 0.2
EXECUTIONS = ["sequential", "vectorized"]


class Module(TinyModule):
    """An MLP in double precision, the same weights at each call."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        super().__init__(**{"net": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), "lr": LR, **settings})
        self.double()


def make_loaders(num_clients=CLIENTS):
    """Clients with 16 examples each, in batches of 8 that come in the same order every time."""
    loaders = []
    for client in range(num_clients):
        x, y = make_data(16, seed=client).tensors
        loaders.append(DataLoader(TensorDataset(x.double(), y), batch_size=8))
    return loaders


def train(root, module=None, num_clients=CLIENTS, trainer=None, ckpt_path=None, rounds=ROUNDS, **strategy):
    """Train with a loader a client; return (trainer, module)."""
    module = module or Module()
    settings = {"local_epochs": EPOCHS, "uplink": [], "seed": 0, "vectorized_chunk": 3, **strategy}
    strategy = LBGMFederated(num_clients=None, **settings)
    trainer = build_trainer(root, strategy, max_epochs=rounds, **(trainer or {}))
    trainer.fit(module, make_loaders(num_clients), ckpt_path=ckpt_path)
    return trainer, module


def clip_as(bound, algorithm, parameters):
    if algorithm == "norm":
        nn.utils.clip_grad_norm_(parameters, bound)
    elif algorithm == "value":
        nn.utils.clip_grad_value_(parameters, bound)


def by_hand(module, term, optimize=None, bound=0.0, algorithm=None):
    """FedAvg as one writes it, with ``term(parameters, start)`` in the loss; return the global parameters."""
    parameters = list(module.parameters())
    for _ in range(ROUNDS):
        start = [p.detach().clone() for p in parameters]
        mean = [torch.zeros_like(p) for p in start]
        for loader in make_loaders():
            with torch.no_grad():
                for p, s in zip(parameters, start):
                    p.copy_(s)
            optimizer = module.configure_optimizers()
            for _ in range(EPOCHS):
                for batch in loader:

                    def closure(batch=batch, optimizer=optimizer, start=start):
                        optimizer.zero_grad()
                        loss = module.loss(batch) + term(parameters, start)
                        loss.backward()
                        clip_as(bound, algorithm, parameters)
                        return loss

                    optimizer.step(closure)
            for m, p in zip(mean, parameters):
                m.add_(p.detach(), alpha=1 / CLIENTS)
        with torch.no_grad():
            for p, m in zip(parameters, mean):
                p.copy_(m)
    return flat_params(module)


def proximal(mu):
    return lambda parameters, start: mu / 2 * sum(((p - s) ** 2).sum() for p, s in zip(parameters, start))


# FedProx

OPTIMIZERS = {
    "SGD": {"optimizer": torch.optim.SGD},
    "momentum": {"optimizer": torch.optim.SGD, "momentum": 0.9, "lr": 0.1},
    "Adam": {"optimizer": torch.optim.Adam, "lr": 0.05},
}


@pytest.mark.parametrize("clipping", [None, "norm", "value"])
@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_fedprox_equals_a_loop_with_the_proximal_term_in_the_loss(tmp_path, execution, settings, clipping):
    bound = {None: None, "norm": 0.3, "value": 0.08}[clipping]
    expected = by_hand(Module(**settings), proximal(0.8), bound=bound, algorithm=clipping)
    _, module = train(
        tmp_path,
        Module(**settings),
        execution=execution,
        objective=FedProx(0.8),
        trainer={"gradient_clip_val": bound, "gradient_clip_algorithm": clipping},
    )
    torch.testing.assert_close(flat_params(module), expected, rtol=0, atol=1e-12)
    # The term and the bound matter, and so does their order: the term is clipped with the rest.
    without_term = by_hand(Module(**settings), proximal(0.0), bound=bound, algorithm=clipping)
    assert (without_term - expected).abs().max() > 1e-3
    if clipping:
        assert (by_hand(Module(**settings), proximal(0.8)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_without_a_weight_it_is_fedavg_to_the_bit(tmp_path, execution):
    _, plain = train(tmp_path, execution=execution)
    _, zero = train(tmp_path, execution=execution, objective=FedProx(0))
    assert torch.equal(flat_params(plain), flat_params(zero))


def test_parameters_in_another_precision_than_the_global_ones_start_where_they_are():
    """The vector of global parameters is float32 at least, of bfloat16 ones too, and holds what they cannot."""
    from lightning_lbgm.clients.objective_turn import start_tensors
    from lightning_lbgm.core.flat import FlatParameters

    module = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    flat, server = FlatParameters(module), torch.tensor([1.001, -0.3])
    flat.write(server)
    (start,) = start_tensors(flat, server)
    assert torch.equal(start, module.weight)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_reported_loss_is_the_modules_own(tmp_path, execution):
    class Loss(Module):
        def training_step(self, batch, batch_idx):
            return 3.0 + 0.0 * self.loss(batch)

    recorder = Recorder()
    train(tmp_path, Loss(), execution=execution, objective=FedProx(50.0), trainer={"callbacks": [recorder]})
    assert [c.loss for c in recorder.reports[-1].clients] == [3.0] * CLIENTS


class SharedGradients(Module):
    """Parameters that autograd gives one gradient tensor, an expanded one, or none."""

    def __init__(self):
        super().__init__(weight_decay=0.1)
        self.first, self.second = nn.Parameter(torch.zeros(3).double()), nn.Parameter(torch.ones(3).double())
        self.summed = nn.Parameter(torch.ones(4).double())
        self.unused = nn.Parameter(torch.ones(2).double())

    def forward(self, x):
        return self.net(x) + (self.first + self.second)

    def loss(self, batch):
        return super().loss(batch) + 0.1 * self.summed.sum()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_that_share_memory_or_are_missing_are_corrected_each_by_itself(tmp_path, execution):
    expected = by_hand(SharedGradients(), proximal(2.0))
    _, module = train(tmp_path, SharedGradients(), execution=execution, objective=FedProx(2.0))
    torch.testing.assert_close(flat_params(module), expected, rtol=0, atol=1e-12)


def test_sparse_gradients_are_refused_in_words(tmp_path):
    class Sparse(Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 3, sparse=True).double()

        def loss(self, batch):
            return nn.functional.cross_entropy(self(batch[0]) + self.table(batch[1]), batch[1])

    with pytest.raises(RuntimeError, match=r"dense gradients.*sparse=False"):
        train(tmp_path, Sparse(), objective=FedProx(1.0), execution="sequential")


# Hooks, precision and closures


class Hooked(Module):
    """Sees the gradients just before they are clipped."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(torch.cat([p.grad.reshape(-1) for p in self.parameters()]).clone())


def test_a_module_with_step_hooks_trains_the_same_and_sees_corrected_gradients(tmp_path):
    settings = {"execution": "sequential", "objective": FedProx(0.8), "trainer": {"gradient_clip_val": 0.3}}
    _, plain = train(tmp_path, Module(), **settings)
    _, hooked = train(tmp_path, Hooked(), **settings)
    assert torch.equal(flat_params(plain), flat_params(hooked))
    plain = Hooked()
    train(tmp_path, plain, **{**settings, "objective": None})
    assert torch.equal(hooked.seen[0], plain.seen[0])  # no way from the start yet
    assert not torch.equal(hooked.seen[1], plain.seen[1])
    assert max(float(gradient.norm()) for gradient in hooked.seen) > 0.3  # not clipped yet


def mixed_loop(module, mu, dtype, bound):
    """One client's local steps in mixed precision, with the term in the loss."""
    parameters = list(module.parameters())
    start = [p.detach().clone() for p in parameters]
    optimizer = module.configure_optimizers()
    for _ in range(EPOCHS):
        for x, y in make_loaders()[0]:
            with torch.autocast("cpu", dtype, cache_enabled=False):
                loss = module.loss((x.float(), y))
            optimizer.zero_grad()
            (loss + proximal(mu)(parameters, start)).backward()
            nn.utils.clip_grad_norm_(parameters, bound)
            optimizer.step()
    return flat_params(module)


class Single(Module):
    def __init__(self):
        super().__init__()
        self.float()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float(), batch[1]


def mixed_precision(kind, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if kind == "16-mixed" else None
    return MixedPrecision(kind, "cpu", scaler)


@pytest.mark.parametrize(
    ("kind", "dtype", "scale"),
    [("bf16-mixed", torch.bfloat16, None), ("16-mixed", torch.half, 2.0**10), ("16-mixed", torch.half, 1000.0)],
)
def test_the_term_is_not_scaled_with_the_loss_in_mixed_precision(tmp_path, kind, dtype, scale):
    expected = mixed_loop(Single(), 0.8, dtype, bound=0.3)
    _, module = train(
        tmp_path,
        Single(),
        num_clients=1,
        rounds=1,
        objective=FedProx(0.8),
        trainer={"plugins": [mixed_precision(kind, scale)], "gradient_clip_val": 0.3},
    )
    tolerance = 1e-6 if kind == "bf16-mixed" else 1e-4  # a scaled loss rounds otherwise in half precision
    torch.testing.assert_close(flat_params(module), expected, rtol=0, atol=tolerance)
    assert (mixed_loop(Single(), 0.0, dtype, bound=0.3) - expected).abs().max() > 1e-3


class Counting(LocalObjective):
    """Counts its calls, in Python and in the state, and keeps the sum of the gradients."""

    def __init__(self):
        self.calls = []

    def init(self, start):
        return {"calls": 0, "sum": [torch.zeros_like(s) for s in start]}

    def correct(self, gradients, parameters, start, state):
        self.calls.append([g.clone() for g in gradients])
        state["calls"] += 1
        torch._foreach_add_(state["sum"], gradients)


def test_a_step_whose_gradients_overflow_is_no_step_for_the_objective(tmp_path):
    objective = Counting()
    trainer, _ = train(
        tmp_path,
        Single(),
        num_clients=1,
        rounds=1,
        objective=objective,
        trainer={"plugins": [mixed_precision("16-mixed", 2.0**20)]},
    )
    state = trainer.strategy._federation.clients[0]["objective"]
    assert 0 < state["calls"] < 2 * EPOCHS  # the scaler halves the scale after each step that overflows
    assert len(objective.calls) == state["calls"]
    assert all(bool(total.isfinite().all()) for total in state["sum"])


def test_lbfgs_gets_corrected_gradients_at_each_call_of_its_closure(tmp_path):
    settings = {"optimizer": torch.optim.LBFGS, "lr": 0.1, "max_iter": 3}
    expected = by_hand(Module(**settings), proximal(0.8))
    _, module = train(tmp_path, Module(**settings), objective=FedProx(0.8))
    torch.testing.assert_close(flat_params(module), expected, rtol=0, atol=1e-12)
    objective = Counting()
    train(tmp_path, Module(**settings), objective=objective, rounds=1)
    assert len(objective.calls) == CLIENTS * 2 * EPOCHS * 3


def test_an_optimizer_that_compares_losses_is_refused(tmp_path):
    module = Module(optimizer=torch.optim.LBFGS, line_search_fn="strong_wolfe")
    with pytest.raises(MisconfigurationException, match=r"line_search_fn='strong_wolfe'.*compares losses"):
        train(tmp_path, module, objective=FedProx(0.8))


# State


class Variate(LocalObjective):
    """A control variate of each client, as in SCAFFOLD but without the server's: what its last turn drifted by."""

    def init(self, start):
        return {"control": [torch.zeros_like(s) for s in start], "rounds": 0}

    def correct(self, gradients, parameters, start, state):
        torch._foreach_sub_(gradients, state["control"], alpha=0.5)

    def end_turn(self, parameters, start, state, num_steps):
        state["control"] = [c + (s - p) / (num_steps * LR) for c, s, p in zip(state["control"], start, parameters)]
        state["rounds"] += 1


class Counted(Variate):
    """The same with the count as a tensor, so that clients with different counts are trained at once."""

    def init(self, start):
        return {**super().init(start), "rounds": torch.zeros(())}


def variates_by_hand(cohorts):
    """Train by hand with one variate a client; return the global parameters and the variates."""
    module = Module()
    parameters, loaders = list(module.parameters()), make_loaders()
    controls = {}
    for cohort in cohorts:
        start = [p.detach().clone() for p in parameters]
        mean = [torch.zeros_like(p) for p in start]
        for client in cohort:
            with torch.no_grad():
                for p, s in zip(parameters, start):
                    p.copy_(s)
            control = controls.get(client, [torch.zeros_like(s) for s in start])
            for _ in range(EPOCHS):
                for batch in loaders[client]:
                    gradients = torch.autograd.grad(module.loss(batch), parameters)
                    with torch.no_grad():
                        for p, g, c in zip(parameters, gradients, control):
                            p -= LR * (g - 0.5 * c)
            controls[client] = [c + (s - p.detach()) / (4 * LR) for c, s, p in zip(control, start, parameters)]
            for m, p in zip(mean, parameters):
                m.add_(p.detach(), alpha=1 / len(cohort))
        with torch.no_grad():
            for p, m in zip(parameters, mean):
                p.copy_(m)
    return flat_params(module), controls


@pytest.mark.parametrize("clients_per_round", [None, 3])
@pytest.mark.parametrize("execution", ["sequential", "vectorized", "auto"])
def test_each_client_has_a_state_of_its_own(tmp_path, execution, clients_per_round):
    # With three of four clients a round, some have had more turns than others, and are in chunks of their own.
    recorder = Recorder()
    trainer, module = train(
        tmp_path,
        execution=execution,
        clients_per_round=clients_per_round,
        objective=Variate(),
        trainer={"callbacks": [recorder]},
    )
    cohorts = [[c.client_id for c in report.clients] for report in recorder.reports]
    expected, controls = variates_by_hand(cohorts)
    torch.testing.assert_close(flat_params(module), expected, rtol=0, atol=1e-12)
    states = trainer.strategy._federation.clients
    for client, control in controls.items():
        # The comparison with clients trained alone has not advanced it a second time.
        assert states[client]["objective"]["rounds"] == sum(client in cohort for cohort in cohorts)
        for ours, theirs in zip(states[client]["objective"]["control"], control):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("objective", [None, FedProx(0.1)])
def test_without_a_state_clients_keep_what_they_kept_before(tmp_path, objective):
    trainer, _ = train(tmp_path, objective=objective, uplink=[LookBack(0.5)])
    assert [list(state) for state in trainer.strategy._federation.clients.values()] == [["uplink"]] * CLIENTS


def checkpointed(root, **settings):
    callback = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = {"callbacks": [callback], "enable_checkpointing": True}
    return train(root, trainer=trainer, rounds=4, uplink=[LookBack(0.5)], clients_per_round=3, **settings)


def assert_same_states(one, two):
    assert one.keys() == two.keys()
    for client in one:
        ours, theirs = one[client]["objective"], two[client]["objective"]
        assert ours["rounds"] == theirs["rounds"]
        assert all(map(torch.equal, ours["control"], theirs["control"]))


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_resuming_goes_on_with_the_states_to_the_bit(tmp_path, execution, store):
    where = "memory" if store == "memory" else str(tmp_path / "store")
    settings = {"execution": execution, "objective": Counted(), "clients_per_round": 3}
    whole, module = checkpointed(tmp_path / "whole", **{k: v for k, v in settings.items() if k != "clients_per_round"})
    trainer, resumed = train(
        tmp_path / "rest",
        ckpt_path=tmp_path / "whole" / "step=2.ckpt",
        rounds=4,
        uplink=[LookBack(0.5, store=where)],
        **settings,
    )
    assert torch.equal(flat_params(resumed), flat_params(module))
    assert_same_states(dict(trainer.strategy._federation.clients), dict(whole.strategy._federation.clients))
    saved = torch.load(tmp_path / "whole" / "step=2.ckpt", weights_only=True)["lightning_lbgm"]
    assert all(set(state) == {"uplink", "objective"} for state in saved["clients"].values())


class Breaking(Module):
    """Breaks off in the third round, after ``breaks_at`` local steps."""

    breaks_at = None

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2 and self.breaks_at is not None:
            self.breaks_at -= 1
            if self.breaks_at < 0:
                raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


class InPlace(Variate):
    """The same variate, changed in place."""

    def end_turn(self, parameters, start, state, num_steps):
        for c, s, p in zip(state["control"], start, parameters):
            c += (s - p) / (num_steps * LR)
        state["rounds"] += 1


class BreakAfterClients(pl.Callback):
    """Breaks the third round off once its clients are trained."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.index == 2:
            raise RuntimeError("boom")


@pytest.mark.parametrize("objective", [Variate(), InPlace()], ids=["replaced", "in place"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_round_that_breaks_off_leaves_the_states_as_they_were(tmp_path, execution, objective):
    two, _ = train(tmp_path, execution=execution, objective=objective, rounds=2)
    expected = dict(two.strategy._federation.clients)
    module = Breaking()
    if execution == "sequential":
        module.breaks_at = 4 * (CLIENTS - 1)
    callbacks = [BreakAfterClients()] if execution == "vectorized" else []
    settings = {"num_clients": None, "local_epochs": EPOCHS, "uplink": [], "seed": 0, "vectorized_chunk": 3}
    strategy = LBGMFederated(execution=execution, objective=objective, **settings)
    trainer = build_trainer(tmp_path, strategy, max_epochs=3, callbacks=callbacks)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, make_loaders())
    assert_same_states(dict(trainer.strategy._federation.clients), expected)


def test_a_rejected_client_keeps_its_state(tmp_path):
    class Overflowing(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            first = bool((batch[0][0] == make_loaders()[1].dataset.tensors[0][0]).all())
            return loss * float("inf") if first and self.trainer.global_step == 1 else loss

    recorder = Recorder()
    trainer, _ = train(
        tmp_path,
        Overflowing(),
        execution="sequential",
        objective=Variate(),
        rounds=2,
        trainer={"callbacks": [recorder]},
    )
    assert [c.rejected for c in recorder.reports[1].clients] == [False, True, False, False]
    states = trainer.strategy._federation.clients
    assert [states[client]["objective"]["rounds"] for client in range(CLIENTS)] == [2, 1, 2, 2]
    assert all(bool(control.isfinite().all()) for control in states[1]["objective"]["control"])


# What vectorised training looks at


class MixesClients(LocalObjective):
    """Divides by a norm over all clients of a chunk, by mistake."""

    def correct(self, gradients, parameters, start, state):
        for gradient in gradients:
            gradient /= 1 + gradient.norm()


class KeepsMixture(LocalObjective):
    """Leaves the gradients alone, but keeps what is not the client's own."""

    def init(self, start):
        return {"norm": torch.zeros(())}

    def correct(self, gradients, parameters, start, state):
        state["norm"] = state["norm"] + gradients[0].norm()


class KeepsNoDimension(KeepsMixture):
    def correct(self, gradients, parameters, start, state):
        state["norm"] = gradients[0].norm()


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (MixesClients(), "comes out different: the update of"),
        (KeepsMixture(), "comes out different: the local objective's 'norm' differs"),
        (KeepsNoDimension(), "keeps a tensor 'norm' of the shape"),
    ],
)
def test_an_objective_that_mixes_clients_is_not_vectorised(tmp_path, objective, reason):
    with pytest.raises(MisconfigurationException, match=reason):
        train(tmp_path, execution="vectorized", objective=objective)
    one, alone = train(tmp_path, execution="sequential", objective=objective)
    auto, module = train(tmp_path, execution="auto", objective=objective)
    assert torch.equal(flat_params(module), flat_params(alone))
    assert repr(auto.strategy._federation.clients) == repr(one.strategy._federation.clients)


class KeepsTuple(LocalObjective):
    def init(self, start):
        return {"moments": (0.0, 1.0)}

    def correct(self, gradients, parameters, start, state):
        pass


class Returns(LocalObjective):
    def correct(self, gradients, parameters, start, state):
        return [gradient + 1 for gradient in gradients]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("objective", "reason"), [(KeepsTuple(), "got a tuple"), (Returns(), "in place and return")])
def test_a_mistake_in_an_objective_is_an_error_in_words(tmp_path, execution, objective, reason):
    with pytest.raises((TypeError, MisconfigurationException), match=reason):
        train(tmp_path, execution=execution, objective=objective)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_replacing_items_of_the_list_counts_as_in_place(tmp_path, execution):
    class Replaces(LocalObjective):
        def correct(self, gradients, parameters, start, state):
            gradients[:] = [g + 0.8 * (p - s) for g, p, s in zip(gradients, parameters, start)]

    _, expected = train(tmp_path, execution=execution, objective=FedProx(0.8))
    _, module = train(tmp_path, execution=execution, objective=Replaces())
    torch.testing.assert_close(flat_params(module), flat_params(expected), rtol=0, atol=1e-12)


# The setting


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, r"`objective` must be a `LocalObjective`.*got 0.1"),
        (FedProx, r"FedProx is a class: write FedProx\(mu=0.1\)"),
        ([FedProx(0.1)], "`objective` must be a `LocalObjective`"),
    ],
)
def test_anything_else_than_an_objective_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        LBGMFederated(num_clients=4, objective=value)


def test_the_weight_belongs_to_fedprox():
    with pytest.raises(TypeError, match=r"Use `objective=FedProx\(mu=...\)`"):
        LBGMFederated(num_clients=4, mu=0.1)


@pytest.mark.parametrize(("mu", "error"), [("0.1", TypeError), (True, TypeError), (-0.1, ValueError)])
@pytest.mark.parametrize("extra", [float("nan"), float("inf")])
def test_the_weight_is_a_finite_number_of_at_least_zero(mu, error, extra):
    with pytest.raises(error, match=r"`FedProx\(mu=...\)`"):
        FedProx(mu)
    with pytest.raises(ValueError, match=r"`FedProx\(mu=...\)`"):
        FedProx(extra)


def test_an_objective_of_ones_own_is_shown_as_its_constructor_call():
    class Own(LocalObjective):
        def __init__(self, rate, hidden=3):
            self.rate = rate

        def correct(self, gradients, parameters, start, state):
            pass

    assert repr(Own(0.5)) == "Own(rate=0.5)"
    assert repr(Variate()) == "Variate()"


def test_it_is_among_the_settings_if_there_is_one(tmp_path):
    trainer, _ = train(tmp_path, objective=FedProx(0.1), rounds=1)
    assert trainer.strategy.settings()["objective"] == "FedProx(mu=0.1)"
    trainer, _ = train(tmp_path, rounds=1)
    assert "objective" not in trainer.strategy.settings()
    assert "objective" not in trainer.strategy.session.identity  # nor in a checkpoint, which is as it was


def test_a_checkpoints_objective_is_compared(tmp_path):
    checkpointed(tmp_path, objective=FedProx(0.1))
    resume = functools.partial(
        train, tmp_path, ckpt_path=tmp_path / "step=2.ckpt", uplink=[LookBack(0.5)], clients_per_round=3
    )
    with pytest.raises(
        MisconfigurationException, match=r"`objective=FedProx\(mu=0.1\)`.*`objective=FedProx\(mu=0.2\)`"
    ):
        resume(objective=FedProx(0.2))
    with pytest.raises(MisconfigurationException, match=r"`objective=FedProx\(mu=0.1\)`.*`objective=None`"):
        resume()
    trainer, _ = resume(objective=FedProx(0.1))
    assert trainer.global_step == 3


def test_a_checkpoint_without_an_objective_can_go_on_with_one(tmp_path):
    checkpointed(tmp_path)
    trainer, _ = train(
        tmp_path,
        ckpt_path=tmp_path / "step=2.ckpt",
        uplink=[LookBack(0.5)],
        clients_per_round=3,
        objective=Variate(),
    )
    turns = [c["objective"]["rounds"] for c in trainer.strategy._federation.clients.values() if "objective" in c]
    assert turns == [1, 1, 1]
