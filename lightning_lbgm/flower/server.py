"""Server: a federation whose clients are nodes, as a Lightning fit of which each training batch is a round."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.data.cohort import resolve_cohort_size
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.participation import Participation, Turnout
from lightning_lbgm.data.rounds import RoundLoader
from lightning_lbgm.data.samplers import SamplerState
from lightning_lbgm.flower.agreement import agreement, digest, float_tensors
from lightning_lbgm.flower.engine import EngineStrategy
from lightning_lbgm.flower.nodes import NodeFeed, Nodes
from lightning_lbgm.flower.records import Greeting
from lightning_lbgm.flower.remote import Exchange, RemoteTrainer, Terms
from lightning_lbgm.flower.remote_ends import RemoteChannel, RemoteDownlink, RemoteWholeModel
from lightning_lbgm.protocol.channel import Channel
from lightning_lbgm.protocol.downlink import Downlink
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.execution import Execution
from lightning_lbgm.strategy.lazy import has_lazy_parameters
from lightning_lbgm.strategy.session import Session
from lightning_lbgm.strategy.settings import Settings

__all__ = ["Gather", "SavedState", "ServerSession", "ServerStrategy"]

Gather = Callable[[Greeting], "tuple[tuple[int, ...], int]"]
"""Waits for nodes, greets those that are new, and returns the clients that are there and how many are wanted."""


class ServerSession(Session):
    """A session whose clients are nodes.

    Args:
        settings: The federation's settings.
        nodes: The table of nodes.
    """

    def __init__(self, settings: Settings, nodes: Nodes) -> None:
        super().__init__(settings)
        self.nodes = nodes

    @override
    def make_channel(self, module: pl.LightningModule, flat: FlatParameters) -> Channel | None:
        return RemoteChannel(self.settings.uplink, flat.layout, float_tensors(module))

    @override
    def make_downlink(self, flat: FlatParameters) -> Downlink | None:
        downlink = self.settings.downlink
        return RemoteDownlink(downlink, flat.layout, self.nodes) if downlink.stages else RemoteWholeModel()


class _NodeRounds(RoundLoader):
    """A loader of rounds whose cohorts are drawn from the nodes that are there.

    Args:
        feed: What is known of the clients' data.
        settings: The federation's settings.
        next_round: Returns the index of the round to come.
        sampling: Returns the sampler's state.
        gather: Returns the clients that are there, and how many are wanted.
    """

    def __init__(
        self,
        feed: NodeFeed,
        settings: Settings,
        next_round: Callable[[], int],
        sampling: Callable[[], SamplerState],
        gather: Callable[[], tuple[tuple[int, ...], int]],
    ) -> None:
        size = resolve_cohort_size(feed.num_clients, settings.clients_per_round)
        assert size is not None
        super().__init__(feed, size, settings.rounds_per_epoch, next_round, sampling=sampling)
        self._sampler = settings.participation.sampler
        self._gather = gather

    def _turnout(self, index: int) -> Turnout:
        there, size = self._gather()
        drawn = Participation(self._sampler, availability=lambda round_index, client_id: client_id in there)
        return drawn.draw(index, self.feed, size, self._sampling())


class _RemoteExecution(Execution):
    """Lets nodes train the clients.

    Args:
        nodes: The table of nodes.
        exchange: Sends tasks to nodes and returns the replies.
        terms: Returns what all tasks have in common.
    """

    def __init__(self, nodes: Nodes, exchange: Exchange, terms: Callable[[], Terms]) -> None:
        super().__init__("sequential")
        self._nodes, self._exchange, self._terms = nodes, exchange, terms

    @override
    def client_trainer(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        federation: Federation,
        local_loop: LocalLoop,
        *args: Any,
    ) -> RemoteTrainer:
        # A learning rate schedule wants to see its optimizer step, and this one would not; it has no gradients.
        local_loop.optimizer.zero_grad()
        local_loop.optimizer.step()
        return RemoteTrainer(federation, module, local_loop.capture, self._nodes, self._exchange, self._terms())


class ServerStrategy(EngineStrategy):
    """Lightning's strategy of a server.

    Args:
        session: The federation.
        gather: Waits for nodes.
        exchange: Sends tasks to nodes and returns the replies.
        state: What is saved with the federation.
    """

    strategy_name = "lbgm_server"
    session: ServerSession

    def __init__(self, session: ServerSession, gather: Gather, exchange: Exchange, state: SavedState) -> None:
        super().__init__(session)
        self._gather, self._state = gather, state
        self._agreed = ""
        self.execution = _RemoteExecution(session.nodes, exchange, self.terms)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Put a loader of rounds in the place of training data, which the server has not."""
        if not isinstance(dataloader, TrainLoaders):
            return super().process_dataloader(dataloader)
        session = self.session
        feed = session.feed = NodeFeed(session.nodes, session.seed)
        return _NodeRounds(
            feed,
            session.settings,
            next_round=lambda: session.round_index,
            sampling=lambda: session.require().sampling,
            gather=lambda: self._gather(self._greeting()),
        )

    @override
    def on_train_start(self) -> None:
        module = self._module()
        if has_lazy_parameters(module):
            raise MisconfigurationException(
                f"`{type(module).__name__}` has parameters without a shape, and the server has no batch to find it out:"
                " call the module once on an example before you pass it."
            )
        super().on_train_start()
        if self.measure_errors:
            raise MisconfigurationException(
                "A callback such as `ConvergenceMonitor` measures what compression costs, for which the server would"
                " need the exact updates. They stay on the nodes: use it in a simulation with `LBGMFederated`."
            )
        settings = self.session.settings
        self._agreed = agreement(settings, settings.downlink, self.session.require().flat.layout)

    def _greeting(self) -> Greeting:
        settings = self.session.settings
        return Greeting(
            federation=self._state.federation,
            settings=self._agreed,
            seed=self.session.seed,
            local_epochs=settings.epochs or 0,
            local_steps=settings.local_steps or 0,
        )

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "partitioner": "a node for each client"}

    def terms(self) -> Terms:
        """Return what all that is asked of nodes has in common."""
        settings = self.session.settings
        return Terms(
            federation=self._state.federation,
            settings=digest(self._agreed),
            local_epochs=settings.epochs or 0,
            local_steps=settings.local_steps or 0,
            rounds_per_epoch=settings.rounds_per_epoch,
            refusals=self._state.refusals,
        )


class SavedState(pl.Callback):
    """What the server keeps besides the federation, and the file in which all lies after each round.

    Args:
        nodes: The table of nodes.
        federation: Names the federation.
        path: The file. None: nothing is written.

    Attributes:
        federation: Its name, a saved one's if the server goes on.
        refusals: Replies that were not taken so far, by client.
    """

    def __init__(self, nodes: Nodes, federation: str, path: Path | None) -> None:
        self.federation = federation
        self.refusals: dict[int, int] = {}
        self._nodes, self._path = nodes, path

    @override
    def state_dict(self) -> dict[str, Any]:
        nodes = self._nodes.state_dict()
        return {"federation": self.federation, "nodes": nodes, "refusals": dict(self.refusals)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.federation = state_dict["federation"]
        self._nodes.load_state_dict(state_dict["nodes"])
        self.refusals.clear()
        self.refusals.update(state_dict["refusals"])

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write the state of a round so that the file is the old or the new one whenever the machine stops."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f".{self._path.name}")
        trainer.save_checkpoint(beside, weights_only=False)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, self._path)
