"""Partitioners: which examples belong to which client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lbgm.core.rng import derive_seed
from lightning_lbgm.data.labels import find_labels

__all__ = [
    "DirichletPartitioner",
    "IIDPartitioner",
    "Partitioner",
    "PathologicalPartitioner",
    "make_partitions",
]


class Partitioner(ABC):
    """Deals the examples of a dataset to clients; the base class of the package's and of your own."""

    @abstractmethod
    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        """Return one array of example indices for each client.

        Args:
            dataset: A map-style dataset of n examples: the training DataLoader's, or a ``Subset`` of it if the
                DataLoader has a sampler that picks a part.
            num_clients: K.
            rng: The only source of randomness to use.
        """

    def __repr__(self) -> str:
        """Show the constructor call; arrays by their length."""
        settings = (
            f"{name}=<{len(value)} values>" if hasattr(value, "__len__") else f"{name}={value!r}"
            for name, value in vars(self).items()
            if value is not None
        )
        return f"{type(self).__name__}({', '.join(settings)})"


def make_partitions(dataset: Dataset[Any], num_clients: int, partitioner: Partitioner, seed: int) -> list[Tensor]:
    """Run a partitioner, a pure function of its arguments, and check what it returns.

    Returns:
        One ``int64`` tensor of increasing example indices for each client.

    Raises:
        ValueError: If there are more clients than examples, or a client would have none.
    """
    num_examples = len(dataset)  # type: ignore[arg-type]
    if num_clients > num_examples:
        raise ValueError(
            f"`num_clients={num_clients}` is more than the {num_examples} training examples: a client needs at least"
            " one. Use fewer clients or more data."
        )
    parts = partitioner.partition(dataset, num_clients, np.random.default_rng(derive_seed(seed, "partition")))
    if len(parts) != num_clients:
        raise ValueError(
            f"{partitioner!r} made {len(parts)} partitions for `num_clients={num_clients}`: let `partition` return one"
            " array of indices for each client."
        )
    partitions = [_as_indices(part, num_examples, partitioner) for part in parts]
    empty = [client_id for client_id, part in enumerate(partitions) if len(part) == 0]
    if empty:
        raise ValueError(
            f"{partitioner!r} leaves {len(empty)} of `num_clients={num_clients}` without an example, client {empty[0]}"
            " first. Use fewer clients or another partitioner."
        )
    return partitions


def _as_indices(part: Any, num_examples: int, partitioner: Partitioner) -> Tensor:
    indices = np.asarray(part)
    if indices.size and (indices.ndim != 1 or indices.dtype.kind not in "iu"):
        raise ValueError(
            f"{partitioner!r} must return arrays of example indices, one-dimensional and of integers; one of them has"
            f" the shape {indices.shape} and the dtype {indices.dtype}."
        )
    if indices.size and not 0 <= indices.min() <= indices.max() < num_examples:
        raise ValueError(
            f"{partitioner!r} must return indices of the {num_examples} training examples, 0 to {num_examples - 1};"
            f" got {indices.min()} to {indices.max()}."
        )
    return torch.as_tensor(np.sort(indices.astype(np.int64)))


class IIDPartitioner(Partitioner):
    """Deal the shuffled examples evenly: the clients' sizes differ by one at the most."""

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        return np.array_split(rng.permutation(len(dataset)), num_clients)  # type: ignore[arg-type]


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
        >>> from torch.utils.data import TensorDataset
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


class DirichletPartitioner(Partitioner):
    """Draw each class's shares over the clients from a Dirichlet distribution (Hsu, Qi, Brown, arXiv 1909.06335).

    Args:
        alpha: Concentration, > 0. 0.1: most clients see few classes; 100: nearly IID.
        min_examples: Each client gets at least so many; those with fewer take examples at random from the largest.
        labels: One label for each example, if the dataset does not show them.

    Raises:
        ValueError: If ``alpha`` is not positive or ``min_examples`` is less than 1; and at fit start, if there are
            fewer than ``num_clients * min_examples`` examples.
    """

    def __init__(self, alpha: float, min_examples: int = 1, labels: Sequence[Any] | None = None) -> None:
        if not alpha > 0 or alpha == float("inf"):
            raise ValueError(f"`DirichletPartitioner(alpha=...)` must be positive and finite; got {alpha!r}. Try 0.5.")
        if isinstance(min_examples, bool) or not isinstance(min_examples, int) or min_examples < 1:
            raise ValueError(
                f"`DirichletPartitioner(min_examples=...)` must be an integer, at least 1; got {min_examples!r}."
            )
        self.alpha = float(alpha)
        self.min_examples = min_examples
        self.labels = labels

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        classes = find_labels(dataset, self.labels).numpy()
        if num_clients * self.min_examples > len(classes):
            raise ValueError(
                f"`num_clients={num_clients}` with `min_examples={self.min_examples}` needs"
                f" {num_clients * self.min_examples} examples; the training data has {len(classes)}. Lower either."
            )
        owner = np.empty(len(classes), dtype=np.int64)
        for c in range(classes.max() + 1):
            members = rng.permutation(np.flatnonzero(classes == c))
            shares = rng.dirichlet(np.full(num_clients, self.alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client_id, part in enumerate(np.split(members, cuts)):
                owner[part] = client_id
        parts = [np.flatnonzero(owner == client_id) for client_id in range(num_clients)]
        for client_id in range(num_clients):
            while (missing := self.min_examples - len(parts[client_id])) > 0:
                largest = max(range(num_clients), key=lambda k: len(parts[k]))
                spare = min(missing, max(1, (len(parts[largest]) - self.min_examples) // 2))
                given = rng.choice(len(parts[largest]), size=spare, replace=False)
                parts[client_id] = np.concatenate([parts[client_id], parts[largest][given]])
                parts[largest] = np.delete(parts[largest], given)
        return parts
