"""Client loaders: each client has a DataLoader of its own, and its batches are taken as they come."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_lbgm.core.rng import derive_seed, isolated_rng, seed_global_rng
from lightning_lbgm.data.columns import is_map_dataset
from lightning_lbgm.data.feed import EvaluationData, LocalBatch
from lightning_lbgm.data.seeding import seed_own_generators, set_epoch

__all__ = ["LoaderFeed", "batch_size_of"]

_LONG_PASS = 10_000  # batches, when counting


class LoaderFeed:
    """Draw local batches from a loader for each client.

    A pass of a client is one iteration of its loader. Before it, and before each of its batches, the global generators
    are seeded (and before it those that the loader, its samplers and its dataset keep as attributes), so that a
    client's batches are a pure function of ``(seed, round, client)``, as far as the loader has no other state. The
    global generators are given back as they were. Worker processes end with their client's pass.

    n_k is the number of examples in a pass: the length of the sampler or dataset. If a loader does not know it, the
    loader is gone through once, without training, before the first round; a batch has as many examples as ``self.log``
    takes for its size. ``local_steps`` bounds that pass, so all clients are then counted in this way: n_k is what each
    goes through in its first ``local_steps`` batches.

    Attributes:
        client_names: The clients' names.
        next_cohort: Not used: loaders do not work ahead of their client's turn.
        held_out: The examples that clients are evaluated on and do not train with, if there are some.

    Args:
        loaders: One for each client: a DataLoader or another iterable of batches that can be iterated again.
        names: Their names.
        local_epochs: Passes of a client in a round.
        local_steps: Batches of a client in a round, instead; its loader is started again as often as needed.
        seed: The run's seed.
        world_size: Number of processes.
        purpose: What the loaders are for, in errors.

    Raises:
        TypeError: If one of them is not an iterable of batches.
        ValueError: If one of them cannot be iterated again, is empty, or gives each process other examples.
    """

    held_out: EvaluationData | None = None

    def __init__(
        self,
        loaders: Sequence[Any],
        names: Sequence[str],
        local_epochs: int | None,
        local_steps: int | None,
        seed: int,
        world_size: int = 1,
        purpose: str = "training",
    ) -> None:
        self.loaders = list(loaders)
        self.client_names: tuple[str, ...] | None = tuple(names)
        self.seed = seed
        self.next_cohort: Callable[[int], tuple[int, ...]] | None = None
        self._names = tuple(names)
        self._purpose = purpose
        self._local_steps = local_steps
        self._local_epochs = local_epochs or 1
        for loader, name in zip(self.loaders, self._names):
            _check(loader, name, world_size, purpose)
        self._examples = [_known_examples(loader) for loader in self.loaders]
        self._batches = [_length(loader) for loader in self.loaders]  # in a pass
        for name, count in itertools.chain(zip(self._names, self._examples), zip(self._names, self._batches)):
            if count == 0:
                raise ValueError(_empty(name, "at the start of the fit", purpose))
        self._fingerprint = hashlib.blake2b(repr(list(zip(names, self._examples))).encode(), digest_size=16).hexdigest()
        self._is_prepared = False

    @property
    def num_clients(self) -> int:
        """Return K."""
        return len(self.loaders)

    def prepare(self, world: Any) -> None:
        """Count the examples of the loaders that do not say how many they have, each in one process."""
        if self._is_prepared:
            return
        unsized = [k for k, count in enumerate(self._examples) if count is None]
        if self._local_steps is not None and unsized:
            to_count = list(range(self.num_clients))
        else:
            needed = self._batches if self._local_steps is None else self._examples
            to_count = sorted({*unsized, *(k for k, count in enumerate(needed) if count is None)})
        if to_count:
            counted = {k: self._count(k) for k in to_count if k % world.size == world.rank}
            for part in world.gather(counted, "the clients' numbers of examples"):
                for client_id, (examples, batches) in part.items():
                    self._batches[client_id] = batches
                    if self._examples[client_id] is None or self._local_steps is not None:
                        self._examples[client_id] = examples
        self._is_prepared = True

    def _count(self, client_id: int) -> tuple[int, int]:
        """Return the examples and batches of the client's first pass, up to ``local_steps`` batches."""
        examples = batches = 0
        for data in itertools.islice(self._pass(0, client_id, 0), self._local_steps):
            examples += batch_size_of(data)
            batches += 1
            if batches == _LONG_PASS:
                warnings.warn(
                    f"The loader of client {self._names[client_id]!r} has given {batches} batches and goes on, and a"
                    " local epoch lasts until it ends. If it never does, pass `LBGMFederated(local_steps=...)`.",
                    stacklevel=2,
                )
        if batches == 0:
            raise ValueError(_empty(self._names[client_id], "at the start of the fit", self._purpose))
        return examples, batches

    def num_examples(self, client_id: int) -> int:
        """Return n_k."""
        count = self._examples[client_id]
        assert count is not None, "not prepared"
        return count

    def num_steps(self, client_id: int) -> int:
        """Return the number of local steps of a client in a round."""
        if self._local_steps is not None:
            return self._local_steps
        batches = self._batches[client_id]
        assert batches is not None, "not prepared"
        return self._local_epochs * batches

    def work(self, client_id: int) -> int:
        """Return the client's local work in a round: steps times the mean batch size, at least 1."""
        steps, batches = self.num_steps(client_id), self._batches[client_id]
        return max(1, steps * self.num_examples(client_id) // (batches or 1))

    def fingerprint(self) -> str:
        """Return a hash of the clients' names and of how many examples their loaders say they have."""
        return self._fingerprint

    def stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Yield each client of the cohort with its batches of this round; batches not taken are skipped."""
        for client_id in cohort:
            yield client_id, self.turn(round_index, client_id)

    def rest(self) -> None:
        """Do nothing: workers end with their client's pass."""

    def turn(self, round_index: int, client_id: int) -> Iterator[LocalBatch]:
        """Yield the batches of one client in a round."""
        steps = 0
        for pass_index in itertools.count():
            before = steps
            for data in self._pass(round_index, client_id, pass_index):
                yield LocalBatch(data, batch_size_of(data))
                steps += 1
                if steps == self._local_steps:
                    return
            if steps == before:
                raise ValueError(_empty(self._names[client_id], f"in round {round_index}", self._purpose))
            if self._local_steps is None and pass_index + 1 == self._local_epochs:
                return

    def _pass(self, round_index: int, client_id: int, pass_index: int) -> Iterator[Any]:
        loader, place = self.loaders[client_id], (round_index, client_id, pass_index)
        _end_workers(loader)  # persistent ones would go on with the generators of an earlier pass
        with isolated_rng():
            seed_global_rng(derive_seed(self.seed, "loader", *place))
            seed_own_generators(loader, derive_seed(self.seed, "loader", *place))
            set_epoch(loader, round_index * self._local_epochs + pass_index)
            iterator = iter(loader)
        try:
            for step in itertools.count():
                with isolated_rng():
                    seed_global_rng(derive_seed(self.seed, "loader", *place, step))
                    try:
                        data = next(iterator)
                    except StopIteration:
                        return
                yield data
        finally:
            _end_workers(loader)


def batch_size_of(batch: Any) -> int:
    """Return what ``self.log`` takes for a batch's size: the length of the first tensor in it.

    1 if that is no positive number or there is no tensor. NumPy arrays are not looked into, and iterators, which could
    be read only once, neither.

    Examples:
        >>> import torch
        >>> batch_size_of({"name": ["a", "b"], "x": torch.zeros(4, 2)}), batch_size_of(torch.tensor(5.0))
        (4, 1)
    """
    return max(1, next(_lengths(batch), 1))


def _lengths(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield len(batch) if batch.ndim else 1
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(_lengths, batch.values()))
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from itertools.chain.from_iterable(_lengths(getattr(batch, field.name)) for field in fields(batch))
    elif isinstance(batch, Iterable) and isinstance(batch, Sized) and not isinstance(batch, (str, bytes, np.ndarray)):
        yield from itertools.chain.from_iterable(map(_lengths, batch))


def _check(loader: Any, name: str, world_size: int, purpose: str) -> None:
    advice = "Give each client a `DataLoader`, or another iterable of batches that can be iterated again."
    if is_map_dataset(loader):
        raise TypeError(
            f"The {purpose} loader of client {name!r} is a dataset, {type(loader).__name__}, not a loader: wrap it in"
            " `DataLoader(dataset, batch_size=...)`."
        )
    if isinstance(loader, (Tensor, str, bytes)) or not isinstance(loader, Iterable):
        raise TypeError(f"The {purpose} loader of client {name!r} is a {type(loader).__name__}. {advice}")
    if inspect.isgenerator(loader) or isinstance(loader, (zip, map, filter, enumerate)):
        raise ValueError(
            f"The {purpose} loader of client {name!r} is a {type(loader).__name__}, which can be iterated only once,"
            f" but is in each round. {advice}"
        )
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
        if world_size > 1 and isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                f"The {purpose} loader of client {name!r} has a `DistributedSampler`, which gives each process other"
                " examples, but a client is trained in one process, whichever has time. Use `shuffle=True`: the"
                " clients are what is split over the processes."
            )


def _known_examples(loader: Any) -> int | None:
    """Return the number of examples in a pass, as far as the loader says it."""
    dataset = getattr(loader, "dataset", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = batch_sampler.sampler if type(batch_sampler) is BatchSampler else None
    drawn = None if isinstance(dataset, IterableDataset) else _length(sampler)
    return _length(dataset) if drawn is None else drawn


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def _end_workers(loader: Any) -> None:
    """Let go of the iterator that a DataLoader with persistent workers keeps; its workers end with it."""
    if isinstance(loader, DataLoader) and loader.num_workers > 0:
        loader._iterator = None


def _empty(name: str, when: str, purpose: str) -> str:
    return (
        f"The {purpose} loader of client {name!r} gives no batch {when}: it is empty, drops its only batch"
        " (`drop_last=True`), or cannot be iterated again. Leave the client out, or give it a loader with examples."
    )
