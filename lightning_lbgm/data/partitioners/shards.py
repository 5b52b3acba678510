"""Shard partitioner: examples sorted by label, cut into equal shards, and dealt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_lbgm.data.labels import find_labels
from lightning_lbgm.data.partitioners.base import Partitioner, check_at_least_one, check_enough

__all__ = ["ShardPartitioner"]


class ShardPartitioner(Partitioner):
    """Sort the examples by label, cut them into equal shards, and give each client some of them at random.

    The split of McMahan et al., AISTATS 2017 (arXiv 1602.05629): 200 shards of MNIST, 2 for each of 100 clients. Every
    example is used once, and shards differ in size by one example at the most. A shard may lie across the border of two
    labels, and a client may get two shards of one label, so it has between one and about ``shards_per_client`` labels.
    If each client is to have an exact number of labels, use ``PathologicalPartitioner``.

    Args:
        shards_per_client: Shards that each client gets, 2 in the paper.
        labels: One label for each example, if the dataset does not show them. Examples of a label are in random order.

    Raises:
        ValueError: If ``shards_per_client`` is less than 1; and at fit start, if there are fewer examples than shards.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_lbgm.data import make_partitions
        >>> data = TensorDataset(torch.zeros(8, 1), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
        >>> parts = make_partitions(data, 4, ShardPartitioner(shards_per_client=1), seed=0)
        >>> sorted(data.tensors[1][part].tolist() for part in parts)
        [[0, 0], [1, 1], [2, 2], [3, 3]]
    """

    def __init__(self, shards_per_client: int = 2, labels: Sequence[Any] | None = None) -> None:
        hint = " McMahan et al. have 2."
        self.shards_per_client = check_at_least_one("ShardPartitioner", "shards_per_client", shards_per_client, hint)
        self.labels = labels

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        classes = find_labels(dataset, self.labels).numpy()
        check_enough(num_clients, "shards_per_client", self.shards_per_client, len(classes))
        shuffled = rng.permutation(len(classes))
        by_label = shuffled[np.argsort(classes[shuffled], kind="stable")]
        shards = np.array_split(by_label, num_clients * self.shards_per_client)
        hands = rng.permutation(len(shards)).reshape(num_clients, self.shards_per_client)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]
