"""Subset of a dataset that a DataLoader's sampler picks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

__all__ = ["SampledSubset"]


class SampledSubset(Subset[Any]):
    """The examples that the training DataLoader's sampler picks from its dataset: what is dealt to the clients.

    A partitioner gets it as its dataset. Labels and ids that are given to a partitioner belong to the whole dataset,
    so ``select`` restricts them.

    Args:
        dataset: The DataLoader's dataset, of n examples.
        indices: The examples picked, in order; an index may come twice.

    Raises:
        ValueError: If an index is not from 0 to n - 1.
    """

    def __init__(self, dataset: Dataset[Any], indices: Any) -> None:
        positions = np.asarray(indices, dtype=np.int64).reshape(-1)
        size = len(dataset)  # type: ignore[arg-type]
        if positions.size and not 0 <= positions.min() <= positions.max() < size:
            raise ValueError(
                f"The training DataLoader's sampler gives indices from {positions.min()} to {positions.max()}, but its"
                f" dataset has the examples 0 to {size - 1}: make the sampler of the length of this dataset."
            )
        super().__init__(dataset, positions.tolist())
        self.positions: Tensor = torch.from_numpy(positions)

    def select(self, values: Any, argument: str) -> Any:
        """Return the values of the examples picked.

        Args:
            values: A NumPy array with one entry for each example of the whole dataset.
            argument: What they are, for the error.

        Raises:
            ValueError: If there are not as many as the dataset has examples.
        """
        size = len(self.dataset)  # type: ignore[arg-type]
        if values.ndim < 1 or len(values) != size:
            raise ValueError(
                f"{argument} has the shape {values.shape}, but the training DataLoader's dataset has {size} examples,"
                f" of which its sampler picks {len(self)}: give one for each of the {size}, in the dataset's order."
                " The sampler's choice is then applied to them."
            )
        return values[self.positions.numpy()]
