"""Seeding of the random generators that a loader, its samplers and its dataset hold."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch

from lightning_lbgm.core.rng import derive_seed

__all__ = ["seed_own_generators", "set_epoch"]

_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def seed_own_generators(loader: object, seed: int) -> None:
    """Seed the generators that are attributes of a loader, sampler or batch sampler, and of what they hold in turn.

    Looked at are the parts named ``dataset``, ``datasets``, ``sampler``, ``batch_sampler`` and ``collate_fn``. Seeded
    are generators of torch, NumPy and Python, each with a seed of its own; what is kept elsewhere goes on as it is.
    """
    seen: set[int] = set()
    number = 0
    for part in _parts(loader, seen):
        for value in list(getattr(part, "__dict__", {}).values()):
            if isinstance(value, _GENERATORS) and id(value) not in seen:
                seen.add(id(value))
                _seed(value, derive_seed(seed, "own generators", number))
                number += 1


def set_epoch(loader: object, epoch: int) -> None:
    """Tell the samplers of a loader the epoch, as far as they ask for it with a method ``set_epoch``."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    for sampler in {id(sampler): sampler for sampler in samplers}.values():
        method = getattr(sampler, "set_epoch", None)
        if callable(method):
            method(epoch)


def _parts(part: object, seen: set[int]) -> Iterator[object]:
    if part is None or id(part) in seen:
        return
    seen.add(id(part))
    yield part
    for name in ("dataset", "sampler", "batch_sampler", "collate_fn"):
        yield from _parts(getattr(part, name, None), seen)
    datasets = getattr(part, "datasets", None)
    if isinstance(datasets, (list, tuple)):
        for dataset in datasets:
            yield from _parts(dataset, seen)


def _seed(value: object, seed: int) -> None:
    if isinstance(value, torch.Generator):
        value.manual_seed(seed)
    elif isinstance(value, random.Random):
        value.seed(seed)
    elif isinstance(value, np.random.RandomState):
        value.seed(seed % 2**32)
    else:
        assert isinstance(value, np.random.Generator)
        fresh = type(value.bit_generator)(seed)
        value.bit_generator.state = fresh.state
