"""Natural partitioner: the clients that the data comes with, by ids or a dataset for each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_lbgm.data.labels import as_array, as_keys
from lightning_lbgm.data.partitioners.base import Partitioner
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["NaturalPartitioner"]


class NaturalPartitioner(Partitioner):
    """Use the clients that the data comes with.

    Args:
        client_ids: One id (integer or string) for each example; clients are numbered in the order of the sorted ids.
            None: each part of a ``ConcatDataset`` is a client, which is how to bring one dataset for each client. If a
            sampler picks a part of the dataset, the ids are of the whole dataset, and the clients are those that have
            examples in that part.

    Raises:
        ValueError: At fit start, if the number of ids is not that of the examples, if ids are missing or of different
            types, if the number of clients found is not ``num_clients``, or if ``client_ids`` is None and the dataset
            is no ``ConcatDataset``.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_lbgm.data import make_partitions
        >>> data = TensorDataset(torch.zeros(4, 1))
        >>> [p.tolist() for p in make_partitions(data, 2, NaturalPartitioner(["b", "a", "b", "b"]), seed=0)]
        [[1], [0, 2, 3]]
    """

    def __init__(self, client_ids: Sequence[Any] | None = None) -> None:
        self.client_ids = client_ids

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        if self.client_ids is not None:
            owner = np.unique(self.ids_of(dataset), return_inverse=True)[1]
        elif isinstance(dataset, ConcatDataset):
            starts = [0, *dataset.cumulative_sizes]
            return self._checked([np.arange(begin, end) for begin, end in itertools.pairwise(starts)], num_clients)
        elif isinstance(dataset, Subset) and (parts := _parts_of_subset(dataset)) is not None:
            owner = np.unique(parts, return_inverse=True)[1]
        else:
            raise ValueError(
                f"`NaturalPartitioner()` makes each part of a `ConcatDataset` a client, but the training dataset is a"
                f" {type(dataset).__name__}. Pass `NaturalPartitioner(client_ids)` with one id for each example, or"
                " train on `ConcatDataset([client_0_dataset, client_1_dataset, ...])`."
            )
        found = int(owner.max()) + 1 if len(owner) else 0
        return self._checked([np.flatnonzero(owner == client_id) for client_id in range(found)], num_clients)

    def ids_of(self, dataset: Dataset[Any]) -> Any:
        """Return the id of each example of the training set, which a sampler may have picked from the whole."""
        argument, ids, positions = "`NaturalPartitioner(client_ids=...)`", as_array(self.client_ids), None
        if isinstance(dataset, SampledSubset):
            ids, positions = dataset.select(ids, argument), dataset.positions
        if ids.ndim == 2 and ids.shape[1] == 1:
            ids = ids[:, 0]
        if ids.ndim != 1:
            raise ValueError(
                f"`NaturalPartitioner(client_ids=...)` must be one-dimensional, one id for each example; got the"
                f" shape {ids.shape}."
            )
        if len(ids) != len(dataset):  # type: ignore[arg-type]
            raise ValueError(
                f"`NaturalPartitioner(client_ids=...)` has {len(ids)} ids for {len(dataset)} training"  # type: ignore[arg-type]
                " examples: give one for each, in the dataset's order."
            )
        return as_keys(ids, argument, "id", positions)

    def _checked(self, parts: list[Any], num_clients: int) -> list[Any]:
        if len(parts) != num_clients:
            raise ValueError(
                f"The training data has {len(parts)} clients, but `num_clients={num_clients}`: pass"
                f" `num_clients={len(parts)}`."
            )
        return parts


def _parts_of_subset(dataset: Subset[Any]) -> Any:
    """Return for each example of a subset which part of a ``ConcatDataset`` it is of, or None if it is of none."""
    indices: Any = np.asarray(dataset.indices, dtype=np.int64)
    inner: Any = dataset.dataset
    while isinstance(inner, Subset):
        indices, inner = np.asarray(inner.indices, dtype=np.int64)[indices], inner.dataset
    if not isinstance(inner, ConcatDataset):
        return None
    return np.searchsorted(inner.cumulative_sizes, indices % len(inner), side="right")
