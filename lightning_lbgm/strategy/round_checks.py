"""Round checks: a module's own ``optimizer_step`` must make exactly one step, which is the server's."""

from __future__ import annotations

from typing import NoReturn

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["check_round_begins", "check_round_ends", "refuse_missing_step"]

_REMEDY = (
    "It is called once a round, not once a local step: call `optimizer.step(closure=optimizer_closure)` in it exactly"
    " once."
)


def check_round_begins(module: pl.LightningModule, index: int, next_index: int, in_round: bool) -> None:
    """Refuse a second client phase in one round.

    Args:
        module: The module.
        index: The round's index.
        next_index: Index of the round that the federation expects.
        in_round: Whether there was a client phase without a server step.
    """
    if in_round or index != next_index:
        raise MisconfigurationException(
            f"`{type(module).__name__}.optimizer_step` called the closure a second time in round {index}: its clients"
            f" would be trained twice. {_REMEDY}"
        )


def check_round_ends(module: pl.LightningModule, index: int, in_round: bool) -> None:
    """Refuse a server step without a client phase."""
    if not in_round:
        raise MisconfigurationException(
            f"`{type(module).__name__}.optimizer_step` called `optimizer.step` in round {index} without a closure that"
            f" has trained clients. {_REMEDY}"
        )


def refuse_missing_step(module: pl.LightningModule, index: int) -> NoReturn:
    """Refuse a client phase without a server step."""
    raise MisconfigurationException(
        f"`{type(module).__name__}.optimizer_step` called the closure in round {index}, but not `optimizer.step`: the"
        f" clients were trained, and the server made no step. {_REMEDY}"
    )
