from __future__ import annotations

import warnings

import pytest
import torch
from conftest import TinyModule
from torch import nn

from lightning_lbgm.clients import direct_backward, direct_step

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_direct_backward_pass_gives_the_same_gradients(dtype):
    gradients = []
    for backward in (torch.Tensor.backward, direct_backward):
        net, x = make_problem()
        net.to(dtype)
        loss = net(x.to(dtype)).square().sum()
        loss.register_hook(lambda gradient: 2 * gradient)
        backward(loss)
        gradients.append([p.grad for p in net.parameters()])
        with pytest.raises(RuntimeError, match="second time"):
            backward(loss)  # the graph is gone
    expected, found = gradients
    assert expected[0] is found[0] is None  # the unused one
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(expected[1:], found[1:]))
    assert found[1].dtype == dtype


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.ones(()), "does not require grad"),
        (torch.ones(2, requires_grad=True) * 2, "only for scalar outputs"),
        (torch.ones((), dtype=torch.complex64, requires_grad=True) * 2, "only for real scalar outputs"),
    ],
)
def test_a_loss_that_cannot_be_derived_gets_the_error_of_torch(loss, message):
    with pytest.raises(RuntimeError, match=message):
        direct_backward(loss)


def test_whoever_watches_backward_passes_sees_them():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    weight = torch.ones(3, requires_grad=True)
    loss = weight.sum()
    with Watch():
        direct_backward(loss)
    assert torch.Tensor.backward in seen
    assert torch.equal(weight.grad, torch.ones(3))


def test_a_learning_rate_schedule_does_not_complain(fit):
    class Scheduled(TinyModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        trainer, _ = fit(module=Scheduled())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3 * 0.5**3)
