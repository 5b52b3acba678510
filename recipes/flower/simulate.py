"""The same federation in one process, by ``LBGMFederated``: what the app's rounds are compared with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_lbgm import LBGMFederated

sys.path.append(str(Path(__file__).parent))

from digits.server_app import Rounds
from digits.task import METHODS, PARTITIONER, make

__all__ = ["simulate"]


def simulate(
    method: str, rounds: int, partitions: int = 3, local_steps: int = 30, seed: int = 1, **config: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return each round's numbers, as the app's server collects them, and the final model."""
    defaults = {"data": "digits", "data-dir": "", "hidden": 64}
    module, data = make({**defaults, "partitions": partitions, "seed": seed, **config}, None)
    collected = Rounds()
    strategy = LBGMFederated(
        num_clients=partitions,
        partitioner=PARTITIONER,
        local_steps=local_steps,
        seed=seed,
        execution="sequential",
        **METHODS[method],
    )
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=rounds,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[collected],
        **dict.fromkeys(silent, False),  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data)
    return collected.numbers, module.state_dict()
