"""Quantity partitioner: quantity skew, clients with the same mix of examples and different numbers of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_lbgm.data.partitioners.base import Partitioner, check_alpha, check_at_least_one, check_enough

__all__ = ["QuantityPartitioner"]


class QuantityPartitioner(Partitioner):
    """Deal the shuffled examples in parts whose sizes are drawn from a Dirichlet distribution.

    The quantity skew of Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022 (arXiv 2102.02079). Every
    example is used once. What a client has is a random sample of all, so labels are skewed by chance alone. Each client
    gets ``min_examples``, and what is left is dealt by the shares.

    Args:
        alpha: Concentration, > 0. 0.1: a few clients have most of the examples; 100: nearly equal sizes.
        min_examples: Each client gets at least so many.

    Raises:
        ValueError: If ``alpha`` is not positive or ``min_examples`` is less than 1; and at fit start, if there are
            fewer than ``num_clients * min_examples`` examples.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_lbgm.data import make_partitions
        >>> parts = make_partitions(TensorDataset(torch.zeros(100, 1)), 4, QuantityPartitioner(alpha=0.5), seed=0)
        >>> sum(len(part) for part in parts), min(len(part) for part in parts) >= 1
        (100, True)
    """

    def __init__(self, alpha: float, min_examples: int = 1) -> None:
        self.alpha = check_alpha("QuantityPartitioner", alpha, 0.5)
        self.min_examples = check_at_least_one("QuantityPartitioner", "min_examples", min_examples)

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        num_examples = len(dataset)  # type: ignore[arg-type]
        check_enough(num_clients, "min_examples", self.min_examples, num_examples)
        shares = rng.dirichlet(np.full(num_clients, self.alpha))
        spare = num_examples - num_clients * self.min_examples
        ends = np.round(np.cumsum(shares)[:-1] * spare).astype(np.int64)
        ends += self.min_examples * np.arange(1, num_clients)
        return np.split(rng.permutation(num_examples), ends)
