"""Aggregation rules: the seam of an aggregator, and the weighted mean of FedAvg."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lbgm.core.describe import describe_call
from lightning_lbgm.payloads.base import Payload

__all__ = ["Aggregator", "Ranks", "WeightedMean"]


class Ranks(Protocol):
    """The processes that receive a cohort's updates together.

    Attributes:
        rank: This process's number, from 0.
        size: Number of processes.
    """

    rank: int
    size: int

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, in place; the result is the same to the bit on every rank."""

    def gather(self, value: Any, purpose: str) -> list[Any]:
        """Return every rank's value, in order of rank, on every rank; tensors must be on the CPU."""


class Aggregator(ABC):
    """An aggregation rule: makes one update of those that a round's cohort has sent.

    The server calls ``begin`` once a round, ``receive`` for each update, ``merge`` if there are several processes, and
    ``finish`` once. An aggregator belongs to one server, which copies the one that it is given.
    """

    @abstractmethod
    def begin(self, like: Tensor, cohort_size: int) -> None:
        """Start a round.

        Args:
            like: A vector like the updates, shape ``(M,)``, not to be written to.
            cohort_size: Clients in the round; some may be rejected.
        """

    @abstractmethod
    def receive(self, update: Payload, weight: float) -> None:
        """Take a decoded update with its client's weight omega_k; the weights of a cohort sum to 1.

        Args:
            update: Its numbers are valid during the call alone: copy what is to be kept.
            weight: omega_k.
        """

    @abstractmethod
    def merge(self, ranks: Ranks, weights: Sequence[float]) -> None:
        """Put together what several processes have received; afterwards it is the same in each.

        Args:
            ranks: The processes.
            weights: The weight of each update that was received anywhere, in order of client.
        """

    @abstractmethod
    def finish(self) -> Tensor | None:
        """Return the round's update, shape ``(M,)``, valid until the next ``begin``; None if none was received."""

    def __repr__(self) -> str:
        """Show the constructor call, as far as arguments are attributes."""
        return describe_call(self)


class WeightedMean(Aggregator):
    """The mean weighted by omega_k, as in FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629).

    It holds one vector of shape ``(M,)``, to which each update is added as it arrives. If some of the cohort are
    missing, the weights of the others are scaled up to sum to 1.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> mean = WeightedMean()
        >>> mean.begin(torch.zeros(2), cohort_size=2)
        >>> mean.receive(Dense(torch.tensor([1.0, 2.0])), 0.25)
        >>> mean.receive(Dense(torch.tensor([5.0, 2.0])), 0.75)
        >>> mean.finish().tolist()
        [4.0, 2.0]
    """

    def __init__(self) -> None:
        self._sum = torch.empty(0)
        self._cohort_size = self._num_received = 0
        self._total_weight = 0.0

    def begin(self, like: Tensor, cohort_size: int) -> None:
        if self._sum.shape != like.shape or self._sum.dtype != like.dtype or self._sum.device != like.device:
            self._sum = torch.empty_like(like)
        self._sum.zero_()
        self._cohort_size, self._num_received, self._total_weight = cohort_size, 0, 0.0

    def receive(self, update: Payload, weight: float) -> None:
        update.add_to(self._sum, weight)
        self._total_weight += weight
        self._num_received += 1

    def merge(self, ranks: Ranks, weights: Sequence[float]) -> None:
        ranks.all_reduce_sum(self._sum)
        self._total_weight, self._num_received = sum(weights), len(weights)

    def finish(self) -> Tensor | None:
        if self._total_weight <= 0:
            return None
        if self._num_received < self._cohort_size:
            self._sum.div_(self._total_weight)
        return self._sum
