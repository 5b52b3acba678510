"""Dirichlet partitioner: label skew, each class by shares drawn from a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_lbgm.data.labels import find_labels
from lightning_lbgm.data.partitioners.base import Partitioner, check_alpha, check_at_least_one, check_enough

__all__ = ["DirichletPartitioner", "deal_by_shares"]


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
        self.alpha = check_alpha("DirichletPartitioner", alpha, 0.5)
        self.min_examples = check_at_least_one("DirichletPartitioner", "min_examples", min_examples)
        self.labels = labels

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        classes = find_labels(dataset, self.labels).numpy()
        return deal_by_shares(classes, num_clients, self.alpha, self.min_examples, rng)


def deal_by_shares(
    groups: Any, num_clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[Any]:
    """Deal each group of examples to the clients by shares from a Dirichlet distribution, each example once.

    Args:
        groups: The group of each example, counted from 0, shape ``(n,)``.
        num_clients: K.
        alpha: Concentration.
        min_examples: Each client gets at least so many, at random from the largest clients.
        rng: Draws the shares, and who gets which example.

    Raises:
        ValueError: If there are fewer than ``num_clients * min_examples`` examples.
    """
    check_enough(num_clients, "min_examples", min_examples, len(groups))
    owner = np.empty(len(groups), dtype=np.int64)
    for group in range(groups.max() + 1):
        members = rng.permutation(np.flatnonzero(groups == group))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for client_id, part in enumerate(np.split(members, cuts)):
            owner[part] = client_id
    parts = [np.flatnonzero(owner == client_id) for client_id in range(num_clients)]
    for client_id in range(num_clients):
        while (missing := min_examples - len(parts[client_id])) > 0:
            largest = max(range(num_clients), key=lambda k: len(parts[k]))
            spare = min(missing, max(1, (len(parts[largest]) - min_examples) // 2))
            given = rng.choice(len(parts[largest]), size=spare, replace=False)
            parts[client_id] = np.concatenate([parts[client_id], parts[largest][given]])
            parts[largest] = np.delete(parts[largest], given)
    return parts
