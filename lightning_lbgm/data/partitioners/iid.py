"""IID partitioner: the shuffled examples, dealt evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_lbgm.data.partitioners.base import Partitioner

__all__ = ["IIDPartitioner"]


class IIDPartitioner(Partitioner):
    """Deal the shuffled examples evenly: the clients' sizes differ by one at the most."""

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        return np.array_split(rng.permutation(len(dataset)), num_clients)  # type: ignore[arg-type]
