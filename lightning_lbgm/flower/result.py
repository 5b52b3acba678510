"""Result of a run as Flower has it, and the datamodule of a server, which has no training data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result
from typing_extensions import override

__all__ = ["Recorder", "without_training"]


class Recorder(pl.Callback):
    """Collects what Flower calls the result.

    Args:
        evaluate_fn: Called with a round and the global model.

    Attributes:
        result: The metrics of each round.
    """

    def __init__(self, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None) -> None:
        self.result = Result()
        self._evaluate = evaluate_fn

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluated(0, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.result.train_metrics_clientapp[trainer.global_step] = _metrics(trainer)
        self._evaluated(trainer.global_step, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = self.result.train_metrics_clientapp.get(trainer.global_step, MetricRecord())
        fresh = {name: value for name, value in _metrics(trainer).items() if known.get(name) != value}
        self.result.evaluate_metrics_serverapp[trainer.global_step] = MetricRecord(fresh)

    def _evaluated(self, server_round: int, module: pl.LightningModule) -> None:
        if self._evaluate is None:
            return
        found = self._evaluate(server_round, ArrayRecord(module.state_dict()))
        if found is not None:
            self.result.evaluate_metrics_serverapp[server_round] = found


def _metrics(trainer: pl.Trainer) -> MetricRecord:
    return MetricRecord({name: float(value) for name, value in trainer.callback_metrics.items()})


class _NoTraining:
    """Gives a datamodule training data that is never looked at."""

    def train_dataloader(self) -> list[int]:
        """Return what stands for the nodes' data."""
        return [0]


def without_training(datamodule: pl.LightningDataModule | None) -> pl.LightningDataModule:
    """Return a datamodule with the given one's validation data and no training data."""
    if datamodule is None:
        datamodule = pl.LightningDataModule()
    kind = type(datamodule)
    copied = copy.copy(datamodule)
    copied.__class__ = type(kind.__name__, (_NoTraining, kind), {})
    return copied
