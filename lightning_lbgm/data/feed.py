"""The stream of a cohort's local batches, from the user's DataLoader's dataset and by its settings."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, default_collate

from lightning_lbgm.data.batches import BatchPlan, bulk_reader
from lightning_lbgm.rng import derive_seed, isolated_rng, seed_global_rng

__all__ = ["ClientFeed", "LocalBatch", "plan_from_loader"]

_Request = tuple[int, list[int]]  # a seed for transforms, and example indices


class LocalBatch(NamedTuple):
    """One local batch: what the user's collate function made, and of how many examples."""

    data: Any
    size: int


def plan_from_loader(loader: DataLoader[Any], local_epochs: int | None, local_steps: int | None) -> BatchPlan:
    """Read the batch size, shuffling and ``drop_last`` off the user's DataLoader.

    Raises:
        ValueError: If the DataLoader has a batch sampler of its own, or no batch size.
    """
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            "The training DataLoader has a batch sampler of its own or `batch_size=None`, so the batch size of a"
            " client's local steps is unknown. Use `DataLoader(dataset, batch_size=..., shuffle=True)`: each client's"
            " batches are then drawn from its own examples."
        )
    return BatchPlan(
        batch_size=loader.batch_size,
        local_steps=local_steps,
        local_epochs=local_epochs or 1,
        shuffle=not isinstance(loader.sampler, SequentialSampler),
        drop_last=loader.drop_last,
    )


def has_plain_sampler(loader: DataLoader[Any]) -> bool:
    """Tell whether shuffling within each client's examples says all that the DataLoader's sampler does."""
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    return isinstance(sampler, SequentialSampler)


class ClientFeed:
    """Draw local batches, client by client.

    The order of a client's batches, and the seed that its transforms see, are a pure function of
    ``(seed, round, client, batch)``: the same with any number of workers, in any cohort, after any resume.
    A dataset of tensors is indexed in bulk; others go through one DataLoader with persistent workers, which fetch
    ahead across the clients of a round.

    Args:
        loader: The user's DataLoader: dataset, ``collate_fn``, workers and their settings are taken from it.
        plan: How a client goes through its examples.
        partitions: Example indices of each client.
        seed: The run's seed.
    """

    def __init__(self, loader: DataLoader[Any], plan: BatchPlan, partitions: Sequence[Tensor], seed: int) -> None:
        self.plan = plan
        self.partitions = list(partitions)
        self.seed = seed
        self._generator = torch.Generator()
        self._dataset = loader.dataset
        self._collate = loader.collate_fn
        self._bulk = bulk_reader(loader.dataset) if loader.collate_fn is default_collate else None
        self._requests: list[_Request] = []
        self._worker_loader: DataLoader[Any] | None = None
        if self._bulk is None and loader.num_workers > 0:
            self._worker_loader = DataLoader(
                _SeededDataset(loader.dataset),
                batch_sampler=_Requests(self._requests),  # type: ignore[arg-type]
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
                persistent_workers=True,
                generator=torch.Generator(),  # its base seed must not be drawn from the global generator
            )

    def num_examples(self, client_id: int) -> int:
        """Return n_k."""
        return len(self.partitions[client_id])

    def work(self, client_id: int) -> int:
        """Return the client's local work in a round: steps times batch size."""
        num_examples = self.num_examples(client_id)
        return self.plan.num_steps(num_examples) * min(self.plan.batch_size, num_examples)

    def fingerprint(self) -> str:
        """Return a hash of which examples are whose."""
        digest = hashlib.blake2b(digest_size=16)
        for partition in self.partitions:
            digest.update(partition.numpy().tobytes() + b"|")
        return digest.hexdigest()

    def stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Yield each client of the cohort with its batches of this round; batches not taken are skipped."""
        if self._bulk is not None:
            for client_id in cohort:
                bulk = self._bulk
                yield client_id, (LocalBatch(bulk(ix), len(ix)) for ix in self._order(round_index, client_id))
        elif self._worker_loader is None:
            for client_id in cohort:
                yield client_id, map(self._fetch, self._client_requests(round_index, client_id))
        else:
            requests = {client_id: self._client_requests(round_index, client_id) for client_id in cohort}
            self._requests[:] = [request for client_id in cohort for request in requests[client_id]]
            fetched = iter(self._worker_loader)
            for client_id in cohort:
                sizes = iter([len(indices) for _, indices in requests[client_id]])
                yield client_id, (LocalBatch(next(fetched), size) for size in sizes)
                for _ in sizes:  # what the client did not take
                    next(fetched)

    def _order(self, round_index: int, client_id: int) -> list[Tensor]:
        self._generator.manual_seed(derive_seed(self.seed, "batches", round_index, client_id))
        return self.plan.batches(self.partitions[client_id], self._generator)

    def _client_requests(self, round_index: int, client_id: int) -> list[_Request]:
        return [
            (derive_seed(self.seed, "transforms", round_index, client_id, step), indices.tolist())
            for step, indices in enumerate(self._order(round_index, client_id))
        ]

    def _fetch(self, request: _Request) -> LocalBatch:
        with isolated_rng():
            data = self._collate(_SeededDataset(self._dataset).__getitems__(request))
        return LocalBatch(data, len(request[1]))


class _Requests:
    """A batch sampler that hands out whatever the list holds when a round starts."""

    def __init__(self, requests: list[_Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[_Request]:
        return iter(copy.copy(self._requests))

    def __len__(self) -> int:
        return len(self._requests)


class _SeededDataset(Dataset[Any]):
    """Seed the global generators before a batch is loaded, so that random transforms do not depend on the worker."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, request: _Request) -> list[Any]:
        seed, indices = request
        seed_global_rng(seed)
        load_many = getattr(self._dataset, "__getitems__", None)
        if callable(load_many):
            return list(load_many(indices))
        return [self._dataset[index] for index in indices]
