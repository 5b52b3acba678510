"""Node: one client's part of a round, as a Lightning fit of a single round."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_lbgm._compat.loop_progress import start_at
from lightning_lbgm.clients.base import ClientTrainer, ClientUpdate, RoundStart
from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.feed import ClientFeed
from lightning_lbgm.data.participation import Turnout
from lightning_lbgm.data.rounds import Round, RoundLoader
from lightning_lbgm.data.sampling import read_loader
from lightning_lbgm.flower.engine import EngineStrategy, make_trainer, without_notes
from lightning_lbgm.flower.logged import pack
from lightning_lbgm.flower.node_session import Introduced, NodeSession, Unable
from lightning_lbgm.flower.records import Introduction, Task, Work
from lightning_lbgm.strategy.data_checks import check_loader
from lightning_lbgm.strategy.execution import Execution

__all__ = ["NodeStrategy", "introduce", "work"]


class NodeTrainer:
    """Trains the node's client, and keeps what it logged for the reply.

    Args:
        inner: Trains it.
        module: The module.

    Attributes:
        logged: What it logged, as plain values.
        examples: Examples that it has seen.
    """

    def __init__(self, inner: ClientTrainer, module: nn.Module) -> None:
        self.capture: RoundLog = inner.capture
        self.logged: list[dict[str, Any]] = []
        self.examples = 0
        self._inner, self._module = inner, module

    def run(self, round_: Round, start: RoundStart) -> Iterator[ClientUpdate]:
        """Yield the client's update."""
        for update in self._inner.run(round_, start):
            self.examples = update.local.num_examples
            yield update
        self.logged = self.capture.export(self._module)


class NodeExecution(Execution):
    """Chooses what trains the node's client, and keeps it.

    Attributes:
        clients: What trains it, in the round at hand; None before.
    """

    clients: NodeTrainer | None = None

    @override
    def client_trainer(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> NodeTrainer:
        self.clients = NodeTrainer(super().client_trainer(trainer, module, *args), module)
        return self.clients


class _OneRound(RoundLoader):
    """A loader of the one round that the node was asked for, of one client."""

    def __init__(self, feed: ClientFeed, round_index: int, client_id: int) -> None:
        super().__init__(feed, 1, 1, next_round=lambda: round_index, loader=feed.loader)
        feed.next_cohort = None  # the next round's is the server's to say
        self._client_id = client_id

    def _turnout(self, index: int) -> Turnout:
        return Turnout((self._client_id,))


class NodeStrategy(EngineStrategy):
    """Lightning's strategy of a node.

    Args:
        session: The federation of its one client.
    """

    strategy_name = "lbgm_node"
    session: NodeSession

    def __init__(self, session: NodeSession) -> None:
        super().__init__(session)
        self.execution: NodeExecution = NodeExecution("sequential")

    @override
    def connect(self, model: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
        given = list(callbacks)
        super().connect(model)
        callbacks[:] = given  # the reports of a federation are the server's to write

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Turn the node's training DataLoader into a loader of the round that is asked for."""
        if not isinstance(dataloader, TrainLoaders):
            return super().process_dataloader(dataloader)
        if len(dataloader.loaders) != 1:
            raise MisconfigurationException(
                f"A node is one client and has one training `DataLoader`; got {len(dataloader.loaders)}. Pass one"
                " `DataLoader(ConcatDataset(datasets), ...)`."
            )
        session, settings = self.session, self.session.settings
        loader = check_loader(dataloader.loaders[0])
        dataset, plan = read_loader(loader, settings.epochs, settings.local_steps, session.seed)
        everything = torch.arange(len(dataset))  # type: ignore[arg-type]
        nobody = torch.empty(0, dtype=torch.int64)
        partitions = [nobody] * session.client_id + [everything]
        feed = ClientFeed(loader, plan, partitions, session.seed, dataset, dataloader.wrap)
        session.feed = feed
        asked = session.asked
        return _OneRound(feed, asked.round_index if isinstance(asked, Task) else 0, session.client_id)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        asked = self.session.asked
        if isinstance(asked, Task):
            _catch_up_schedules(self._trainer(), asked.round_index, asked.rounds_per_epoch)


def introduce(
    session: NodeSession, trainer: dict[str, Any], module: pl.LightningModule, data: Any, client_id: int
) -> Introduction:
    """Return what the server wants to know of a node before its first round.

    Args:
        session: Made for the greeting.
        trainer: Arguments of Lightning's Trainer.
        module: The module.
        data: The datamodule.
        client_id: The client that it is; -1: any.

    Raises:
        Unable: If the settings are not the server's.
    """
    try:
        _fit(session, trainer, module, data, 0, 1)
    except Introduced as done:
        return replace(done.introduction, client_id=client_id)
    raise AssertionError("the fit of a greeting ends by introducing the node")


def work(session: NodeSession, trainer: dict[str, Any], module: pl.LightningModule, data: Any, task: Task) -> Work:
    """Train a node's client for a round, and return what to send.

    Args:
        session: Made for the task.
        trainer: Arguments of Lightning's Trainer.
        module: The module.
        data: The datamodule.
        task: What the server asks.

    Raises:
        Unable: If the round cannot be made with what the node holds, or its update is not finite.
    """
    strategy = _fit(session, trainer, module, data, task.round_index, task.rounds_per_epoch)
    report, message = strategy.last_report, session.channel.message
    if report is None or message is None:
        raise Unable("The update, or a buffer, is not finite: see the learning rate and the data of this node.")
    (client,) = report.clients
    decision = client.decision
    clients = strategy.execution.clients
    assert clients is not None
    reply = Work(
        round_index=task.round_index,
        client_id=task.client_id,
        message=message,
        held=session.held,
        local_steps=client.local_steps,
        examples=clients.examples,
        loss=client.loss,
        metric_names=list(client.metrics),
        metric_values=[float(value) for value in client.metrics.values()],
        logged=pack(clients.logged),
    )
    if decision is None:
        return reply
    return replace(
        reply,
        tested=True,
        recycled=list(decision.recycled),
        errors=[float(error) for error in decision.errors],
        coefficients=[float(value) for value in decision.coefficients],
        threshold=math.nan if decision.threshold is None else float(decision.threshold),
        outcome=decision.outcome,
    )


def _fit(
    session: NodeSession,
    arguments: dict[str, Any],
    module: pl.LightningModule,
    data: Any,
    round_index: int,
    rounds: int,
) -> NodeStrategy:
    """Fit for one round, with the Trainer's counters where the server's are.

    Args:
        session: The federation of the node's one client.
        arguments: Of the Trainer, as the user gave them.
        module: The module.
        data: The datamodule.
        round_index: The round.
        rounds: Rounds in an epoch.
    """
    strategy, epoch = NodeStrategy(session), round_index // rounds
    ours = {"strategy": strategy, "max_epochs": epoch + 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    with without_notes():
        trainer = make_trainer(arguments, ours, "a node's Trainer makes one round, as the server asks.")
        start_at(trainer, round_index, epoch)
        trainer.fit(module, datamodule=data)
    return strategy


def _catch_up_schedules(trainer: pl.Trainer, round_index: int, rounds_per_epoch: int) -> None:
    """Bring learning rate schedules to where they are after so many rounds, which other nodes may have made."""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            raise MisconfigurationException(
                "`ReduceLROnPlateau` follows a metric of all rounds, which a node does not know. Use a schedule that"
                " counts rounds, such as `CosineAnnealingLR`."
            )
        if config.interval == "step":
            counts = [index % rounds_per_epoch + 1 for index in range(round_index)]
        else:
            counts = list(range(1, round_index // rounds_per_epoch + 1))
        steps = sum(count % config.frequency == 0 for count in counts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule that goes ahead of its optimizer
            for _ in range(steps):
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
