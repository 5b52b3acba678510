"""Pathological partitioner: a few classes a client, each from shards of one class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_lbgm.data.labels import find_labels
from lightning_lbgm.data.partitioners.base import Partitioner

__all__ = ["PathologicalPartitioner"]


class PathologicalPartitioner(Partitioner):
    """Give each client a few classes only: the paper's non-IID split.

    The examples are cut into ``num_clients * classes_per_client`` shards of one class each, as equal in size as the
    class sizes allow (within a class they differ by one example at the most), and each client gets that many shards of
    different classes. Every example is used once. After McMahan et al., AISTATS 2017 (arXiv 1602.05629).

    Args:
        classes_per_client: Classes that each client gets, 3 in the paper.
        labels: One label for each example, if the dataset does not show them.

    Raises:
        ValueError: If ``classes_per_client`` is less than 1; and at fit start, if it is more than the classes there
            are, if the clients cannot take every class, or if a class has fewer examples than shards.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_lbgm.data import make_partitions
        >>> data = TensorDataset(torch.zeros(8, 1), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
        >>> parts = make_partitions(data, 4, PathologicalPartitioner(2), seed=0)
        >>> [len(data.tensors[1][part].unique()) for part in parts]
        [2, 2, 2, 2]
    """

    def __init__(self, classes_per_client: int, labels: Sequence[Any] | None = None) -> None:
        if isinstance(classes_per_client, bool) or not isinstance(classes_per_client, int) or classes_per_client < 1:
            raise ValueError(
                f"`PathologicalPartitioner(classes_per_client=...)` must be a positive integer; got"
                f" {classes_per_client!r}. The paper's is 3."
            )
        self.classes_per_client = classes_per_client
        self.labels = labels

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        classes = find_labels(dataset, self.labels).numpy()
        class_sizes = np.bincount(classes)
        num_shards = self._shards_per_class(class_sizes, num_clients)
        shards = [
            iter(np.array_split(rng.permutation(np.flatnonzero(classes == c)), n)) for c, n in enumerate(num_shards)
        ]
        remaining = num_shards.copy()
        parts = []
        for clients_left in range(num_clients, 0, -1):
            # A class with a shard for every client left must be taken now; the others are drawn by their shards left.
            # With at most `clients_left` shards a class, this never runs out of classes.
            due = np.flatnonzero(remaining == clients_left)
            free = np.flatnonzero((remaining > 0) & (remaining < clients_left))
            drawn = rng.choice(
                free,
                size=self.classes_per_client - len(due),
                replace=False,
                p=remaining[free] / remaining[free].sum() if len(free) else None,
            )
            chosen = np.concatenate([due, drawn]).astype(np.int64)
            remaining[chosen] -= 1
            parts.append(np.concatenate([next(shards[c]) for c in chosen]))
        return parts

    def _shards_per_class(self, class_sizes: Any, num_clients: int) -> Any:
        """Deal the shards to the classes in proportion to their sizes, from 1 to ``num_clients`` each."""
        num_classes, total = len(class_sizes), num_clients * self.classes_per_client
        setting = f"`classes_per_client={self.classes_per_client}`"
        if self.classes_per_client > num_classes:
            raise ValueError(f"{setting} is more than the {num_classes} classes of the training data: use fewer.")
        if total < num_classes:
            raise ValueError(
                f"`num_clients={num_clients}` with {setting} makes {total} shards, too few for the {num_classes}"
                " classes to be used: raise either of them."
            )
        shards = np.ones(num_classes, dtype=np.int64)
        for _ in range(total - num_classes):
            # Where the shards are largest, one more, unless each client has the class already.
            sizes = np.where(shards < num_clients, class_sizes / shards, -1.0)
            shards[int(np.argmax(sizes))] += 1
        short = np.flatnonzero(class_sizes < shards)
        if len(short):
            raise ValueError(
                f"`num_clients={num_clients}` with {setting} needs {shards[short[0]]} examples of each class at least,"
                f" but class number {short[0]} has {class_sizes[short[0]]}: use fewer clients or classes for each."
            )
        return shards
