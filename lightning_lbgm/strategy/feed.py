"""Feed of a federation, made from the user's training loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_lbgm.data.client_loaders import LoaderFeed
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.feed import ClientFeed, Feed
from lightning_lbgm.data.partitioners import IIDPartitioner, Partitioner, make_partitions
from lightning_lbgm.data.sampling import read_loader
from lightning_lbgm.strategy.data_checks import check_client_loaders, check_loader, needs_client_loaders

__all__ = ["FeedSettings"]


@dataclass(frozen=True)
class FeedSettings:
    """The settings of ``LBGMFederated`` that say whose the data is and how clients go through it.

    Attributes:
        num_clients: Clients that one loader's examples are dealt to; None: each loader is a client.
        partitioner: Deals the examples. None: ``IIDPartitioner()``.
        local_epochs: Passes in a round.
        local_steps: Steps in a round, instead.
    """

    num_clients: int | None
    partitioner: Partitioner | None
    local_epochs: int | None
    local_steps: int | None

    def make_feed(self, given: TrainLoaders, seed: int, world_size: int, in_use: int | None) -> tuple[Feed, Any]:
        """Return the feed and the user's loader, which is None if there are several.

        Args:
            given: What the user gave as training data.
            seed: The run's seed.
            world_size: Number of processes.
            in_use: Number of clients of the federation that goes on with these loaders; None: it has not begun.

        Raises:
            MisconfigurationException: If these loaders do not go with the settings.
            ValueError: If the examples cannot be dealt, or a client's loader is of no use.
            TypeError: If a client's loader is none.
        """
        loaders = given.loaders
        if not given.is_collection and self.num_clients is None:
            raise needs_client_loaders(f"one {type(given.source).__name__}")
        if len(loaders) == 1 and self.num_clients is not None:
            return self._deal(loaders[0], given, seed, world_size), loaders[0]
        check_client_loaders(len(loaders), self.num_clients, self.partitioner, in_use, given.mode)
        steps = self.local_epochs, self.local_steps
        return LoaderFeed(loaders, given.names, *steps, seed, world_size), None

    def _deal(self, loader: object, given: TrainLoaders, seed: int, world_size: int) -> Feed:
        assert self.num_clients is not None
        checked = check_loader(loader)
        dataset, plan = read_loader(checked, self.local_epochs, self.local_steps, seed, world_size)
        partitions = make_partitions(dataset, self.num_clients, self.partitioner or IIDPartitioner(), seed)
        return ClientFeed(checked, plan, partitions, seed, dataset, given.wrap)
