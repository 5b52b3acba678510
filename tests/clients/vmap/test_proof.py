"""Clients are trained at once only if that was proven right; else one line says why, and nothing is left behind."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import LBGMFederated


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Module(TinyModule):
    """An MLP whose step may do more than a step should, in ``extra``."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(net=mlp())
        self.prepare()

    def prepare(self):
        pass

    def extra(self, loss, batch):
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.extra(self.loss(batch), batch)
        self.log("train/loss", loss)
        return loss


def train(root, module, execution, caplog=None, dataset=None, rounds=3, callbacks=(), **strategy):
    strategy = LBGMFederated(**{"num_clients": 6, "execution": execution, "uplink": [], "seed": 0, **strategy})
    trainer = build_trainer(root, strategy, max_epochs=rounds, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(dataset or make_data(), batch_size=5))
    return trainer


def assert_right(root, make, caplog, reason=None, **settings):
    """Compare the default execution with clients trained one after the other; return both modules."""
    modules = []
    for execution in ("sequential", "auto"):
        with caplog.at_level(logging.INFO):
            caplog.clear()
            module = make()
            trainer = train(root, module, execution, **settings)
        modules.append((module, trainer.callback_metrics))
    (alone, alone_metrics), (auto, auto_metrics) = modules
    told = [r.getMessage() for r in caplog.records if "one after the other" in r.getMessage()]
    if reason is None:
        assert told == []
        assert "are trained at once" in caplog.text
        torch.testing.assert_close(flat_params(auto), flat_params(alone), rtol=1e-5, atol=1e-6)
    else:
        assert len(told) == 1
        assert reason in told[0]
        assert torch.equal(flat_params(auto), flat_params(alone))
        for (name, buffer), (_, other) in zip(auto.named_buffers(), alone.named_buffers()):
            assert torch.equal(buffer, other), name
        assert auto_metrics["train/loss"] == alone_metrics["train/loss"]
    return alone, auto


# Numbers


class Tokens(Module):
    """Tokens of which the last clients alone have padding, so that no other client's update could be wrong."""

    def prepare(self):
        self.net = nn.Embedding(10, 3, padding_idx=0)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]).mean(1), batch[1])


@pytest.mark.parametrize("padded", [range(60), range(55, 60), range(10, 13)], ids=["all", "last", "one"])
def test_padding(tmp_path, caplog, padded):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 10, (60, 5), generator=generator)
    tokens[list(padded), 3:] = 0
    data = TensorDataset(tokens, torch.randint(0, 3, (60,), generator=generator))
    assert_right(tmp_path, Tokens, caplog, "the update of 'net.weight' differs", dataset=data)


def test_functional_padding(tmp_path, caplog):
    class Functional(Tokens):
        def loss(self, batch):
            return F.cross_entropy(F.embedding(batch[0], self.net.weight, padding_idx=0).mean(1), batch[1])

    data = TensorDataset(torch.arange(120).reshape(60, 2) % 10, torch.arange(60) % 3)
    assert_right(tmp_path, Functional, caplog, "differs", dataset=data)


def test_a_step_that_is_right_at_first_is_found_out_later(tmp_path, caplog):
    class LateTokens(Tokens):
        def loss(self, batch):
            tokens = batch[0] if self.current_epoch >= 3 else batch[0].clamp(min=1)
            return F.cross_entropy(self.net(tokens).mean(1), batch[1])

    data = TensorDataset(torch.arange(120).reshape(60, 2) % 10, torch.arange(60) % 3)
    with pytest.warns(UserWarning, match="right in round 1 and are not any more.*'net.weight'"):
        train(tmp_path, LateTokens(), "auto", dataset=data, rounds=8)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.Adagrad, {"lr": 0.3, "initial_accumulator_value": 4.0}),
        (torch.optim.Adagrad, {"lr": 0.3, "lr_decay": 0.5}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5}),
    ],
)
def test_optimizers_start_as_they_were_made(tmp_path, caplog, optimizer, settings):
    class Optimized(Module):
        def configure_optimizers(self):
            return optimizer(self.parameters(), **settings)

    _, auto = assert_right(tmp_path, Optimized, caplog)

    # By hand: each client with an optimizer of its own, then the mean of equally many examples.
    reference = Optimized()
    data = make_data()
    partitions = auto.trainer.strategy.session.feed.partitions
    for _ in range(3):
        start = {name: p.detach().clone() for name, p in reference.named_parameters()}
        ends = []
        for partition in partitions:
            reference.load_state_dict(start)
            own = reference.configure_optimizers()
            for batch in partition.split(5):
                own.zero_grad()
                reference.loss((data.tensors[0][batch], data.tensors[1][batch])).backward()
                own.step()
            ends.append({name: p.detach().clone() for name, p in reference.named_parameters()})
        reference.load_state_dict({name: torch.stack([e[name] for e in ends]).mean(0) for name in start})
    torch.testing.assert_close(flat_params(auto), flat_params(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tensor", "module", "module pre", "accumulated", "global"])
def test_backward_hooks(tmp_path, caplog, kind):
    class Hooked(Module):
        def prepare(self):
            weight, layer = self.net[2].weight, self.net[2]
            if kind == "tensor":
                weight.register_hook(lambda gradient: gradient * 0)
            elif kind == "module":
                layer.register_full_backward_hook(lambda part, inputs, outputs: tuple(g * 0 for g in inputs))
            elif kind == "module pre":
                layer.register_full_backward_pre_hook(lambda part, outputs: tuple(g * 0 for g in outputs))
            elif kind == "accumulated":
                weight.register_post_accumulate_grad_hook(self.forget_gradient)

        @staticmethod
        def forget_gradient(parameter):
            parameter.grad.zero_()

    handle = None
    if kind == "global":
        handle = nn.modules.module.register_module_full_backward_hook(lambda part, inputs, outputs: None)
    try:
        assert_right(tmp_path, Hooked, caplog, "backward hooks")
    finally:
        if handle is not None:
            handle.remove()


def test_a_hook_that_comes_later(tmp_path, caplog):
    class LateHook(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[2].weight.register_hook(lambda gradient: gradient * 0)

    results = []
    for execution in ("sequential", "auto"):
        module = Module()
        with caplog.at_level(logging.INFO):
            train(tmp_path, module, execution, callbacks=[LateHook()])
        results.append(flat_params(module))
    assert "at once" in caplog.text
    assert "backward hooks" in caplog.text
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_forward_hooks_are_no_obstacle(tmp_path, caplog):
    class Hooked(Module):
        def prepare(self):
            self.net[0].register_forward_hook(lambda part, inputs, output: output * 2)

    assert_right(tmp_path, Hooked, caplog)


def test_a_layer_under_two_names(tmp_path, caplog):
    class Alias(Module):
        def prepare(self):
            self.head = self.net[2]

    modules = assert_right(tmp_path, Alias, caplog, "one after the other")
    assert all(type(p) is nn.Parameter for module in modules for p in module.parameters())
    assert modules[1].head.weight is modules[1].net[2].weight


def test_a_buffer_that_comes_later(tmp_path, caplog):
    class LateBuffer(Module):
        def prepare(self):
            self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.register_buffer("scale", torch.full((3,), 2.0))

        def extra(self, loss, batch):
            return loss * self.scale.sum() if hasattr(self, "scale") else loss

    alone, auto = assert_right(tmp_path, LateBuffer, caplog)
    torch.testing.assert_close(auto.net[1].running_mean, alone.net[1].running_mean)


# State

SEEN: list[float] = []
COUNTER = 0


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


@dataclasses.dataclass
class Meter:
    n: int = 0
    history: list[int] = dataclasses.field(default_factory=list)


class ClassMeter:
    total = 0


def counting(function):
    function.calls = 0
    return function


@counting
def helper():
    helper.calls += 1


def remember(loss, seen=[]):  # noqa: B006 (that is the point)
    seen.append(1)


class StateModule(Module):
    """Keeps state in the place that is named, and counts the steps there."""

    place = ""

    def prepare(self):
        self.outs = collections.defaultdict(list)
        self.nested = {"a": [collections.Counter()]}
        self.meter, self.slotted, self.queue = Meter(), Slotted(), collections.deque(maxlen=100)
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.hidden = [nn.Linear(1, 1)]
        ClassMeter.total = helper.calls = 0
        SEEN.clear()
        remember.__defaults__[0].clear()
        globals()["COUNTER"] = 0
        self.cell = self.make_closure()

    @staticmethod
    def make_closure():
        calls = 0

        def call():
            nonlocal calls
            calls += 1
            return calls

        return call

    def extra(self, loss, batch):
        global COUNTER
        place = self.place
        if place == "defaultdict":
            self.outs["train"].append(1)
        elif place == "nested":
            self.nested["a"][0]["n"] += 1
        elif place == "object":
            self.meter.n += 1
        elif place == "object's list":
            self.meter.history.append(1)
        elif place == "slots":
            self.slotted.n += 1
        elif place == "deque":
            self.queue.append(1)
        elif place == "tensor":
            self.tensor += 1
        elif place == "tensor's data":
            self.tensor.data.add_(1)
        elif place == "array":
            self.array += 1
        elif place == "hidden module":
            with torch.no_grad():
                self.hidden[0].weight.fill_(self.hidden[0].weight.item() + 1)
        elif place == "class":
            ClassMeter.total += 1
        elif place == "own class":
            type(self).steps = getattr(type(self), "steps", 0) + 1
        elif place == "global list":
            SEEN.append(1)
        elif place == "global number":
            COUNTER += 1
        elif place == "function's attribute":
            helper()
        elif place == "default argument":
            remember(loss)
        elif place == "closure":
            self.cell()
        return loss

    def count(self):
        """Steps counted in the place."""
        return {
            "defaultdict": lambda: len(self.outs["train"]),
            "nested": lambda: self.nested["a"][0]["n"],
            "object": lambda: self.meter.n,
            "object's list": lambda: len(self.meter.history),
            "slots": lambda: self.slotted.n,
            "deque": lambda: len(self.queue),
            "tensor": lambda: self.tensor[0].item(),
            "tensor's data": lambda: self.tensor[0].item(),
            "array": lambda: self.array[0],
            "hidden module": lambda: round(self.hidden[0].weight.item() - self.begin),
            "class": lambda: ClassMeter.total,
            "own class": lambda: type(self).steps,
            "global list": lambda: len(SEEN),
            "global number": lambda: COUNTER,
            "function's attribute": lambda: helper.calls,
            "default argument": lambda: len(remember.__defaults__[0]),
            "closure": lambda: self.cell() - 1,
        }[self.place]()


PLACES = [
    *("defaultdict", "nested", "object", "object's list", "slots", "deque", "tensor", "tensor's data", "array"),
    *("hidden module", "class", "own class", "global list", "global number", "function's attribute"),
    *("default argument", "closure"),
]


@pytest.mark.parametrize("place", PLACES)
def test_state_that_a_step_keeps_is_kept_once_for_each_step(tmp_path, caplog, place):
    class Keeping(StateModule):
        pass

    Keeping.place, Keeping.steps = place, 0
    module = Keeping()
    module.begin = module.hidden[0].weight.item()
    with caplog.at_level(logging.INFO):
        train(tmp_path, module, "auto", rounds=2)
    assert module.count() == 2 * 6 * 2  # rounds, clients, steps
    assert "keeps state in" in caplog.text


def test_a_read_of_state_is_no_obstacle(tmp_path, caplog):
    assert_right(tmp_path, StateModule, caplog)


class MadeAtEachAccess(collections.OrderedDict):
    """Holds classes, and gives a new object at each access, as libraries keep their activation functions."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


ACTIVATIONS = MadeAtEachAccess(tanh=nn.Tanh)


def test_a_container_that_makes_its_items_is_no_obstacle(tmp_path, caplog):
    class Activated(Module):
        def extra(self, loss, batch):
            return loss + ACTIVATIONS["tanh"](loss)

    assert_right(tmp_path, Activated, caplog)


def test_rounding_in_frozen_layers_is_no_difference(tmp_path, caplog):
    class Adapter(Module):
        """A linear layer after a frozen one whose terms nearly cancel, so that little is left of their digits."""

        def prepare(self):
            self.net = nn.Linear(6, 3)
            self.base, self.narrow = nn.Linear(6, 4096), nn.Linear(4096, 6)
            with torch.no_grad():
                self.base.weight[2048:], self.base.bias[2048:] = self.base.weight[:2048], self.base.bias[:2048]
                self.narrow.weight[:, 2048:] = -self.narrow.weight[:, :2048] * (1 + 3e-3 * torch.randn(6, 2048))
                self.narrow.weight *= 300
            self.base.requires_grad_(False)
            self.narrow.requires_grad_(False)

        def forward(self, x):
            inner, weight = self.base(x), self.narrow.weight
            if torch._C._functorch.is_batchedtensor(inner):  # sums in another order, as other kernels do
                inner, weight = inner.flip(-1), weight.flip(-1)
            return self.net(F.linear(inner, weight, self.narrow.bias))

    with caplog.at_level(logging.INFO):
        train(tmp_path, Adapter(), "vectorized")
    assert "are trained at once" in caplog.text


def test_a_step_that_keeps_state_only_later(tmp_path, caplog):
    class Late(StateModule):
        place = "object"

        def extra(self, loss, batch):
            return super().extra(loss, batch) if self.current_epoch >= 2 else loss

    module = Late()
    with caplog.at_level(logging.INFO):
        train(tmp_path, module, "auto", rounds=4)
    assert module.meter.n == 2 * 6 * 2
    assert "trained at once" in caplog.text
    assert "keeps state in 'meter.n'" in caplog.text


def test_an_iterator_cannot_be_watched(tmp_path, caplog):
    class Iterating(Module):
        def prepare(self):
            self.numbers = itertools.count()

        def extra(self, loss, batch):
            return loss * (1 + next(self.numbers))

    assert_right(tmp_path, Iterating, caplog, "'numbers' is an iterator")


class MomentumEncoder(Module):
    def prepare(self):
        self.encoder = mlp().requires_grad_(False)
        self.encoder.load_state_dict(self.net.state_dict())
        self.starts = None

    def extra(self, loss, batch):
        with torch.no_grad():
            for slow, fast in zip(self.encoder.parameters(), self.net.parameters()):
                slow.mul_(0.5).add_(fast, alpha=0.5)
        return loss + (self.encoder(batch[0]) - self.net(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_a_failed_attempt_puts_frozen_parameters_back(tmp_path, caplog):
    alone, auto = assert_right(tmp_path, MomentumEncoder, caplog, "one after the other")
    for one, two in zip(alone.encoder.parameters(), auto.encoder.parameters()):
        assert torch.equal(one, two)
        assert not torch.equal(one, MomentumEncoder().encoder.get_parameter("0.weight")) or one.ndim == 1


def test_a_step_that_writes_to_its_batch_writes_to_its_own(tmp_path, caplog):
    class Normalising(Module):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(0.5)
            return super().training_step(batch, batch_idx)

    assert_right(tmp_path, Normalising, caplog)


# Random numbers


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (lambda: float(np.random.beta(1, 1)), "draws from NumPy's generator"),
        (random.random, "draws from Python's generator"),
        (lambda: torch.rand(()), "draws random numbers"),
        (lambda: F.dropout(torch.ones(4), 0.5).mean(), "draws random numbers"),
    ],
    ids=["numpy", "python", "torch", "dropout"],
)
def test_random_numbers_are_each_steps_own(tmp_path, caplog, draw, reason):
    class Drawing(Module):
        def extra(self, loss, batch):
            return loss * draw()

    assert_right(tmp_path, Drawing, caplog, reason)


@pytest.mark.parametrize("kind", [torch.Generator, np.random.default_rng, random.Random])
def test_a_generator_of_the_modules_own(tmp_path, caplog, kind):
    class Owning(Module):
        def prepare(self):
            self.own = kind()
            if kind is torch.Generator:
                self.own.manual_seed(0)
            elif kind is random.Random:
                self.own.seed(0)
            else:
                self.own = kind(0)

        def extra(self, loss, batch):
            if kind is torch.Generator:
                return loss * torch.rand((), generator=self.own)
            return loss * self.own.random()

    assert_right(tmp_path, Owning, caplog, "one after the other")


@pytest.mark.parametrize("step", ["dropout", "padding", "rand_like"])
def test_vectorized_with_random_numbers_is_compared_all_the_same(tmp_path, step):
    class Drawing(Tokens):
        def loss(self, batch):
            hidden = self.net(batch[0].clamp(min=0 if step == "padding" else 1)).mean(1)
            noise = torch.rand_like(hidden) if step == "rand_like" else F.dropout(torch.ones_like(hidden), 0.5)
            return F.cross_entropy(hidden * noise, batch[1])

    data = TensorDataset(torch.arange(120).reshape(60, 2) % 10, torch.arange(60) % 3)
    if step == "padding":
        with pytest.raises(Exception, match="'net.weight' differs"):
            train(tmp_path, Drawing(), "vectorized", dataset=data)
    else:
        train(tmp_path, Drawing(), "vectorized", dataset=data)


def test_generators_are_as_without_the_comparison(tmp_path):
    states = []
    for execution in ("sequential", "auto"):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        train(tmp_path, Module(), execution)
        states.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))
    assert states[0][1:] == states[1][1:]
