"""``PartitionReport``: who has which labels and how many examples, in figures and numbers at the start of a fit."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lbgm.callbacks.base import FederatedStrategy, strategy_of
from lightning_lbgm.callbacks.outputs import root_folder, writes_files
from lightning_lbgm.callbacks.run_outputs import outputs_of, show_metrics
from lightning_lbgm.callbacks.writing import WritingCallback
from lightning_lbgm.data.feed import Feed
from lightning_lbgm.data.heterogeneity import heterogeneity
from lightning_lbgm.data.label_table import LabelTable
from lightning_lbgm.figures.partition import draw_client_sizes, draw_label_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

__all__ = ["PartitionReport"]


class PartitionedStrategy(FederatedStrategy, Protocol):
    """What the report asks of the strategy, which documents it."""

    @property
    def feed(self) -> Feed:
        """The clients' training data."""

    @property
    def round_index(self) -> int:
        """The index of the round to come."""

    def label_table(self, labels: Any) -> LabelTable:
        """Return how many examples of each label each client has."""


class PartitionReport(WritingCallback):
    """Draw the partition before the first round, and log how much the clients differ.

    - ``figures/partition_labels.png``: a heat map of labels by clients, with the clients' sizes above. Of more than 100
      clients, 100 evenly spaced ones are drawn, sorted by their most frequent label; more than 64 labels are grouped.
    - ``figures/partition_sizes.png``: the clients' numbers of examples, as bars, or from 41 clients on as a histogram.
    - ``partition/...`` metrics, logged once: what ``lightning_lbgm.data.heterogeneity`` returns, such as
      ``partition/label_distance_mean`` and ``partition/size_cv``. docs/metrics.md has all of them.

    They go where ``LBGMCallback`` puts its metrics and figures. What is shown is what clients train with: examples that
    ``ClientEvaluation`` holds out are left out. A run that is resumed is not reported again, unless it goes on in
    another logger's run.

    Labels are read as a partitioner reads them, without loading examples. If they are not known (targets that are real
    numbers or images, an ``IterableDataset``, a loader whose examples have no index), sizes alone are drawn and logged,
    and a warning says why. The fit goes on.

    Args:
        labels: One label for each example of the training DataLoader's dataset, if neither the dataset nor the
            partitioner shows them, or others are to be drawn: a tensor, array, pandas Series, column of a Hugging Face
            dataset, or sequence of integers or strings.
        figures: Whether to draw the figures.

    Raises:
        MisconfigurationException: At fit start, if the Trainer's strategy is not ``LBGMFederated``.
        ValueError: Before the first round, if ``labels`` are given and are not one for each example.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import DirichletPartitioner, LBGMFederated, PartitionReport
        >>> trainer = Trainer(
        ...     strategy=LBGMFederated(num_clients=20, partitioner=DirichletPartitioner(0.3)),
        ...     callbacks=[PartitionReport()],
        ...     accelerator="cpu",
        ...     logger=False,
        ... )
    """

    def __init__(self, labels: Any = None, figures: bool = True) -> None:
        self.labels = labels
        self.figures = figures
        self._metrics: dict[str, float] = {}
        self._reported: list[str] = []  # where to
        self._begun = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._metrics, self._reported = {}, []
        self._begun = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun or trainer.barebones:
            return
        self._begun = True
        if not self._metrics or set(_places(trainer)) - set(self._reported):
            self._report(trainer)
        show_metrics(trainer, pl_module, self._metrics)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"metrics": dict(self._metrics), "reported": list(self._reported)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._metrics, self._reported = dict(state_dict["metrics"]), list(state_dict["reported"])

    def _report(self, trainer: pl.Trainer) -> None:
        strategy = _partitioned_strategy_of(trainer)
        feed, table = strategy.feed, strategy.label_table(self.labels)
        sizes = [feed.num_examples(client_id) for client_id in range(feed.num_clients)]
        found = heterogeneity(sizes, table.counts)
        self._metrics = {f"partition/{name}": value for name, value in found.items()}
        if table.counts is None:
            rank_zero_warn(
                f"`PartitionReport` shows the clients' sizes alone, because their labels are not known. {table.problem}"
            )
        outputs_of(trainer).log_metrics(trainer, self._metrics, strategy.round_index)
        if self.figures and writes_files(trainer):
            outputs_of(trainer).write_figures(trainer, _drawings(sizes, table, found))
        self._reported = sorted({*self._reported, *_places(trainer)})

    def _finish(self, trainer: pl.Trainer) -> None:
        outputs_of(trainer).finish()


def _drawings(sizes: list[int], table: LabelTable, found: dict[str, float]) -> dict[str, Callable[[], Figure]]:
    drawings: dict[str, Callable[[], Figure]] = {"partition_sizes.png": partial(draw_client_sizes, sizes, found)}
    if table.counts is not None:
        drawings["partition_labels.png"] = partial(draw_label_map, table.counts, table.labels, found)
    return drawings


def _places(trainer: pl.Trainer) -> list[str]:
    """Return the runs that a report of this fit goes to."""
    if not writes_files(trainer):
        return []
    if not trainer.loggers:
        return [str(root_folder(trainer))]
    return [f"{type(logger).__name__} {logger.name} {logger.version}" for logger in trainer.loggers]


def _partitioned_strategy_of(trainer: pl.Trainer) -> PartitionedStrategy:
    strategy: Any = strategy_of(trainer)
    return strategy
