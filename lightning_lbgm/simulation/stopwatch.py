"""Stopwatch: the seconds that a local step takes in this simulation, for a clock that asks for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch

from lightning_lbgm.clients.base import ClientUpdate

__all__ = ["Stopwatch"]


class Stopwatch:
    """Measure the local training of a round: one mean for all its clients, because chunks train several at once.

    Args:
        device: Where clients are trained.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._steps = 0

    def watch(self, updates: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Yield the updates, and measure what it takes to make them."""
        while True:
            begin = time.perf_counter()
            update = next(updates, None)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # what was only begun is not done
            self._seconds += time.perf_counter() - begin
            if update is None:
                return
            self._steps += update.local.num_steps
            yield update

    def export(self) -> tuple[float, int]:
        """Return seconds and steps as plain values, for other processes."""
        return self._seconds, self._steps

    def combine(self, parts: Sequence[tuple[float, int]]) -> None:
        """Measure all processes, from what each has exported."""
        self._seconds, self._steps = sum(part[0] for part in parts), sum(part[1] for part in parts)

    @property
    def seconds_per_step(self) -> float:
        """The mean; NaN if there was no step."""
        return self._seconds / self._steps if self._steps else math.nan
