"""Base of the callbacks: the protocol of a federated strategy, and checks that a Trainer has one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lbgm._compat.twin import is_a
from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.reports.reports import ClientReport, RoundReport

__all__ = [
    "FederatedCallback",
    "FederatedStrategy",
    "check_centralized",
    "check_federated",
    "held_out_share",
    "strategy_of",
]


@runtime_checkable
class FederatedStrategy(Protocol):
    """What callbacks ask of the strategy.

    Attributes:
        uplink: The stages.
        last_report: Of the last round; None before the first.
        measure_errors: Set by a callback's ``setup`` if the error of compression is to be measured in this fit.
    """

    uplink: Chain
    last_report: RoundReport | None
    measure_errors: bool

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings as plain values, for loggers."""


def strategy_of(trainer: pl.Trainer) -> FederatedStrategy:
    """Return a Trainer's strategy, which ``check_federated`` has seen."""
    strategy: Any = trainer.strategy
    assert isinstance(strategy, FederatedStrategy)
    return strategy


class FederatedCallback(Callback):
    """A callback of a federation: refuses a Trainer that has none, and sees each client's report.

    Examples:
        >>> class WorstLoss(FederatedCallback):
        ...     def on_client_end(self, trainer, pl_module, report):
        ...         report.metrics["loss_squared"] = report.loss**2

    Attributes:
        held_out: Share of each client's training examples that it does not train with, set by a subclass that evaluates
            clients on them; None: all are for training.
    """

    held_out: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a federation. Call it if you override it."""
        check_federated(self, trainer)

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: ClientReport) -> None:
        """Called when a client of the round at hand has sent its update, in the process that trained it.

        Args:
            trainer: The Trainer.
            pl_module: The module. It holds some client's parameters, or the global ones: clients may be vectorised.
            report: The client's. ``report.metrics`` may be added to: numbers by name, which go to the table of clients,
                and their mean over the cohort to the loggers as ``client/<name>``.
        """

    def on_client_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        """Called after each client with the number of clients done, estimated over all processes, and the cohort's."""


def held_out_share(trainer: pl.Trainer) -> float | None:
    """Return the share of the clients' examples that callbacks want held out, or None.

    Raises:
        MisconfigurationException: If they want different shares.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    shares = {c.held_out for c in callbacks if isinstance(c, FederatedCallback) and c.held_out is not None}
    if len(shares) > 1:
        raise MisconfigurationException(
            f"Callbacks want different shares of the clients' examples held out, {sorted(shares)}: use the same."
        )
    return shares.pop() if shares else None


def check_federated(callback: Callback, trainer: pl.Trainer) -> None:
    """Refuse a callback of a federation in a Trainer that has none."""
    if not isinstance(trainer.strategy, FederatedStrategy):
        raise MisconfigurationException(
            f"`{type(callback).__name__}` reports on a federation, but the Trainer's strategy is"
            f" {type(trainer.strategy).__name__}. Use `Trainer(strategy=LBGMFederated(...))`, or drop the callback."
        )


def check_centralized(trainer: pl.Trainer) -> None:
    """Refuse a federation, and strategies that shard gradients, to ``GradientSpaceCallback``."""
    if isinstance(trainer.strategy, FederatedStrategy):
        raise MisconfigurationException(
            "`GradientSpaceCallback` analyses the gradients of centralized training, and in a federation there are"
            " only the clients' own. Use it without `strategy=LBGMFederated(...)`; there `LBGMCallback` draws the"
            " LBP errors of each client."
        )
    if is_a(trainer.strategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"`GradientSpaceCallback` needs whole gradients, but {type(trainer.strategy).__name__} shards them. Use"
            " `Trainer(strategy='ddp')` or one device, or drop the callback."
        )
