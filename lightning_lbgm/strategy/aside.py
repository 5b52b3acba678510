"""Work aside from training: what an evaluation of a client may change in a module and its Trainer is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_lbgm.core.rng import isolated_rng

__all__ = ["aside"]

_GROUPS = ("_groups", "_groups_checked", "_state_is_copy")


@contextmanager
def aside(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Keep random states, train and eval modes, gradients, the loss scale and the module's metrics as they were.

    Parameters and buffers are the business of ``client_model``. Metrics start afresh, and are computed in this process
    alone, because the processes evaluate different clients.
    """
    modes = [(part, part.training) for part in module.modules()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    precision = copy.deepcopy(trainer.precision_plugin.state_dict())
    stage = trainer.state.stage
    try:
        with isolated_rng(trainer.strategy.root_device), _fresh_metrics(module):
            yield
    finally:
        trainer.state.stage = stage
        trainer.precision_plugin.load_state_dict(precision)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training


@contextmanager
def _fresh_metrics(module: nn.Module) -> Iterator[None]:
    """Reset all metrics for a while.

    What they have accumulated is kept as the same objects, not as copies: metrics of a collection share theirs.
    """
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    collections = [part for part in module.modules() if isinstance(part, MetricCollection)]
    kept = [(metric, dict(vars(metric))) for metric in metrics]
    lists = [(value, list(value)) for _, state in kept for value in state.values() if isinstance(value, list)]
    groups = [(part, copy.deepcopy({name: vars(part)[name] for name in _GROUPS})) for part in collections]
    for metric in metrics:
        metric.distributed_available_fn = _alone
        metric.reset()
    for collection in collections:
        collection.reset()
    try:
        yield
    finally:
        for metric, state in kept:
            vars(metric).update(state)
        for value, content in lists:
            value[:] = content
        for collection, group in groups:
            vars(collection).update(group)


def _alone() -> bool:
    return False
