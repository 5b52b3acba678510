"""A quiet fit of a federation that keeps its accuracies and reports, for benchmarks of what methods come to."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_lbgm import LBGMFederated

__all__ = ["Watch", "watched_fit"]


class Watch(pl.Callback):
    """Keep ``val/acc`` of each validation, and the report of each round."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self.reports: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.reports.append(trainer.strategy.last_report)  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracies.append(float(trainer.callback_metrics["val/acc"]))


def watched_fit(
    strategy: LBGMFederated, module: pl.LightningModule, rounds: int, every: int = 1, **data: Any
) -> tuple[Watch, dict[str, Any]]:
    """Train on one thread of the CPU, validate at every so many rounds, and show nothing.

    Args:
        strategy: The federation.
        module: What is trained; it logs ``val/acc``.
        rounds: Rounds.
        every: Rounds from one validation to the next.
        **data: Of ``Trainer.fit``.

    Returns:
        What was seen, and the last value of each metric.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    watch = Watch()
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=rounds,
        check_val_every_n_epoch=min(every, rounds),
        accelerator="cpu",
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, **data)
    return watch, dict(trainer.callback_metrics)
