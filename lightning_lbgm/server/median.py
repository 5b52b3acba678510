"""Coordinate-wise median of a cohort's updates, robust against a minority of wrong ones."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.server.aggregation import Aggregator, Ranks

__all__ = ["CoordinateMedian"]


class CoordinateMedian(Aggregator):
    """The median of the cohort's updates in each coordinate (Yin et al., ICML 2018, arXiv 1803.01498).

    It needs all updates of a round, C vectors of shape ``(M,)``. Beyond ``memory`` bytes they go to a temporary file,
    and the median is taken block by block. Clients count alike, whatever their weights; of an even number the mean of
    the two in the middle is taken.

    Args:
        memory: Bytes that the updates of a round, and a block of them, may take.

    Raises:
        ValueError: If ``memory`` is not positive.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> median = CoordinateMedian()
        >>> median.begin(torch.zeros(2), cohort_size=3)
        >>> for update in ([1.0, 5.0], [2.0, 4.0], [1000.0, -1000.0]):
        ...     median.receive(Dense(torch.tensor(update)), 1 / 3)
        >>> median.finish().tolist()
        [2.0, 4.0]
    """

    def __init__(self, memory: int = 2**28) -> None:
        self.memory = check_count("CoordinateMedian", "memory", memory)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._rows = self._median = torch.empty(0)
        self._num_received = 0
        self._merged: Ranks | None = None

    def begin(self, like: Tensor, cohort_size: int) -> None:
        self._num_received, self._merged = 0, None
        self._median = torch.empty_like(like)
        self._close()
        shape = (cohort_size, like.numel())
        if cohort_size * like.nbytes <= self.memory:
            self._rows = like.new_empty(shape)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_lbgm_")
        path = str(Path(self._folder.name) / "updates")
        size = cohort_size * like.numel()
        self._rows = torch.from_file(path, shared=True, size=size, dtype=like.dtype).view(shape)

    def receive(self, update: Payload, weight: float) -> None:
        self._rows[self._num_received].copy_(update.dense())
        self._num_received += 1

    def merge(self, ranks: Ranks, weights: Sequence[float]) -> None:
        self._merged = ranks

    def finish(self) -> Tensor | None:
        rows = self._rows[: self._num_received]
        counts = [len(rows)] if self._merged is None else self._merged.gather(len(rows), "the number of updates")
        if not sum(counts):
            return None
        width = max(1, self.memory // (sum(counts) * rows.element_size()))
        for start in range(0, self._median.numel(), width):
            block = rows[:, start : start + width]
            if self._merged is not None:
                parts = self._merged.gather(block.cpu(), f"updates from entry {start} on")
                block = torch.cat(parts).to(self._median.device)
            self._median[start : start + width] = _median(block)
        self._close()
        return self._median

    def _close(self) -> None:
        self._rows = torch.empty(0)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _median(rows: Tensor) -> Tensor:
    """Return the median of each column."""
    ordered, count = rows.sort(0).values, len(rows)
    return ordered[count // 2].clone() if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2
