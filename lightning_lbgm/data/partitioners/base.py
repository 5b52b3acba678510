"""Base of the partitioners, and what checks a partition: each client's examples as indices."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lbgm.core.describe import describe
from lightning_lbgm.core.rng import derive_seed

__all__ = ["Partitioner", "check_alpha", "check_at_least_one", "check_enough", "make_partitions"]


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
        """Show the constructor call; arrays by their length, functions by their names."""
        settings = (
            f"{name}=<{len(value)} values>" if hasattr(value, "__len__") else f"{name}={describe(value)}"
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


def check_alpha(owner: str, alpha: Any, suggestion: float) -> float:
    """Return the concentration of a Dirichlet distribution as a float.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0 < float(alpha) < math.inf:
        raise ValueError(f"`{owner}(alpha=...)` must be positive and finite; got {alpha!r}. Try {suggestion:g}.")
    return float(alpha)


def check_at_least_one(owner: str, name: str, value: Any, hint: str = "") -> int:
    """Return a whole number of at least 1.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{owner}({name}=...)` must be an integer, at least 1; got {value!r}.{hint}")
    return value


def check_enough(num_clients: int, name: str, value: int, num_examples: int) -> None:
    """Refuse, with a ``ValueError``, fewer examples than so many for each client.

    Args:
        num_clients: K.
        name: The argument that asks for them.
        value: Its value: examples that each client needs.
        num_examples: Examples that there are.
    """
    if num_clients * value > num_examples:
        raise ValueError(
            f"`num_clients={num_clients}` with `{name}={value}` needs {num_clients * value} examples; the training data"
            f" has {num_examples}. Lower either."
        )
