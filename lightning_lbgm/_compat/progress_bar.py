"""Progress bars of Lightning, extended by the clients done in a round."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_lbgm._compat.twin import is_a

__all__ = ["ClientProgress"]


class ClientProgress:
    """Show in the training bar how many clients of a long round are done.

    Lightning's bars count batches, here rounds, and have no public way to say more; so the bar's description is
    extended for as long as the round lasts.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._bar: Any = trainer.progress_bar_callback
        self._description: str | None = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar to write to."""
        bar = self._bar
        if is_a(bar, TQDMProgressBar):
            return bar.is_enabled and bar._train_progress_bar is not None
        if is_a(bar, RichProgressBar):
            return bar.is_enabled and bar.progress is not None and bar.train_progress_bar_id is not None
        return False

    def show(self, done: int, total: int, noun: str = "clients") -> None:
        """Write ``done/total clients`` behind the bar's own description, or what else is counted."""
        if self._description is None:
            self._description = self._read()
        self._write(f"{self._description} [{done}/{total} {noun}]")

    def restore(self) -> None:
        """Write the bar's own description again."""
        if self._description is not None:
            self._write(self._description)
            self._description = None

    def _read(self) -> str:
        if is_a(self._bar, TQDMProgressBar):
            return str(self._bar.train_progress_bar.desc).removesuffix(": ")
        return str(self._bar.train_progress_bar.description)

    def _write(self, description: str) -> None:
        if is_a(self._bar, TQDMProgressBar):
            self._bar.train_progress_bar.set_description(description)
        elif is_a(self._bar, RichProgressBar) and self._bar.progress is not None:
            self._bar.progress.update(self._bar.train_progress_bar_id, description=description.replace(" [", " \\["))
            self._bar.refresh()
