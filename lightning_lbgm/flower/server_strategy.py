"""``LBGMStrategy``: a federation's server as a strategy of Flower's ``ServerApp``."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lbgm.clients.personal import Personal
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.data.cohort import resolve_cohort_size
from lightning_lbgm.data.participation import Participation
from lightning_lbgm.data.samplers import Sampler
from lightning_lbgm.flower.evaluation import NodeEvaluation
from lightning_lbgm.flower.fractions import check_nodes, num_nodes
from lightning_lbgm.flower.nodes import Nodes
from lightning_lbgm.flower.reception import Reception
from lightning_lbgm.flower.records import Greeting, Task, Trial, write
from lightning_lbgm.flower.result import Recorder
from lightning_lbgm.flower.server import SavedState, ServerSession, ServerStrategy
from lightning_lbgm.flower.server_fit import fit
from lightning_lbgm.protocol.broadcast import as_downlink
from lightning_lbgm.protocol.channel import as_uplink
from lightning_lbgm.server.aggregation import Aggregator
from lightning_lbgm.server.presets import ServerPreset
from lightning_lbgm.strategy.settings import Settings

__all__ = ["LBGMStrategy"]

log = logging.getLogger("flwr")  # whose lines Flower shows


class LBGMStrategy(Strategy):
    """Run a federation's server in a Flower ``ServerApp``: what ``LBGMFederated`` simulates, with nodes as the clients.

    ``start`` fits the module with Lightning's ``Trainer``, one training batch being one round. So the loggers get the
    same metrics and figures as in a simulation, callbacks see the rounds, and the global model is validated by the
    module's ``validation_step`` if a datamodule has validation data.

    Args:
        module: The module, which holds the global model.
        datamodule: Data for validation. Its training data is not asked for. None: no validation.
        num_clients: K, the most nodes; clients have numbers below it.
        uplink: Stages that an update passes on its way to the server, the same as at the nodes. None:
            ``[LookBack(threshold=0.2)]``.
        downlink: Stages of the way back, the same as at the nodes. None or ``[]``: the whole model in each round.
        clients_per_round: As for ``LBGMFederated``. None: as ``fraction_train`` says.
        local_epochs: Passes of a node over its examples in a round.
        local_steps: Optimizer steps of a node in a round. At most one of the two; neither: one local epoch.
        server_optimizer: See ``LBGMFederated``.
        weighting: See ``LBGMFederated``. ``"examples"`` believes what nodes say of the number of theirs.
        buffers: See ``LBGMFederated``; the same as at the nodes.
        rounds_per_epoch: Rounds in a Lightning epoch.
        seed: The run's seed. None: that of ``seed_everything``, else torch's.
        aggregation: See ``LBGMFederated``.
        client_capacity: See ``LBGMFederated``.
        personal: What nodes keep for themselves, the same as at the nodes.
        sampler: What draws a round's cohort from the nodes that are there; see ``LBGMFederated``.
        fraction_train: Share of the nodes that are there to train in a round, as in Flower's ``FedAvg``.
        min_train_nodes: Nodes to train in a round at the least, if so many are there.
        min_available_nodes: Nodes that must be there for a round to begin; the server waits for them.
        fraction_evaluate: Share of the nodes that are there to evaluate the global model after a round, each on its
            own validation data. 0: none; Flower's ``FedAvg`` has 1.0. Here it is what you ask for, because each of
            them gets the whole model, of which a downlink with stages would have saved most.
        min_evaluate_nodes: Nodes to evaluate at the least, if so many are there and ``fraction_evaluate`` is not 0.
        state_dir: Folder for the server's state, written after each round. If there is one, ``start`` goes on from it.
            None: the server keeps its state in memory.
        trainer: Arguments of Lightning's ``Trainer``: ``logger``, ``callbacks``, ``accelerator`` and others.

    Attributes:
        refusals: Replies that were not taken, by client.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_lbgm import LookBack
        >>> from lightning_lbgm.flower import LBGMStrategy
        >>> strategy = LBGMStrategy(BoringModel(), uplink=[LookBack(threshold=0.2)], min_available_nodes=3)
    """

    def __init__(
        self,
        module: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        *,
        num_clients: int = 10,
        uplink: list[Stage] | Stage | None = None,
        downlink: list[Stage] | Stage | None = None,
        clients_per_round: int | float | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        server_optimizer: ServerPreset | Callable[[Iterable[Parameter]], Optimizer] | None = None,
        weighting: Literal["examples", "uniform"] = "examples",
        buffers: Literal["average", "server", "client"] = "average",
        rounds_per_epoch: int = 1,
        seed: int | None = None,
        aggregation: Aggregator | None = None,
        client_capacity: int | None = None,
        personal: list[str] | Callable[[str, Tensor], bool] | None = None,
        sampler: Sampler | Callable[[int, Sequence[int], np.random.Generator], Sequence[int]] | None = None,
        fraction_train: float = 1.0,
        min_train_nodes: int = 2,
        min_available_nodes: int = 2,
        fraction_evaluate: float = 0.0,
        min_evaluate_nodes: int = 2,
        state_dir: str | Path | None = None,
        trainer: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(module, pl.LightningModule):
            raise TypeError(f"`module` must be a LightningModule; got {type(module).__name__}.")
        check_nodes(
            num_clients,
            {"fraction_train": fraction_train, "fraction_evaluate": fraction_evaluate},
            {
                "min_train_nodes": min_train_nodes,
                "min_evaluate_nodes": min_evaluate_nodes,
                "min_available_nodes": min_available_nodes,
            },
        )
        self.module, self.datamodule = module, datamodule
        self.settings = Settings(
            num_clients=num_clients,
            uplink=as_uplink(uplink),
            downlink=as_downlink([] if downlink is None else downlink),
            clients_per_round=clients_per_round,
            local_epochs=local_epochs,
            local_steps=local_steps,
            server_optimizer=server_optimizer,
            weighting=weighting,
            buffers=buffers,
            rounds_per_epoch=rounds_per_epoch,
            seed=seed,
            execution="sequential",
            aggregation=aggregation,
            client_capacity=client_capacity,
            personal=Personal.of(personal, None, local_steps),
            participation=Participation(sampler),
        )
        self.fraction_train, self.min_train_nodes = fraction_train, min_train_nodes
        self.fraction_evaluate, self.min_evaluate_nodes = fraction_evaluate, min_evaluate_nodes
        self.min_available_nodes = min_available_nodes
        self.refusals: dict[int, int] = {}
        self._nodes = Nodes(num_clients)
        self._path = None if state_dir is None else Path(state_dir) / "server.ckpt"
        self._arguments = dict(trainer or {})
        self._asked: Mapping[int, Task | Trial] = {}
        self._replies: list[Message] = []

    @override
    def summary(self) -> None:
        described = self.settings.describe(None, None, self.settings.seed or 0)
        shown = {name: value for name, value in described.items() if name != "partitioner" and value is not None}
        log.info("LBGMStrategy: %s", ", ".join(f"{name}={value}" for name, value in shown.items()))

    @override
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of the round at hand, of which ``start`` has drawn the cohort.

        Args:
            server_round: The round, from 1.
            arrays: Not used: the global model travels by the downlink.
            config: Not used: what nodes are told of a round is a ``Task``.
            grid: Flower's.
        """
        return self._messages(MessageType.TRAIN, server_round)

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the replies of the round at hand, which ``start`` aggregates."""
        self._replies = list(replies)
        return None, None

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of an evaluation on nodes, which ``start`` has chosen."""
        return self._messages(MessageType.EVALUATE, server_round)

    @override
    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Take the replies of an evaluation, of which ``start`` makes metrics."""
        self._replies = list(replies)
        return None

    @override
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation.

        Args:
            grid: Flower's, which the ``ServerApp`` is given.
            initial_arrays: The module's state to begin with. None: as the module is.
            num_rounds: Rounds in all, those included that a saved state has behind it.
            timeout: Seconds to wait for a round's replies; nodes that have not answered by then are left out of it.
            train_config: Must be empty: nodes are told what ``Task`` has.
            evaluate_config: Must be empty.
            evaluate_fn: Called with a round, from 0, and the global model; what it returns is in the result.

        Returns:
            The final model and the metrics of each round.
        """
        if train_config or evaluate_config:
            raise ValueError(
                "`LBGMStrategy.start` takes no `train_config` or `evaluate_config`: nodes are told the fields of a"
                " `Task`, and no others. Pass settings of a node by its node config or run config."
            )
        path = self._path if self._path is not None and self._path.exists() else None
        if initial_arrays is not None and path is None:
            self.module.load_state_dict(initial_arrays.to_torch_state_dict())
        self.summary()
        state = SavedState(self._nodes, secrets.token_hex(8), self._path)
        self.refusals = state.refusals
        session = ServerSession(self.settings, self._nodes)

        reception = Reception(grid, self._nodes, self.min_available_nodes, timeout)

        def gather(greeting: Greeting) -> tuple[tuple[int, ...], int]:
            there = reception.wait(greeting)
            return there, self._num_wanted(len(there))

        def exchange(configure: Any, aggregate: Any, round_index: int, asked: Mapping[int, Any]) -> list[Message]:
            self._asked, self._replies = asked, []
            messages = configure(round_index + 1, ArrayRecord(), ConfigRecord(), grid)
            aggregate(round_index + 1, grid.send_and_receive(messages, timeout=timeout))
            self._asked = {}
            return self._replies

        record = Recorder(evaluate_fn)
        strategy = ServerStrategy(session, gather, partial(exchange, self.configure_train, self.aggregate_train), state)
        first: list[pl.Callback] = []
        if self.fraction_evaluate:
            trials = partial(exchange, self.configure_evaluate, self.aggregate_evaluate)
            wanted = partial(num_nodes, fraction=self.fraction_evaluate, least=self.min_evaluate_nodes)
            first = [NodeEvaluation(self._nodes, reception.look, wanted, trials, record.evaluated_on_nodes)]
        fit(strategy, self.module, self.datamodule, self._arguments, num_rounds, path, first, [record, state])
        record.result.arrays = ArrayRecord(self.module.state_dict())
        return record.result

    def _messages(self, kind: str, server_round: int) -> list[Message]:
        return [
            Message(write(asked), self._nodes[k].node_id, kind, group_id=str(server_round))
            for k, asked in self._asked.items()
        ]

    def _num_wanted(self, num_there: int) -> int:
        """Return how many nodes are to train in a round."""
        settings = self.settings
        if settings.clients_per_round is None:
            return num_nodes(num_there, self.fraction_train, self.min_train_nodes)
        size = resolve_cohort_size(settings.num_clients, settings.clients_per_round)
        assert size is not None
        return size
