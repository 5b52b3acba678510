"""Batch order of one client in a round."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BatchPlan", "Draws"]


class Draws(Protocol):
    """How a pass over a client's examples is drawn if it is neither a shuffle nor in the dataset's order."""

    def pass_size(self, num_examples: int) -> int:
        """Return how many examples a pass of a client with ``num_examples`` has, repeats included: at least one."""

    def draw(self, partition: Tensor, generator: torch.Generator, round_index: int, pass_index: int) -> Tensor:
        """Return the examples of one pass in order, shape ``(pass_size,)``."""


@dataclass(frozen=True)
class BatchPlan:
    """How a client goes through its examples in one round.

    Attributes:
        batch_size: Examples in a batch; at least the client's number of examples means full-batch steps.
        local_steps: Optimizer steps in a round; None: ``local_epochs`` passes.
        local_epochs: Passes over the client's examples in a round.
        shuffle: Whether each pass has a new order.
        drop_last: Whether a last smaller batch of a pass is left out (never the only one).
        draws: Draws each pass instead of ``shuffle``, if the DataLoader's sampler does more than shuffling.

    Examples:
        >>> plan = BatchPlan(batch_size=2, local_steps=3)
        >>> [b.tolist() for b in plan.batches(torch.tensor([4, 5, 6]), torch.Generator())]
        [[4, 5], [6], [4, 5]]
    """

    batch_size: int
    local_steps: int | None = None
    local_epochs: int = 1
    shuffle: bool = False
    drop_last: bool = False
    draws: Draws | None = None

    def pass_size(self, num_examples: int) -> int:
        """Return the number of examples in one pass of a client with ``num_examples``."""
        return num_examples if self.draws is None else self.draws.pass_size(num_examples)

    def steps_per_pass(self, num_examples: int) -> int:
        """Return the number of batches in one pass of a client with ``num_examples``."""
        full, rest = divmod(self.pass_size(num_examples), self.batch_size)
        return full if full and (self.drop_last or not rest) else full + 1

    def num_steps(self, num_examples: int) -> int:
        """Return the number of local steps of a client with ``num_examples`` in one round."""
        return self.local_steps or self.local_epochs * self.steps_per_pass(num_examples)

    def batches(self, partition: Tensor, generator: torch.Generator, round_index: int = 0) -> list[Tensor]:
        """Return the example indices of each local batch of one round, in order.

        Args:
            partition: The client's example indices, shape ``(n_k,)``.
            generator: Orders the passes, if ``shuffle`` or ``draws`` is set.
            round_index: The round, for ``draws``.
        """
        n, num_steps = len(partition), self.num_steps(len(partition))
        if self.draws is None and self.batch_size >= n:
            return [partition] * num_steps
        per_pass = self.steps_per_pass(n)
        batches: list[Tensor] = []
        for pass_index in itertools.count():
            order = self._one_pass(partition, generator, round_index, pass_index)
            wanted = min(per_pass, num_steps - len(batches))
            batches.extend(order[: wanted * self.batch_size].split(self.batch_size))
            if len(batches) == num_steps:
                break
        return batches

    def _one_pass(self, partition: Tensor, generator: torch.Generator, round_index: int, pass_index: int) -> Tensor:
        if self.draws is not None:
            return self.draws.draw(partition, generator, round_index, pass_index)
        return partition[torch.randperm(len(partition), generator=generator)] if self.shuffle else partition
