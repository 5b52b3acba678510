"""Feed of a federation and its loader of rounds, made from the user's training loaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_lbgm.callbacks.base import held_out_share
from lightning_lbgm.data.client_loaders import LoaderFeed
from lightning_lbgm.data.cohort import resolve_cohort_size
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.evaluation import dealt_data, split_loaders
from lightning_lbgm.data.feed import ClientFeed, Feed
from lightning_lbgm.data.hold_out import hold_out_of_partitions
from lightning_lbgm.data.partitioners import IIDPartitioner, make_partitions
from lightning_lbgm.data.rounds import RoundLoader
from lightning_lbgm.data.sampling import read_loader
from lightning_lbgm.simulation.world import World
from lightning_lbgm.strategy.data_checks import check_client_loaders, check_loader, needs_client_loaders
from lightning_lbgm.strategy.session import Session
from lightning_lbgm.strategy.settings import Settings

__all__ = ["make_feed", "make_rounds"]


def make_rounds(
    session: Session, given: TrainLoaders, trainer: pl.Trainer, world: Callable[[], World], world_size: int
) -> RoundLoader:
    """Return the loader of rounds over what the user gave as training data, whose feed becomes the session's.

    Args:
        session: The session.
        given: The training data.
        trainer: The Trainer; a callback of it may hold examples out.
        world: Returns the processes, once they are connected.
        world_size: Number of processes.

    Raises:
        MisconfigurationException: As ``make_feed``, and the other errors too.
    """
    settings = session.settings
    known = settings.num_clients if session.feed is None else session.feed.num_clients
    in_use = known if trainer.global_step > 0 else None
    feed, loader = make_feed(settings, given, session.seed, world_size, in_use, held_out_share(trainer))
    session.feed = feed
    cohort_size = resolve_cohort_size(feed.num_clients, settings.clients_per_round)
    assert cohort_size is not None
    return RoundLoader(
        feed,
        cohort_size,
        settings.rounds_per_epoch,
        next_round=lambda: session.round_index,
        prepare=lambda: feed.prepare(world()),
        loader=loader,
        collection=given.source if given.is_collection else None,
        participation=settings.participation,
        sampling=lambda: session.require().sampling,
        agree=lambda turnout: world().broadcast(turnout),
        plan=lambda: session.require().plan(),
    )


def make_feed(
    settings: Settings,
    given: TrainLoaders,
    seed: int,
    world_size: int,
    in_use: int | None,
    held_out: float | None = None,
) -> tuple[Feed, Any]:
    """Return the feed and the user's loader, which is None if there are several.

    Args:
        settings: The federation's.
        given: What the user gave as training data.
        seed: The run's seed.
        world_size: Number of processes.
        in_use: Number of clients of the federation that goes on with these loaders; None: it has not begun.
        held_out: Share of each client's examples that it does not train with; None: nothing is held out.

    Raises:
        MisconfigurationException: If these loaders do not go with the settings.
        ValueError: If the examples cannot be dealt, or a client's loader is of no use.
        TypeError: If a client's loader is none.
    """
    loaders = given.loaders
    if not given.is_collection and settings.num_clients is None:
        raise needs_client_loaders(f"one {type(given.source).__name__}")
    if len(loaders) == 1 and settings.num_clients is not None:
        return _deal(settings, loaders[0], given, seed, world_size, held_out), loaders[0]
    check_client_loaders(len(loaders), settings.num_clients, settings.partitioner, in_use, given.mode)
    evaluated = None
    if held_out is not None:
        loaders, evaluated = split_loaders(loaders, given.names, held_out, seed)
    feed = LoaderFeed(loaders, given.names, settings.epochs, settings.local_steps, seed, world_size)
    feed.held_out = evaluated
    return feed, None


def _deal(
    settings: Settings, loader: object, given: TrainLoaders, seed: int, world_size: int, held_out: float | None
) -> Feed:
    assert settings.num_clients is not None
    checked = check_loader(loader)
    dataset, plan = read_loader(checked, settings.epochs, settings.local_steps, seed, world_size)
    partitions = make_partitions(dataset, settings.num_clients, settings.partitioner or IIDPartitioner(), seed)
    if held_out is None:
        return ClientFeed(checked, plan, partitions, seed, dataset, given.wrap)
    partitions, out = hold_out_of_partitions(partitions, dataset, held_out, seed)
    feed = ClientFeed(checked, plan, partitions, seed, dataset, given.wrap)
    feed.held_out = dealt_data(checked, out, seed, dataset, given.wrap)
    return feed
