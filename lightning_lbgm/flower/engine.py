"""What both ends have in common: a strategy of rounds, and a ``Trainer`` made of the user's arguments."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.strategy.rounds import RoundsStrategy
from lightning_lbgm.strategy.session import Session

__all__ = ["EngineStrategy", "make_trainer", "without_notes"]

_QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class EngineStrategy(RoundsStrategy):
    """Run rounds of a federation that goes beyond this process.

    Args:
        session: The federation, as this end has it.

    Attributes:
        uplink: The stages.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.uplink = session.settings.uplink

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in a Lightning epoch."""
        return self.session.settings.rounds_per_epoch

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""
        return self.session.ledger


def make_trainer(
    given: dict[str, Any],
    fixed: dict[str, Any],
    why: str = "",
    *,
    first: Sequence[pl.Callback] = (),
    last: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Make a Trainer that says and writes only what the user has asked for.

    Args:
        given: Arguments of the Trainer, as the user gave them.
        fixed: Arguments that the user must not give.
        why: Why not, for the error.
        first: Callbacks before those of the user.
        last: Callbacks after those of the user.

    Raises:
        ValueError: If the user has given one of ``fixed``.
    """
    taken = sorted(fixed.keys() & given.keys())
    if taken:
        raise ValueError(f"`trainer` must not have {taken}: {why}")
    theirs = given.get("callbacks") or []
    callbacks = [*first, *([theirs] if isinstance(theirs, pl.Callback) else theirs), *last]
    quiet: dict[str, Any] = dict.fromkeys(_QUIET, False)
    return pl.Trainer(**{**quiet, "devices": 1, **given, **fixed, "callbacks": callbacks})


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Keep what a Trainer says of itself, such as the devices it found, out of a node's log: each round makes one."""
    notes = logging.getLogger("lightning.pytorch")
    level = notes.level
    notes.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        notes.setLevel(level)
