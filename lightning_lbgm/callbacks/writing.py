"""Outputs of a federation's callback: written when a fit ends, also by an error."""

from __future__ import annotations

from abc import abstractmethod

import lightning.pytorch as pl
from typing_extensions import override

from lightning_lbgm.callbacks.base import FederatedCallback
from lightning_lbgm.callbacks.run_outputs import after_an_error, outputs_of, start_outputs

__all__ = ["WritingCallback"]


class WritingCallback(FederatedCallback):
    """A federation's callback that writes figures, tables or metrics and has something to finish."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            start_outputs(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with after_an_error():
            self._finish(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        outputs_of(trainer).finish()

    @abstractmethod
    def _finish(self, trainer: pl.Trainer) -> None:
        """Draw, and send all that is waiting."""
