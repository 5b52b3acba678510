"""Logged values of clients: entries, the log of a chunk, and the protocol of a round's log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["ChunkLog", "LogCall", "LogEntry", "RoundLog", "reduction_name", "weight_of"]


LogCall = tuple[str, "float | None", dict[str, Any]]
"""Name, number (None: a tensor, given apart) and options of one call of ``self.log``."""


@dataclass
class LogEntry:
    """One logged name within one client, or over the cohort."""

    options: dict[str, Any]
    reduction: str
    total: Tensor | None = None
    weight: float = 0.0
    last: Any = None  # what cannot be averaged: a torchmetrics.Metric, which keeps its own state

    def takes(self, value: Any) -> bool:
        """Whether a value only needs adding to a sum that is there already."""
        total = self.total
        return (
            type(value) is Tensor
            and total is not None
            and self.reduction == "mean"
            and value.ndim == 0
            and value.dtype is total.dtype
            and value.device == total.device
        )

    def add(self, value: Tensor, weight: float) -> None:
        """Take a value, shape ``()``, detached; it is not kept."""
        self.weight += weight
        if self.total is None:
            self.total = value * weight if self.reduction == "mean" else value.clone()
            return
        if value.device != self.total.device:  # a number at one step, a tensor on an accelerator at another
            value = value.to(self.total.device)
        if self.reduction == "mean":
            self.total.add_(value, alpha=weight)
        elif self.reduction == "sum":
            self.total.add_(value)
        else:
            self.total = (torch.maximum if self.reduction == "max" else torch.minimum)(self.total, value)

    def merge(self, other: LogEntry) -> None:
        """Take another entry of the same name."""
        self.last = other.last
        if other.total is None:
            return
        if self.reduction == "mean" and self.total is not None:
            self.weight += other.weight
            self.total.add_(other.total.to(self.total.device))  # one client's first may be a number, and on the CPU
        elif self.reduction == "mean":
            self.weight, self.total = other.weight, other.total
        else:
            self.add(other.total, other.weight)

    def reduced(self) -> Tensor | None:
        """Return the sum, mean, minimum or maximum of what was taken; None if nothing was."""
        reduced = self.total
        return reduced / self.weight if reduced is not None and self.reduction == "mean" and self.weight else reduced


class RoundLog(Protocol):
    """What stands in for ``self.log`` in a round: it holds what the client at hand logged, until that is accepted.

    Attributes:
        argument_names: The arguments of ``self.log`` after name and value, in order.
        batch_size: Examples in the local batch at hand.
    """

    argument_names: tuple[str, ...]
    batch_size: int

    def take(self) -> dict[str, LogEntry]:
        """Return what the client logged, and forget it."""

    def replay(self, log: ChunkLog, position: int) -> None:
        """Take what one client of a chunk logged."""

    def accept(self) -> None:
        """Count what the client logged."""

    def reject(self) -> None:
        """Forget what the client logged."""

    def export(self, module: nn.Module) -> list[dict[str, Any]]:
        """Return the round's entries as plain values, for other processes."""

    def combine(self, parts: Sequence[list[dict[str, Any]]], module: nn.Module, device: torch.device) -> None:
        """Make of all processes' entries the same in each."""


class ChunkLog:
    """Collect what C clients log at once; each number stands for all of them, each tensor has a value for each.

    Args:
        num_clients: C.
    """

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._entries: dict[str, LogEntry] = {}

    def take(self, calls: Sequence[LogCall], values: Iterable[Tensor], batch_size: int) -> None:
        """Take the calls of one local step.

        Args:
            calls: The calls.
            values: The tensors among their values, in order, each of C elements with the clients first.
            batch_size: Examples in a client's local batch, the weight if a call gives none.
        """
        tensors = iter(values)
        for name, number, options in calls:
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = LogEntry(options, reduction_name(options.get("reduce_fx", "mean")))
            weight = weight_of(options, batch_size)
            if number is None:
                value = next(tensors).detach().reshape(self._num_clients)
                entry.add(value if value.dtype is torch.float64 else value.float(), weight)
            else:
                entry.add(torch.full((self._num_clients,), number), weight)

    def client(self, position: int) -> dict[str, LogEntry]:
        """Return the entries of the client at ``position``."""
        return {
            name: LogEntry(
                entry.options, entry.reduction, None if entry.total is None else entry.total[position], entry.weight
            )
            for name, entry in self._entries.items()
        }


def weight_of(options: dict[str, Any], batch_size: int) -> float:
    """Return the weight of a value: the ``batch_size`` that was passed, also 0, else that of the batch."""
    given = options.get("batch_size")
    return batch_size if given is None else float(given)


def reduction_name(reduce_fx: Any) -> str:
    """Return the name of a reduction: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``."""
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    return "mean" if name.lower() == "avg" else name.lower()
