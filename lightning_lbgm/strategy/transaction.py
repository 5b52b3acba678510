"""Transaction of a round: Trainer and module state besides parameters, to take a broken round back."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics import Metric

from lightning_lbgm._compat.lightning import completed_batches, round_counters

__all__ = ["RoundTransaction"]


class RoundTransaction:
    """Remember a Trainer before a round: loop counters, schedules, hyperparameters, the module's metrics.

    Args:
        trainer: The trainer, about to start the round.
        module: Its module.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._completed = completed_batches(trainer)
        self._counters = [(counter, dict(vars(counter))) for counter in round_counters(trainer)]
        for _, values in self._counters:
            if "is_last_batch" in values:  # told of the round to come already; no round before it in its epoch was
                values["is_last_batch"] = False
        self._schedules = [
            (config.scheduler, copy.deepcopy(config.scheduler.state_dict())) for config in trainer.lr_scheduler_configs
        ]
        self._groups = [
            (group, {name: _copy(value) for name, value in group.items() if name != "params"})
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        self._metrics = [(metric, _metric_state(metric)) for metric in module.modules() if isinstance(metric, Metric)]

    @property
    def is_open(self) -> bool:
        """Whether Lightning has not counted the round as completed."""
        return completed_batches(self._trainer) == self._completed

    def undo(self) -> None:
        """Put everything back."""
        for counter, values in self._counters:
            vars(counter).update(values)
        for scheduler, state in self._schedules:
            scheduler.load_state_dict(state)
        for group, values in self._groups:
            group.update(values)
        for metric, state in self._metrics:
            vars(metric).update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: _copy(vars(metric)[name]) for name in names if name in vars(metric)}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
