from __future__ import annotations

import warnings

import pytest
import torch
from conftest import TinyModule
from torch import nn

from lightning_lbgm.clients import direct_step

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    (torch.optim.SGD, {"lr": torch.tensor(0.1)}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.01}),
]


def make_problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    net.unused = nn.Parameter(torch.ones(3))  # never gets a gradient
    return net, torch.randn(8, 5)


def train(step_of, optimizer_class, settings):
    net, x = make_problem()
    optimizer = optimizer_class(net.parameters(), **settings)
    step = step_of(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_it_does_what_step_does_to_the_bit(optimizer_class, settings):
    expected = train(lambda optimizer: optimizer.step, optimizer_class, settings)
    assert torch.equal(train(direct_step, optimizer_class, settings), expected)


def test_groups_keep_their_own_learning_rates_also_when_they_change():
    results = []
    for step_of in (lambda optimizer: optimizer.step, direct_step):
        net, x = make_problem()
        groups = [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        step = step_of(optimizer)
        for lr in (0.5, 0.25):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            net(x).square().sum().backward()
            step()
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_stands_around_a_step_is_kept():
    parameters = [nn.Parameter(torch.ones(2))]

    class Own(torch.optim.SGD):
        pass

    assert direct_step(Own(parameters, lr=0.1)) is None
    assert direct_step(torch.optim.LBFGS(parameters)) is None
    hooked = torch.optim.SGD(parameters, lr=0.1)
    handle = hooked.register_step_post_hook(lambda *args: None)
    assert direct_step(hooked) is None
    handle.remove()
    assert direct_step(hooked) is not None
    patched = torch.optim.SGD(parameters, lr=0.1)
    patched.step = lambda closure=None: None
    assert direct_step(patched) is None
    with torch.autograd.profiler.profile():
        assert direct_step(hooked) is None


def test_a_learning_rate_schedule_does_not_complain(fit):
    class Scheduled(TinyModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        trainer, _ = fit(module=Scheduled())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3 * 0.5**3)
