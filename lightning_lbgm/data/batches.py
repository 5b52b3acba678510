"""The order of one client's local batches, and drawing them in bulk from tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_lbgm.data.subset import SampledSubset

__all__ = ["BatchPlan", "Draws", "bulk_reader"]

BulkReader = Callable[[Tensor], list[Tensor]]


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
            generator: Orders the passes, where ``shuffle`` or ``draws`` is set.
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


def bulk_reader(dataset: Dataset[Any]) -> BulkReader | None:
    """Return a function from indices to a batch of tensors, where the dataset is nothing but tensors, else None.

    It gives what ``default_collate`` over the single examples would give, in one indexing operation a tensor. Looks
    through ``Subset``, ``SampledSubset`` and ``ConcatDataset``; other subclasses may load in their own way, and get
    None.
    """
    if type(dataset) is TensorDataset:
        tensors = dataset.tensors
        return lambda indices: [tensor[indices] for tensor in tensors]
    if type(dataset) in (Subset, SampledSubset):
        assert isinstance(dataset, Subset)
        inner, positions = bulk_reader(dataset.dataset), torch.as_tensor(dataset.indices, dtype=torch.int64)
        return None if inner is None else lambda indices: inner(positions[indices])
    if type(dataset) is ConcatDataset:
        readers = [bulk_reader(part) for part in dataset.datasets]
        if any(reader is None for reader in readers):
            return None
        return _concat_reader([reader for reader in readers if reader is not None], dataset.cumulative_sizes)
    return None


def _concat_reader(readers: Sequence[BulkReader], ends: Sequence[int]) -> BulkReader:
    boundaries = torch.tensor(ends)
    starts = torch.tensor([0, *ends[:-1]])

    def read(indices: Tensor) -> list[Tensor]:
        indices = torch.where(indices < 0, indices + ends[-1], indices)
        owner = torch.searchsorted(boundaries, indices, right=True)
        local = indices - starts[owner]
        first = int(owner[0])
        if bool((owner == first).all()):  # the usual case: one part is one client
            return readers[first](local)
        order = owner.argsort(stable=True)
        parts = [readers[k](local[order][owner[order] == k]) for k in owner.unique().tolist()]
        back = order.argsort()
        return [torch.cat(tensors)[back] for tensors in zip(*parts)]

    return read
