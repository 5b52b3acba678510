"""Batch-size functions of callbacks, such as ``ThroughputMonitor``'s, applied to the local batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_lbgm.data.rounds import Round

__all__ = ["LocalCount", "count_local_batches"]

_FUNCTIONS = ("batch_size_fn", "length_fn")


class LocalCount:
    """Add up a function of each local batch over a round; asked of the round, return the sum.

    A function that was written for a ``Round``, such as ``lambda batch: sum(batch.num_examples)``, fails on a local
    batch and is asked of the round itself.

    Args:
        function: Called with a batch; returns a number.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self._total: Any = 0
        self._takes_rounds = False

    def __call__(self, batch: Any) -> Any:
        """Return the function of a batch, or the sum over a round's local batches."""
        if not isinstance(batch, Round):
            return self.function(batch)
        if not self._takes_rounds:
            return self._total
        value = self.function(batch)
        return sum(value) if isinstance(value, tuple) else value

    def begin_round(self) -> None:
        """Forget the round before."""
        self._total, self._takes_rounds = 0, False

    def observe(self, batch: Any) -> None:
        """Add a local batch."""
        if self._takes_rounds:
            return
        try:
            with torch.inference_mode():
                self._total += self.function(batch)
        except Exception:
            self._takes_rounds = True  # whose own error, if it has one, is the callback's to raise


def count_local_batches(callbacks: Iterable[Any]) -> tuple[list[LocalCount], Callable[[], None]]:
    """Replace the callbacks' functions of a batch.

    Returns:
        What is to see each round's local batches, and a function that undoes the replacement.
    """
    found = [
        (callback, name, function)
        for callback in callbacks
        if all(hasattr(callback, name) for name in _FUNCTIONS)
        for name in _FUNCTIONS
        if callable(function := getattr(callback, name)) and not isinstance(function, LocalCount)
    ]
    counts = []
    for callback, name, function in found:
        counts.append(LocalCount(function))
        setattr(callback, name, counts[-1])

    def undo() -> None:
        for callback, name, function in found:
            setattr(callback, name, function)

    return counts, undo
