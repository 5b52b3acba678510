"""Hold-out: a part of each client's training examples that it is evaluated on and never trains with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_lbgm.core.rng import derive_seed
from lightning_lbgm.data.loading import loader_like
from lightning_lbgm.data.sampling import iterates_by_itself
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["hold_out", "hold_out_of_loader", "hold_out_of_partitions", "obstacle_to_indexing"]


def hold_out(examples: Tensor, share: float, seed: int, client_id: int) -> tuple[Tensor, Tensor]:
    """Split a client's examples at random into those that it trains with and those that are held out.

    A pure function of its arguments. The nearest whole number to ``share`` of the distinct examples is held out, at
    least one; at least one is kept for training, and an only example is not held out.

    Args:
        examples: The client's examples, shape ``(n_k,)``. One that comes several times is on one side only.
        share: Share to hold out, in (0, 1).
        seed: The run's seed.
        client_id: The client.

    Returns:
        Positions in ``examples``, increasing: of those to train with, and of those held out.

    Examples:
        >>> train, held_out = hold_out(torch.arange(10), 0.2, seed=0, client_id=3)
        >>> len(train), len(held_out), sorted([*train.tolist(), *held_out.tolist()]) == list(range(10))
        (8, 2, True)
    """
    distinct = np.unique(examples.numpy())
    count = 0 if len(distinct) < 2 else min(max(1, round(share * len(distinct))), len(distinct) - 1)
    rng = np.random.default_rng(derive_seed(seed, "hold out", client_id))
    held_out = np.isin(examples.numpy(), rng.permutation(distinct)[:count])
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def hold_out_of_partitions(
    partitions: Sequence[Tensor], dataset: Dataset[Any], share: float, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Split the partition of each client into what it trains with and what is held out.

    Args:
        partitions: Each client's example indices into the dataset.
        dataset: The training set. A sampler may have picked an example of its dataset twice.
        share: Share to hold out, in (0, 1).
        seed: The run's seed.
    """
    picked = dataset.positions if isinstance(dataset, SampledSubset) else None
    train, held_out = [], []
    for client_id, partition in enumerate(partitions):
        kept, out = hold_out(partition if picked is None else picked[partition], share, seed, client_id)
        train.append(partition[kept])
        held_out.append(partition[out])
    return train, held_out


def hold_out_of_loader(loader: Any, name: str, share: float, seed: int, client_id: int) -> tuple[Any, Any]:
    """Split the loader of a client into one to train with, with the same settings, and one of what is held out.

    Args:
        loader: The client's loader.
        name: The client's name, for errors.
        share: Share to hold out, in (0, 1).
        seed: The run's seed.
        client_id: The client.

    Returns:
        Two DataLoaders; the second is None if there is only one example.

    Raises:
        ValueError: If the loader's examples cannot be told apart, because it is none of torch's own ``DataLoader``s
            over a map-style dataset with a plain sampler.
    """
    obstacle = obstacle_to_indexing(loader)
    if obstacle is not None:
        raise ValueError(
            f"`ClientEvaluation(split={share})` cannot hold out examples of client {name!r}: {obstacle}. Pass what the"
            " clients are to be evaluated on instead, a dataset or DataLoader for each:"
            " `ClientEvaluation(data={client: its_validation_set, ...})`."
        )
    batch_sampler, dataset = loader.batch_sampler, loader.dataset
    sampler = batch_sampler.sampler
    picked = sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(len(dataset))
    examples = torch.as_tensor(list(map(int, picked)), dtype=torch.int64)
    kept, out = (examples[part] for part in hold_out(examples, share, seed, client_id))
    if not len(out):
        return loader, None
    subset = Subset(dataset, kept.tolist())
    order = SequentialSampler(subset) if type(sampler) is SequentialSampler else _shuffled(subset, sampler)
    train = loader_like(loader, subset, sampler=order, drop_last=batch_sampler.drop_last)
    return train, loader_like(loader, Subset(dataset, out.tolist()))


def _shuffled(subset: Subset[Any], sampler: Any) -> RandomSampler:
    return RandomSampler(subset, generator=sampler.generator)


def obstacle_to_indexing(loader: Any) -> str | None:
    """Return why it is not known which examples of its dataset a loader gives, each once in a pass, or None."""
    if not isinstance(loader, DataLoader):
        return f"its loader is a {type(loader).__name__}, not a `DataLoader`"
    if isinstance(loader.dataset, IterableDataset):
        return f"its dataset {type(loader.dataset).__name__} is an `IterableDataset`, whose examples have no index"
    method = iterates_by_itself(loader)
    if method is not None:
        return f"its loader's class {type(loader).__name__} has a `{method}` of its own"
    if type(loader.batch_sampler) is not BatchSampler:
        return "its loader has a batch sampler of its own or `batch_size=None`"
    sampler: Any = loader.batch_sampler.sampler
    if type(sampler) not in (SequentialSampler, RandomSampler, SubsetRandomSampler):
        return f"its loader has a {type(sampler).__name__}"
    if type(sampler) is RandomSampler and (sampler.replacement or sampler.num_samples != len(loader.dataset)):  # type: ignore[arg-type]
        return "its loader's `RandomSampler` draws with replacement or another number of examples than there are"
    return None
