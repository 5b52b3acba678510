"""Bulk reading of tensor datasets: a batch takes one indexing operation for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_lbgm.data.subset import SampledSubset

__all__ = ["bulk_reader"]


BulkReader = Callable[[Tensor], list[Tensor]]


def bulk_reader(dataset: Dataset[Any]) -> BulkReader | None:
    """Return a function from indices to a batch of tensors, if the dataset is nothing but tensors, else None.

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
