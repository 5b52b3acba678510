"""Evaluation data of clients: held out of their training examples, dealt like them, or given for each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_lbgm.core.rng import derive_seed
from lightning_lbgm.data.batches import BatchPlan
from lightning_lbgm.data.client_loaders import LoaderFeed
from lightning_lbgm.data.columns import is_map_dataset
from lightning_lbgm.data.feed import ClientFeed, EvaluationData, Feed
from lightning_lbgm.data.hold_out import hold_out_of_loader
from lightning_lbgm.data.like_training import deal_like_training
from lightning_lbgm.data.loading import loader_like
from lightning_lbgm.data.partitioners import Partitioner
from lightning_lbgm.data.sampling import iterates_by_itself, plan_from_loader, read_loader

__all__ = ["choose_clients", "dealt_data", "given_data", "split_loaders"]


def dealt_data(
    loader: DataLoader[Any],
    partitions: Sequence[Tensor],
    seed: int,
    dataset: Dataset[Any],
    wrap: Callable[[Any], Any] | None = None,
) -> EvaluationData:
    """Return the evaluation data of clients that have parts of a dataset.

    Args:
        loader: Its batch size and how it loads are taken.
        partitions: Example indices of each client; those with none are left out.
        seed: The run's seed, for random transforms.
        dataset: What the indices are of.
        wrap: Applied to each batch, if the user's loader stood in a container.
    """
    clients = [client_id for client_id, part in enumerate(partitions) if len(part)]
    plan = BatchPlan(plan_from_loader(loader, 1, None).batch_size)
    feed = ClientFeed(loader, plan, [partitions[client_id] for client_id in clients], seed, dataset, wrap)
    return EvaluationData(feed, clients)


def split_loaders(
    loaders: Sequence[Any], names: Sequence[str], share: float, seed: int
) -> tuple[list[Any], EvaluationData]:
    """Split the loader of each client into one to train with and one of what is held out.

    Raises:
        ValueError: If a loader's examples cannot be told apart.
    """
    pairs = [hold_out_of_loader(loader, names[k], share, seed, k) for k, loader in enumerate(loaders)]
    held_out = {k: out for k, (_, out) in enumerate(pairs) if out is not None}
    return [train for train, _ in pairs], _loader_data(held_out, seed)


def given_data(data: Any, keys: Any, feed: Feed, partitioner: Partitioner, seed: int) -> EvaluationData:
    """Return the evaluation data that the user gave.

    Args:
        data: A Dataset or DataLoader, which is dealt like the training data; or a list with one for each client, or a
            dict by client id or name.
        keys: Client ids or labels of the examples to deal, if they are needed.
        feed: The clients' training data.
        partitioner: What dealt it.
        seed: The run's seed.

    Raises:
        ValueError: If the data does not go with the clients.
        TypeError: If it is of another type.
    """
    if isinstance(data, (list, tuple, Mapping)):
        if keys is not None:
            raise ValueError("`ClientEvaluation(keys=...)` goes with one dataset that is dealt: leave it out here.")
        items = _by_client(data, feed)
        return _loader_data({k: _as_loader(item, k, feed) for k, item in items.items()}, seed)
    if not isinstance(data, (Dataset, DataLoader)) and not is_map_dataset(data):
        raise TypeError(
            "`ClientEvaluation(data=...)` must be a Dataset or DataLoader, or a list or dict with one for each client;"
            f" got {type(data).__name__}."
        )
    if not isinstance(feed, ClientFeed):
        raise ValueError(
            "Each client has a training loader of its own, so there is no rule to deal one validation set by: pass one"
            " for each client, as `ClientEvaluation(data={client: its_validation_set, ...})`."
        )
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or (isinstance(data, DataLoader) and iterates_by_itself(data)):
        raise ValueError(
            "`ClientEvaluation(data=...)` is dealt to the clients by the index of its examples, which"
            f" {type(dataset).__name__ if isinstance(dataset, IterableDataset) else type(data).__name__} does not"
            " have. Pass a map-style dataset, or a loader for each client, as `data=[loader_0, loader_1, ...]`."
        )
    loader = data if isinstance(data, DataLoader) else loader_like(feed.loader, data)
    dataset, _ = read_loader(loader, 1, None, seed)
    partitions = deal_like_training(dataset, keys, partitioner, feed.dataset, feed.partitions, seed)
    return dealt_data(loader, partitions, seed, dataset)


def choose_clients(
    clients: int | Sequence[int | str] | None, data: EvaluationData, feed: Feed, seed: int
) -> tuple[int, ...]:
    """Return the ids of the clients to evaluate, in increasing order.

    Args:
        clients: None: all that have evaluation data; an int: that many of them, drawn by the seed; or ids or names.
        data: The evaluation data.
        feed: The clients' training data.
        seed: The run's seed.

    Raises:
        ValueError: If there are not as many, one is unknown, or one has no evaluation data.
    """
    if not data.clients:
        raise ValueError(
            "`ClientEvaluation` has no client to evaluate: none has two examples, of which one can be held out. Pass"
            " validation data as `ClientEvaluation(data=...)`."
        )
    if clients is None:
        return data.clients
    if isinstance(clients, int):
        if clients > len(data.clients):
            raise ValueError(
                f"`ClientEvaluation(clients={clients})` is more than the {len(data.clients)} clients that have"
                " evaluation data: use fewer, or None for all."
            )
        rng = np.random.default_rng(derive_seed(seed, "evaluated clients"))
        return tuple(sorted(rng.choice(data.clients, size=clients, replace=False).tolist()))
    chosen = sorted({_client_id(client, feed) for client in clients})
    missing = [client_id for client_id in chosen if client_id not in data.clients]
    if missing:
        raise ValueError(f"`ClientEvaluation(clients=...)`: client {missing[0]} has no evaluation data. Leave it out.")
    return tuple(chosen)


def _client_id(client: Any, feed: Feed) -> int:
    names = feed.client_names or ()
    if isinstance(client, str) and client in names:
        return names.index(client)
    if isinstance(client, int) and not isinstance(client, bool) and 0 <= client < feed.num_clients:
        return client
    known = f"names {', '.join(map(repr, names[:3]))}, ..." if names else "no names"
    raise ValueError(
        f"`ClientEvaluation` got the client {client!r}: clients have the ids 0 to {feed.num_clients - 1} and {known}."
    )


def _by_client(data: Any, feed: Feed) -> dict[int, Any]:
    if isinstance(data, Mapping):
        return dict(sorted((_client_id(client, feed), item) for client, item in data.items()))
    if len(data) != feed.num_clients:
        raise ValueError(
            f"`ClientEvaluation(data=[...])` has {len(data)} entries for {feed.num_clients} clients: give one for each,"
            " or a dict by client for some of them."
        )
    return dict(enumerate(data))


def _as_loader(item: Any, client_id: int, feed: Feed) -> Any:
    if not isinstance(item, Dataset) and not is_map_dataset(item):
        return item
    given = feed.loader if isinstance(feed, ClientFeed) else getattr(feed, "loaders", {})[client_id]
    if not isinstance(given, DataLoader) or isinstance(item, IterableDataset):
        raise ValueError(
            f"`ClientEvaluation(data=...)` has a {type(item).__name__} for client {client_id}, whose batch size is not"
            " known: wrap it in `DataLoader(dataset, batch_size=...)`."
        )
    return loader_like(given, item)


def _loader_data(loaders: Mapping[int, Any], seed: int) -> EvaluationData:
    feed = LoaderFeed(list(loaders.values()), [str(k) for k in loaders], 1, None, seed, purpose="evaluation")
    return EvaluationData(feed, list(loaders))
