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
        self._of_rounds: set[str] | None = None  # names of what is logged in rounds, not in validation
        self._of_nodes: set[str] = set()  # of what nodes' scores come to
        self._evaluate = evaluate_fn

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluated(0, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._of_rounds is None:  # no validation was yet
            self._of_rounds = set(trainer.callback_metrics)
        wanted = self._of_rounds - self._of_nodes
        found = _metrics(trainer, wanted.__contains__)
        self.result.train_metrics_clientapp[trainer.global_step] = found
        self._evaluated(trainer.global_step, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        others = (self._of_rounds or set()) | self._of_nodes
        found = _metrics(trainer, lambda name: name not in others)
        self.result.evaluate_metrics_serverapp[trainer.global_step] = found

    def evaluated_on_nodes(self, server_round: int, metrics: dict[str, float]) -> None:
        """Take what nodes' scores of a round's model come to."""
        self._of_nodes |= metrics.keys()
        self.result.evaluate_metrics_clientapp[server_round] = MetricRecord(dict(metrics))

    def _evaluated(self, server_round: int, module: pl.LightningModule) -> None:
        if self._evaluate is None:
            return
        found = self._evaluate(server_round, ArrayRecord(module.state_dict()))
        if found is not None:
            self.result.evaluate_metrics_serverapp[server_round] = found


def _metrics(trainer: pl.Trainer, wanted: Callable[[str], bool]) -> MetricRecord:
    return MetricRecord({name: float(value) for name, value in trainer.callback_metrics.items() if wanted(name)})


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
