"""Feed of a cohort's local batches, from the dataset of the user's DataLoader and by its settings."""

from __future__ import annotations

import functools
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_lbgm.core.rng import derive_seed, isolated_rng, seed_global_rng
from lightning_lbgm.data.batches import BatchPlan
from lightning_lbgm.data.bulk import bulk_reader
from lightning_lbgm.data.loading import loading_of
from lightning_lbgm.data.prefetch import Prefetch, Request
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["ClientFeed", "EvaluationData", "Feed", "LocalBatch"]


class LocalBatch(NamedTuple):
    """One local batch: what the user's collate function made, and of how many examples."""

    data: Any
    size: int


class Feed(Protocol):
    """Where a round's local batches come from.

    Attributes:
        seed: The run's seed.
        client_names: The clients' names, if they have some.
        next_cohort: Returns a round's cohort, so that workers can go on to it; None if it is not known ahead: they stop
            at a round's end.
        held_out: The examples that clients are evaluated on and do not train with, if there are some.
    """

    seed: int
    client_names: tuple[str, ...] | None
    next_cohort: Callable[[int], tuple[int, ...]] | None
    held_out: EvaluationData | None

    @property
    def num_clients(self) -> int:
        """Return K."""

    def prepare(self, world: Any) -> None:
        """Find out what must be known of the clients before a round; every process must call it. Can be repeated."""

    def num_examples(self, client_id: int) -> int:
        """Return n_k."""

    def num_steps(self, client_id: int) -> int:
        """Return the number of local steps of a client in a round."""

    def work(self, client_id: int) -> int:
        """Return the client's local work in a round: steps times batch size, positive."""

    def fingerprint(self) -> str:
        """Return a hash of who has which examples."""

    def stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Yield each client of the cohort with its batches of this round; batches not taken are skipped."""

    def turn(self, round_index: int, client_id: int) -> Iterator[LocalBatch]:
        """Yield the batches of one client alone in a round, the same as ``stream`` does, loaded in this process."""

    def rest(self) -> None:
        """End worker processes that wait for more; the next ``stream`` starts others."""


class ClientFeed:
    """Draw local batches, client by client.

    The order of a client's batches, and the seed that its transforms see, are a pure function of
    ``(seed, round, client, batch)``: the same with any number of workers, in any cohort, after any resume.
    A dataset of tensors is indexed in bulk; others go through one DataLoader with persistent workers, which fetch
    ahead across the clients of a round and into the next one.

    Attributes:
        next_cohort: Returns a round's cohort, so that workers can go on to it; None: they stop at a round's end.
        client_names: None: clients that data was dealt to have no names.
        held_out: The examples that clients are evaluated on and do not train with, if there are some.
        loader: The user's DataLoader.
        dataset: The training set.

    Args:
        loader: The user's DataLoader: ``collate_fn``, workers and their settings are taken from it.
        plan: How a client goes through its examples.
        partitions: Example indices of each client, into the dataset.
        seed: The run's seed.
        dataset: The training set, if that is not all of the DataLoader's dataset.
        wrap: Applied to each batch, if the user's loader stood in a container.
    """

    client_names: tuple[str, ...] | None = None
    held_out: EvaluationData | None = None

    def __init__(
        self,
        loader: DataLoader[Any],
        plan: BatchPlan,
        partitions: Sequence[Tensor],
        seed: int,
        dataset: Dataset[Any] | None = None,
        wrap: Callable[[Any], Any] | None = None,
    ) -> None:
        self.loader = loader
        self.plan = plan
        self.partitions = list(partitions)
        self.seed = seed
        self._generator = torch.Generator()
        self.dataset = loader.dataset if dataset is None else dataset
        self._collate = loader.collate_fn
        self._wrap = wrap
        self._bulk = bulk_reader(self.dataset) if loader.collate_fn is default_collate else None
        self.next_cohort: Callable[[int], tuple[int, ...]] | None = None
        self._prefetch: Prefetch | None = None
        if self._bulk is None and loader.num_workers > 0:
            me = weakref.proxy(self)  # no circle, see Prefetch
            self._prefetch = Prefetch(
                lambda round_index, client_id: me._client_requests(round_index, client_id),
                lambda round_index, cohort: me._next_cohort_after(round_index, cohort),
                functools.partial(_worker_loader, loader, self.dataset),
            )

    @property
    def num_clients(self) -> int:
        """Return K."""
        return len(self.partitions)

    def prepare(self, world: Any) -> None:
        """Do nothing: all is known."""

    def num_examples(self, client_id: int) -> int:
        """Return n_k."""
        return len(self.partitions[client_id])

    def num_steps(self, client_id: int) -> int:
        """Return the number of local steps of a client in a round."""
        return self.plan.num_steps(self.num_examples(client_id))

    def work(self, client_id: int) -> int:
        """Return the client's local work in a round: steps times batch size."""
        pass_size = self.plan.pass_size(self.num_examples(client_id))
        return self.num_steps(client_id) * min(self.plan.batch_size, pass_size)

    def fingerprint(self) -> str:
        """Return a hash of which examples of the DataLoader's dataset are whose."""
        digest = hashlib.blake2b(digest_size=16)
        picked = self.dataset.positions if isinstance(self.dataset, SampledSubset) else None
        for partition in self.partitions:
            indices = partition if picked is None else picked[partition]
            digest.update(indices.numpy().tobytes() + b"|")
        return digest.hexdigest()

    def stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Yield each client of the cohort with its batches of this round; batches not taken are skipped."""
        streams = self._stream(round_index, cohort)
        if self._wrap is None:
            yield from streams
            return
        wrap = self._wrap
        for client_id, batches in streams:
            yield client_id, (LocalBatch(wrap(batch.data), batch.size) for batch in batches)

    def turn(self, round_index: int, client_id: int) -> Iterator[LocalBatch]:
        """Yield the batches of one client alone in a round, the same as ``stream`` does, loaded in this process."""
        for batch in self._turn(round_index, client_id):
            yield batch if self._wrap is None else LocalBatch(self._wrap(batch.data), batch.size)

    def rest(self) -> None:
        """End worker processes that wait for more; the next ``stream`` starts others."""
        if self._prefetch is not None:
            self._prefetch.rest()

    def _stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        if self._bulk is not None or self._prefetch is None:
            for client_id in cohort:
                yield client_id, self._turn(round_index, client_id)
        else:
            for client_id, batches in self._prefetch.stream(round_index, cohort):
                yield client_id, itertools.starmap(LocalBatch, batches)

    def _turn(self, round_index: int, client_id: int) -> Iterator[LocalBatch]:
        bulk = self._bulk
        if bulk is not None:
            return (LocalBatch(bulk(ix), len(ix)) for ix in self._order(round_index, client_id))
        return map(self._fetch, self._client_requests(round_index, client_id))

    def _next_cohort_after(self, round_index: int, cohort: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the cohort of the round after the given one; None if it is unknown."""
        if self.next_cohort is None:
            return None
        whole, following = self.next_cohort(round_index), self.next_cohort(round_index + 1)
        if cohort == whole:
            return following
        return cohort if whole == following else None  # a part of a cohort: other parts are trained elsewhere

    def _order(self, round_index: int, client_id: int) -> list[Tensor]:
        self._generator.manual_seed(derive_seed(self.seed, "batches", round_index, client_id))
        return self.plan.batches(self.partitions[client_id], self._generator, round_index)

    def _client_requests(self, round_index: int, client_id: int) -> list[Request]:
        return [
            (derive_seed(self.seed, "transforms", round_index, client_id, step), indices.tolist())
            for step, indices in enumerate(self._order(round_index, client_id))
        ]

    def _fetch(self, request: Request) -> LocalBatch:
        with isolated_rng():
            data = self._collate(_SeededDataset(self.dataset).__getitems__(request))
        return LocalBatch(data, len(request[1]))


class EvaluationData:
    """What clients are evaluated on: examples in a fixed order, of those clients that have some.

    Args:
        feed: Has as many clients as have examples; their batches of round 0 are a pass over the examples.
        clients: Their ids, in the feed's order.
    """

    def __init__(self, feed: Feed, clients: Sequence[int]) -> None:
        self.clients = tuple(clients)
        self._feed = feed
        self._positions = {client_id: position for position, client_id in enumerate(self.clients)}

    def batches(self, client_id: int) -> Iterator[LocalBatch]:
        """Yield the batches of one client, loaded in this process."""
        return self._feed.turn(0, self._positions[client_id])

    def stream(self, client_ids: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Yield each client with its batches, loaded by the DataLoader's workers, which end afterwards."""
        try:
            for position, batches in self._feed.stream(0, [self._positions[client_id] for client_id in client_ids]):
                yield self.clients[position], batches
        finally:
            self._feed.rest()


def _worker_loader(loader: DataLoader[Any], dataset: Dataset[Any], requests: Any) -> DataLoader[Any]:
    """Return a DataLoader with the user's settings that loads what is requested, with workers that stay."""
    return DataLoader(
        _SeededDataset(dataset),
        batch_sampler=requests,
        **loading_of(loader),
        persistent_workers=True,
        generator=torch.Generator(),  # its base seed must not be drawn from the global generator
    )


class _SeededDataset(Dataset[Any]):
    """Seed the global generators before a batch is loaded, so that random transforms do not depend on the worker."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, request: Request) -> list[Any]:
        seed, indices = request
        seed_global_rng(seed)
        load_many = getattr(self._dataset, "__getitems__", None)
        if callable(load_many):
            return list(load_many(indices))
        return [self._dataset[index] for index in indices]
