"""Server's fit: Lightning's ``Trainer`` as the user wants it, with rounds for training batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_lbgm.flower.engine import make_trainer
from lightning_lbgm.flower.result import without_training
from lightning_lbgm.flower.server import ServerStrategy

__all__ = ["fit"]


def fit(
    strategy: ServerStrategy,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    arguments: dict[str, Any],
    num_rounds: int,
    path: Path | None,
    first: Sequence[pl.Callback],
    last: Sequence[pl.Callback],
) -> None:
    """Fit a server's module.

    Args:
        strategy: Lightning's strategy of the server.
        module: The module.
        datamodule: Data for validation. None: no validation.
        arguments: Of the Trainer, as the user gave them.
        num_rounds: Rounds in all.
        path: The checkpoint to go on from. None: none.
        first: Callbacks before those of the user.
        last: Callbacks after those of the user.
    """
    fixed: dict[str, Any] = {
        "strategy": strategy,
        "max_epochs": math.ceil(num_rounds / strategy.rounds_per_epoch),
        "max_steps": num_rounds,
        "num_sanity_val_steps": 0,
    }
    why = "rounds are counted by `start(num_rounds=...)`."
    trainer = make_trainer(arguments, fixed, why, first=first, last=last)
    trainer.fit(module, datamodule=without_training(datamodule), ckpt_path=path)
