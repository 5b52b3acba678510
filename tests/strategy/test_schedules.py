"""Schedules that were counted in batches, and rounds whose learning rate is 0."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from conftest import TinyModule
from torch.optim import lr_scheduler

from lightning_lbgm import LBGMFederated


class Scheduled(TinyModule):
    def __init__(self, make, interval="step", frequency=1) -> None:
        super().__init__(lr=0.1)
        self.make, self.entry = make, {"interval": interval, "frequency": frequency}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make(optimizer), **self.entry}]


def linear(step, num_training_steps, num_warmup_steps):
    return min((step + 1) / num_warmup_steps, (num_training_steps - step) / num_training_steps)


def sequence(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 8)], milestones=[3])


LONG = {
    "T_max=1000": lambda o: lr_scheduler.CosineAnnealingLR(o, 1000),
    "total_steps=1000": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=1000),
    "step_size=50": lambda o: lr_scheduler.StepLR(o, 50),
    "total_iters=11": lambda o: lr_scheduler.PolynomialLR(o, total_iters=11),
    "T_max=11": sequence,
    "num_training_steps=80": lambda o: lr_scheduler.LambdaLR(
        o, functools.partial(linear, num_training_steps=80, num_warmup_steps=2)
    ),
}


@pytest.mark.parametrize(("setting", "make"), LONG.items(), ids=LONG)
def test_a_schedule_longer_than_the_run_is_warned_of(fit, setting, make):
    with pytest.warns(UserWarning, match=rf"interval='step'.*`{setting}`.*10 times in this run.*estimated_stepping"):
        fit(LBGMFederated(num_clients=2, rounds_per_epoch=2), module=Scheduled(make), max_epochs=5)


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 10), {}),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10), {}),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 1000), {"interval": "epoch"}),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 5), {"frequency": 2}),
        (lambda o: lr_scheduler.ExponentialLR(o, 0.9), {}),
    ],
)
def test_a_schedule_that_fits_is_not_warned_of(fit, make, entry):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(interval='step'|learning rate is 0)")
        fit(LBGMFederated(num_clients=2, rounds_per_epoch=2), module=Scheduled(make, **entry), max_epochs=5)


def test_a_run_without_end_is_not_warned_of(fit):
    module = Scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 1000))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*interval='step'")
        fit(LBGMFederated(num_clients=2), module=module, max_epochs=-1, max_time={"seconds": 0})


def test_rounds_with_learning_rate_zero_are_warned_of_once(fit):
    module = Scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda step: max(0, step - 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(LBGMFederated(num_clients=2), module=module, max_epochs=4)
    found = [str(w.message) for w in caught if "learning rate is 0" in str(w.message)]
    assert len(found) == 1
    assert found[0].startswith("Round 0: the client optimizer's learning rate is 0")
    assert "(step + 1) / warmup_steps" in found[0]


def test_a_frozen_group_beside_others_is_not_warned_of(fit):
    class Groups(TinyModule):
        def configure_optimizers(self):
            groups = [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.0}]
            return torch.optim.SGD(groups, lr=0.1)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate is 0")
        fit(module=Groups(), max_epochs=1)
