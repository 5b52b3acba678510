"""``federated_client_app``: an unchanged LightningModule and its data as a node of Flower."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from lightning_lbgm.clients.objectives import LocalObjective, SharedObjective
from lightning_lbgm.clients.personal import Personal
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.flower.files import dump, parse, read_file, write_file
from lightning_lbgm.flower.node import introduce, work
from lightning_lbgm.flower.node_session import NodeMemory, NodeSession, Unable
from lightning_lbgm.flower.node_trial import rate
from lightning_lbgm.flower.records import Greeting, RecordError, Refusal, Task, Trial, read, write
from lightning_lbgm.protocol.broadcast import as_downlink
from lightning_lbgm.protocol.channel import as_uplink
from lightning_lbgm.strategy.settings import Settings

__all__ = ["federated_client_app"]

_STATE = "lbgm-state"
log = logging.getLogger("flwr")  # whose lines Flower shows


def federated_client_app(
    module: pl.LightningModule | Callable[[Context], pl.LightningModule],
    datamodule: pl.LightningDataModule | Callable[[Context], pl.LightningDataModule],
    *,
    uplink: list[Stage] | Stage | None = None,
    downlink: list[Stage] | Stage | None = None,
    buffers: Literal["average", "server", "client"] = "average",
    objective: LocalObjective | None = None,
    personal: list[str] | Callable[[str, Tensor], bool] | None = None,
    personal_steps: int | None = None,
    state_dir: str | Path | None = None,
    trainer: dict[str, Any] | None = None,
) -> ClientApp:
    """Make a Flower ``ClientApp`` of a LightningModule and a node's own data.

    In each round that the server asks for, the module is trained on the node's data by Lightning's ``Trainer``, with
    the local steps that a client of the simulation makes: the same seed, client and data give the same batches, the
    same steps and the same decisions. What leaves the node is a ``Message`` of the uplink and a few numbers: its loss,
    its counts of steps and examples, the look-back tests, and what the module has logged.

    The node is the client with the number ``client-id``, else ``partition-id``, of its node config; without both the
    server gives it one.

    Args:
        module: The module, or a function of Flower's ``Context`` that makes it, called for each message. Parameters
            come from the server.
        datamodule: The node's data, or a function of the context that makes it, for instance for its ``partition-id``.
            Its ``train_dataloader`` returns one ``DataLoader``. If it has a ``val_dataloader``, the server can have the
            global model evaluated on it by the module's ``validation_step``.
        uplink: The stages, the same as at the server. None: ``[LookBack(threshold=0.2)]``.
        downlink: The stages, the same as at the server.
        buffers: As for ``LBGMFederated``, the same as at the server.
        objective: What the client minimises besides the module's loss, such as ``FedProx(mu=0.1)``.
        personal: What the node keeps for itself, the same as at the server; see ``LBGMFederated``.
        personal_steps: See ``LBGMFederated``.
        state_dir: Folder for the node's state (look-back gradients, residuals, personal parameters, what it holds of
            the model), written after each round before the reply leaves. None: ``state-dir`` of the node config, else
            Flower's own context, which lives as long as the run and the SuperNode's process.
        trainer: Arguments of Lightning's ``Trainer``: ``accelerator``, ``precision``, ``callbacks`` and others.

    Returns:
        The app, with functions for ``query``, ``train`` and ``evaluate``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the server has a part in the objective.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> from lightning_lbgm import LookBack
        >>> from lightning_lbgm.flower import federated_client_app
        >>> app = federated_client_app(BoringModel(), BoringDataModule(), uplink=[LookBack(threshold=0.2)])
        >>> type(app).__name__
        'ClientApp'
    """
    if isinstance(objective, SharedObjective):
        raise ValueError(
            f"`objective={objective!r}`: the server has a part in it, which only the simulation can do. Use"
            " `FedProx(mu=...)`, or `LBGMFederated`."
        )
    stages = as_uplink(uplink)
    down = as_downlink([] if downlink is None else downlink)
    arguments = dict(trainer or {})

    def settings_for(asked: Task | Greeting | Trial, client_id: int) -> Settings:
        local_epochs, local_steps = (
            (None, None) if isinstance(asked, Trial) else (asked.local_epochs, asked.local_steps)
        )
        return Settings(
            num_clients=client_id + 1,
            uplink=stages,
            downlink=as_downlink([]),
            clients_per_round=1,
            local_epochs=local_epochs or None,
            local_steps=local_steps or None,
            buffers=buffers,
            seed=asked.seed,
            execution="sequential",
            objective=objective,
            personal=Personal.of(personal, personal_steps, local_steps or None),
        )

    def made(given: Any, context: Context, kind: type) -> Any:
        return given if isinstance(given, kind) else given(context)

    def answer(message: Message, context: Context) -> Message:
        memory: NodeMemory = {}
        session: NodeSession | None = None
        ticket = ""
        try:
            asked: Greeting | Task | Trial = read(message.content, Greeting, Task, Trial)
            ticket = asked.ticket
            client_id = _own_number(context) if isinstance(asked, Greeting) else asked.client_id
            store = _Store(context, state_dir, client_id)
            memory, settings = store.load(), settings_for(asked, max(client_id, 0))
            model, data = made(module, context, pl.LightningModule), made(datamodule, context, pl.LightningDataModule)
            reply: Any
            if isinstance(asked, Trial):
                reply = rate(settings, down, memory, arguments, model, data, asked)
            else:
                session = NodeSession(settings, down, asked, memory, max(client_id, 0))
                if isinstance(asked, Greeting):
                    reply = introduce(session, arguments, model, data, client_id)
                else:
                    reply = work(session, arguments, model, data, asked)
                    store.save(session.remember())  # before the reply leaves, so that this end is never behind
        except (Unable, RecordError) as error:
            lasting = isinstance(error, Unable) and error.lasting
            reply = Refusal(str(error), 0 if session is None else session.held, lasting=lasting)
        return Message(write(replace(reply, ticket=ticket)), reply_to=message)

    app = ClientApp()
    app.query()(answer)
    app.train()(answer)
    app.evaluate()(answer)
    return app


def _own_number(context: Context) -> int:
    """Return the client that a node is by its config; -1 if that says nothing."""
    for name in ("client-id", "partition-id"):
        value = context.node_config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**20:
                raise Unable(f"`{name}` of the node config must be a whole number in [0, 2**20); it is {value!r}.")
            return value
    return -1


class _Store:
    """Where a node's state lies between two messages: in a file, or in Flower's context.

    Args:
        context: Flower's.
        folder: The folder. None: that of the node config.
        client_id: The client.
    """

    def __init__(self, context: Context, folder: str | Path | None, client_id: int) -> None:
        self._context = context
        where = folder if folder is not None else context.node_config.get("state-dir")
        self._path = None if where is None else Path(str(where)) / f"client-{client_id}.pt"

    def load(self) -> NodeMemory:
        """Return the state; empty if there is none, or if it is damaged: the node then goes on without."""
        data: Any
        if self._path is not None:
            data = read_file(self._path)
        else:
            record: Any = self._context.state.get(_STATE)
            data = None if record is None else record.get("state")
        if data is None:
            return {}
        try:
            return parse(data)
        except Exception as error:
            log.warning("The state in %s cannot be read and is not used: %s", self._path or "Flower's context", error)
            return {}

    def save(self, memory: NodeMemory) -> None:
        """Keep the state."""
        if self._path is not None:
            write_file(self._path, dump(memory))
        else:
            self._context.state[_STATE] = ConfigRecord({"state": dump(memory)})
