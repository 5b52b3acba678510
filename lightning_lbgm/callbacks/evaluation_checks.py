"""Checks of the arguments of ``ClientEvaluation``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["check_clients", "check_count", "check_split"]

_SPLIT = 0.2


def check_split(split: float | None, data: Any, keys: Any) -> float | None:
    """Return the share to hold out, None if there is data to evaluate on."""
    if data is not None:
        if split is not None:
            raise ValueError(
                f"`ClientEvaluation(split={split!r})` holds out training examples, and `data` is what to evaluate on"
                " instead: pass one of them."
            )
        return None
    if keys is not None:
        raise ValueError("`ClientEvaluation(keys=...)` are of the examples of `data`, which is not given: pass both.")
    if split is None:
        return _SPLIT
    if isinstance(split, bool) or not isinstance(split, (int, float)) or not 0 < split < 1:
        raise ValueError(f"`ClientEvaluation(split=...)` must be a share in (0, 1), such as 0.2; got {split!r}.")
    return float(split)


def check_count(name: str, value: int, least: int) -> int:
    """Return a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`ClientEvaluation({name}=...)` must be an integer, at least {least}; got {value!r}.")
    return value


def check_clients(clients: Any) -> Any:
    """Return whom to evaluate: None, a number, or a list that is not empty."""
    if clients is None:
        return None
    if isinstance(clients, (str, bool)) or not isinstance(clients, (int, Sequence)):
        raise TypeError(
            "`ClientEvaluation(clients=...)` must be None for all, a number of clients, or a list of ids or names; got"
            f" {clients!r}."
        )
    if (isinstance(clients, int) and clients < 1) or (not isinstance(clients, int) and not len(clients)):
        raise ValueError(f"`ClientEvaluation(clients=...)` must be at least one client; got {clients!r}.")
    return clients
