"""Feature partitioner: feature skew, clients whose examples differ in a number such as brightness, length or age."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_lbgm.core.describe import describe
from lightning_lbgm.core.rng import isolated_rng, seed_global_rng
from lightning_lbgm.data.labels import as_array
from lightning_lbgm.data.partitioners.base import Partitioner, check_alpha, check_at_least_one
from lightning_lbgm.data.partitioners.dirichlet import deal_by_shares
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["FeaturePartitioner"]


class FeaturePartitioner(Partitioner):
    """Give clients examples that differ in a feature, such as brightness, length or age.

    The examples are sorted by the feature and cut into ``num_groups`` groups of equal size, from the lowest values to
    the highest. Each group is dealt to the clients by shares from a Dirichlet distribution, as
    ``DirichletPartitioner`` deals a class. Every example is used once, and examples are left as they are.

    The feature is one that the data has. Li et al. (ICDE 2022, arXiv 2102.02079) also make a feature skew by adding
    noise of another strength at each client, which is a matter of the client's dataset and not of who has which
    example: give each client a dataset of its own with its transform, and use ``NaturalPartitioner()``.

    For a feature with names instead of numbers, such as a device or a site, use
    ``DirichletPartitioner(alpha, labels=devices)``, or ``NaturalPartitioner(sites)`` if each is a client. For several
    numbers an example, such as an embedding, cluster them and pass the clusters as such labels.

    Args:
        features: One number for each example, as a tensor, array, pandas Series or sequence; if a sampler picks a part
            of the dataset, of the whole dataset. Or a function of an example, as the dataset gives it, that returns
            its number: it is called with each example at fit start, so all of them are loaded once, in each process.
        alpha: Concentration, > 0. 0.1: most clients have a narrow range of the feature; 100: nearly IID.
        num_groups: Groups that the feature is cut into.
        min_examples: Each client gets at least so many; those with fewer take examples at random from the largest.

    Raises:
        ValueError: If an argument is out of range; and at fit start, if there is not one number for each example, one
            is missing, or there are fewer than ``num_clients * min_examples`` examples.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_lbgm.data import make_partitions
        >>> data = TensorDataset(torch.rand(100, 28, 28))
        >>> partitioner = FeaturePartitioner(lambda example: example[0].mean(), alpha=0.1)
        >>> parts = make_partitions(data, 4, partitioner, seed=0)
        >>> sum(len(part) for part in parts)
        100
    """

    def __init__(
        self,
        features: Sequence[Any] | Callable[[Any], float],
        alpha: float,
        num_groups: int = 10,
        min_examples: int = 1,
    ) -> None:
        self.features = features
        self.alpha = check_alpha("FeaturePartitioner", alpha, 0.5)
        self.num_groups = check_at_least_one("FeaturePartitioner", "num_groups", num_groups)
        self.min_examples = check_at_least_one("FeaturePartitioner", "min_examples", min_examples)

    def partition(self, dataset: Dataset[Any], num_clients: int, rng: np.random.Generator) -> list[Any]:
        order = rng.permutation(len(dataset))  # type: ignore[arg-type]  # among equal values
        values = self._values(dataset, int(rng.integers(2**31)))
        by_value = order[np.argsort(values[order], kind="stable")]
        groups = np.empty(len(values), dtype=np.int64)
        groups[by_value] = np.arange(len(values)) * self.num_groups // len(values)
        return deal_by_shares(groups, num_clients, self.alpha, self.min_examples, rng)

    def _values(self, dataset: Dataset[Any], seed: int) -> Any:
        argument = "`FeaturePartitioner(features=...)`"
        if callable(self.features):
            return self._computed(dataset, seed)
        values = as_array(self.features)
        if isinstance(dataset, SampledSubset):
            values = dataset.select(values, argument)
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.shape != (len(dataset),):  # type: ignore[arg-type]
            raise ValueError(
                f"{argument} must hold one number for each of the {len(dataset)} training examples; got the shape"  # type: ignore[arg-type]
                f" {values.shape}. For several numbers an example, cluster them and use `DirichletPartitioner(alpha,"
                " labels=clusters)`."
            )
        try:
            numbers = values.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{argument} must hold numbers; got {values[0]!r}. For names use `DirichletPartitioner(alpha,"
                " labels=names)`, or `NaturalPartitioner(names)` if each is a client."
            ) from error
        if np.isnan(numbers).any():
            places = np.flatnonzero(np.isnan(numbers))
            first = int(dataset.positions[places[0]]) if isinstance(dataset, SampledSubset) else int(places[0])
            raise ValueError(
                f"{argument}: {len(places)} of {len(numbers)} are missing (None or NaN), the first at position {first}."
                " Give each example its number, or leave these examples out of the training set."
            )
        return numbers

    def _computed(self, dataset: Dataset[Any], seed: int) -> Any:
        """Call the function with each example; transforms of the dataset that are random are seeded."""
        assert callable(self.features)
        values = np.empty(len(dataset))  # type: ignore[arg-type]
        with isolated_rng():
            seed_global_rng(seed)
            for index in range(len(values)):
                value = self.features(dataset[index])
                try:
                    values[index] = float(value)
                except (TypeError, ValueError, RuntimeError):
                    values[index] = np.nan
                if np.isnan(values[index]):
                    raise ValueError(
                        f"`FeaturePartitioner(features={describe(self.features)})` returned {value!r} for example"
                        f" {index}: return one number for an example."
                    )
        return values
