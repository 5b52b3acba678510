"""Sampling settings of the training DataLoader: batch size, sampler and how it iterates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_lbgm.core.rng import derive_seed, isolated_rng, seed_global_rng
from lightning_lbgm.data.batches import BatchPlan, Draws
from lightning_lbgm.data.seeding import seed_own_generators, set_epoch
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["RandomDraws", "SamplerOrder", "iterates_by_itself", "plan_from_loader", "read_loader"]

_LOADING = ("__iter__", "__next__", "_get_iterator", "_index_sampler", "_auto_collation")
"""What decides in torch's DataLoader which batches come."""

_OTHER_SAMPLERS = (
    "Use `shuffle=True`, `SubsetRandomSampler(indices)` for a part of the data or `WeightedRandomSampler(weights, n)`;"
    " or give each client a loader of its own, with any sampler, as `fit(model, [loader_a, loader_b])` with"
    " `LBGMFederated(num_clients=None)`."
)


def iterates_by_itself(loader: DataLoader[Any]) -> str | None:
    """Return the method by which a subclass of DataLoader changes what it loads, or None if there is none."""
    cls = type(loader)
    for name in _LOADING:
        if getattr(cls, name, None) is not getattr(DataLoader, name, None) or name in vars(loader):
            return name
    return None


def plan_from_loader(loader: DataLoader[Any], local_epochs: int | None, local_steps: int | None) -> BatchPlan:
    """Read the batch size and ``drop_last`` off the user's DataLoader, and shuffling as far as its sampler is plain.

    Raises:
        ValueError: If the DataLoader has a batch sampler of its own, or no batch size.
    """
    batch_sampler = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        raise ValueError(
            "The training DataLoader has a batch sampler of its own or `batch_size=None`, so the batch size of a"
            " client's local steps is unknown. Use `DataLoader(dataset, batch_size=..., shuffle=True)`: each client's"
            " batches are then drawn from its own examples. Or give each client a loader of its own, with any batch"
            " sampler, as `fit(model, [loader_a, loader_b])` with `LBGMFederated(num_clients=None)`."
        )
    return BatchPlan(
        batch_size=batch_sampler.batch_size,
        local_steps=local_steps,
        local_epochs=local_epochs or 1,
        shuffle=isinstance(batch_sampler.sampler, RandomSampler),
        drop_last=batch_sampler.drop_last,
    )


def read_loader(
    loader: DataLoader[Any], local_epochs: int | None, local_steps: int | None, seed: int = 0, world_size: int = 1
) -> tuple[Dataset[Any], BatchPlan]:
    """Return the training set, the part of the dataset that the sampler picks, and how clients go through their share.

    A sampler that picks a fixed set of examples defines the training set. One that draws at random, with weights or
    with replacement, is restricted to each client's examples, and a pass of a client is as long as its share of the
    examples is. Any other sampler is run to see what it does: it must pick the same examples each time, and the order
    it gives is then kept among a client's own.

    Args:
        loader: The user's DataLoader.
        local_epochs: Passes of a client in a round.
        local_steps: Steps of a client in a round, instead.
        seed: The run's seed.
        world_size: Number of processes. A ``DistributedSampler`` over as many replicas splits the examples over them,
            so that all of them are the training set.

    Raises:
        ValueError: If the batch size is unknown, or the sampler does what cannot be done for each client.
    """
    plan = plan_from_loader(loader, local_epochs, local_steps)
    sampler: Any = loader.batch_sampler.sampler  # type: ignore[union-attr]
    dataset, kind = loader.dataset, type(sampler)
    size = len(dataset)  # type: ignore[arg-type]
    if kind is SequentialSampler:
        return _first(dataset, len(sampler.data_source)), plan
    if kind is RandomSampler:
        source = len(sampler.data_source)
        draws = RandomDraws(sampler.num_samples / source, sampler.replacement) if source else None
        plain = not sampler.replacement and sampler.num_samples == source
        return _first(dataset, source), replace(plan, draws=None if plain else draws)
    if kind is SubsetRandomSampler:
        return SampledSubset(dataset, _integers(sampler.indices, sampler)), replace(plan, shuffle=True)
    if kind is WeightedRandomSampler:
        weights = sampler.weights.detach().cpu().double()
        positive = weights.nonzero().flatten()
        if not sampler.replacement and sampler.num_samples > len(positive):
            raise ValueError(
                f"The training DataLoader's `WeightedRandomSampler(num_samples={sampler.num_samples},"
                f" replacement=False)` has only {len(positive)} examples with a weight above 0: lower `num_samples`."
            )
        weighted: Draws = RandomDraws(
            sampler.num_samples / max(len(positive), 1), sampler.replacement, weights[positive]
        )
        picked = dataset if len(positive) == len(weights) == size else SampledSubset(dataset, positive)
        return picked, replace(plan, draws=weighted)
    if kind is DistributedSampler and sampler.num_replicas == world_size:
        return _first(dataset, len(sampler.dataset)), replace(plan, shuffle=sampler.shuffle)
    indices, order = _observe(sampler, size, seed, plan.local_epochs)
    whole = len(indices) == size and np.array_equal(indices, np.arange(size))
    return dataset if whole else SampledSubset(dataset, indices), replace(plan, shuffle=False, draws=order)


def _first(dataset: Dataset[Any], count: int) -> Dataset[Any]:
    """Return what a sampler over a data source of that length picks."""
    return dataset if count == len(dataset) else SampledSubset(dataset, range(count))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class RandomDraws:
    """Draw a pass of a client at random, as torch's random samplers draw theirs from the whole dataset.

    Args:
        share: Examples in a pass over the client's examples: the sampler's ``num_samples / n``.
        replacement: Whether an example may come again before all have come.
        weights: One weight above 0 for each example of the training set, shape ``(n,)``; None: all the same.
    """

    share: float
    replacement: bool
    weights: Tensor | None = None

    def pass_size(self, num_examples: int) -> int:
        """Return the nearest whole number to the client's share, at least 1."""
        return max(1, round(self.share * num_examples))

    def draw(self, partition: Tensor, generator: torch.Generator, round_index: int, pass_index: int) -> Tensor:
        """Draw one pass."""
        n, size = len(partition), self.pass_size(len(partition))
        if self.weights is not None:
            drawn = torch.multinomial(self.weights[partition], size, self.replacement, generator=generator)
        elif self.replacement:
            drawn = torch.randint(n, (size,), generator=generator)
        else:  # all of them as often as they fit, then a part
            drawn = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-size // n))])[:size]
        return partition[drawn]


class SamplerOrder:
    """Order a client's pass as the user's sampler orders the whole training set, restricted to the client's examples.

    Args:
        sampler: Gives the same indices each time, in an order that may change.
        indices: These indices in the order of the training set, shape ``(n,)``.
        seed: The run's seed: the sampler's order is a pure function of it, the round and the pass.
        local_epochs: Passes in a round.
    """

    def __init__(self, sampler: Any, indices: Any, seed: int, local_epochs: int) -> None:
        self._sampler = sampler
        self._sorted = np.argsort(indices, kind="stable")
        self._indices = indices[self._sorted]
        self._seed, self._local_epochs = seed, local_epochs
        self._ranks: dict[tuple[int, int], Tensor] = {}  # by round and pass: all clients of a round ask for them

    def pass_size(self, num_examples: int) -> int:
        """Return the number of examples: each comes once."""
        return num_examples

    def draw(self, partition: Tensor, generator: torch.Generator, round_index: int, pass_index: int) -> Tensor:
        """Return the client's examples in the sampler's order."""
        place = (round_index, pass_index)
        if place not in self._ranks:
            # Workers may be a round ahead.
            self._ranks = {known: rank for known, rank in self._ranks.items() if abs(known[0] - round_index) <= 1}
            self._ranks[place] = self._rank(*place)
        return partition[self._ranks[place][partition].argsort()]

    def _rank(self, round_index: int, pass_index: int) -> Tensor:
        """Return the place of each example of the training set in the sampler's order."""
        seed = derive_seed(self._seed, "sampler", round_index, pass_index)
        epoch = round_index * self._local_epochs + pass_index
        order = _run(self._sampler, len(self._indices), seed, epoch)
        arranged = None if order is None else np.argsort(order, kind="stable")
        if order is None or arranged is None or not np.array_equal(order[arranged], self._indices):
            raise ValueError(
                f"The training DataLoader's {_name(self._sampler)} picks other examples in round {round_index} than at"
                f" the start of the fit, but they were dealt to the clients then. {_OTHER_SAMPLERS}"
            )
        rank = np.empty(len(order), dtype=np.int64)
        rank[self._sorted] = arranged
        return torch.from_numpy(rank)


def _observe(sampler: Any, size: int, seed: int, local_epochs: int) -> tuple[Any, SamplerOrder | None]:
    """Run a sampler that nothing is known of.

    Returns:
        The indices that it gives each time, and their order if that changes.
    """
    most = 10 * size + 1000  # more is taken for endless
    first = _run(sampler, most, derive_seed(seed, "sampler", 0, 0), 0)
    again = _run(sampler, most, derive_seed(seed, "sampler", 0, 0), 0)
    other = _run(sampler, most, derive_seed(seed, "sampler", 1, 0), 1)
    if first is None or again is None or other is None:
        problem = "does not end"
    elif not np.array_equal(first, again):
        problem = (
            "gives other indices when it is iterated again after the same seeds, so a resumed run would differ from an"
            " unbroken one"
        )
    elif np.array_equal(first, other):
        return first, None
    elif np.array_equal(np.sort(first), np.sort(other)):
        indices = np.sort(first)
        return indices, SamplerOrder(sampler, indices, seed, local_epochs)
    else:
        problem = "picks other examples each time, so what it does cannot be restricted to each client's examples"
    raise ValueError(f"The training DataLoader's {_name(sampler)} {problem}. {_OTHER_SAMPLERS}")


def _run(sampler: Any, most: int, seed: int, epoch: int) -> Any:
    """Return a sampler's indices, or None if there are more than ``most``."""
    with isolated_rng():
        seed_global_rng(seed)
        seed_own_generators(sampler, seed)
        set_epoch(sampler, epoch)
        indices = list(itertools.islice(sampler, most + 1))
    return None if len(indices) > most else _integers(indices, sampler)


def _integers(indices: Iterable[Any], sampler: Any) -> Any:
    given = indices.tolist() if isinstance(indices, (Tensor, np.ndarray)) else list(indices)
    found = np.asarray(given if given else np.empty(0, dtype=np.int64))
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(
            f"The training DataLoader's {_name(sampler)} must give indices, whole numbers; it gives {given[0]!r}."
            f" {_OTHER_SAMPLERS}"
        )
    return found.astype(np.int64)


def _name(sampler: Any) -> str:
    return f"sampler of type {type(sampler).__name__}"
