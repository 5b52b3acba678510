"""Strategy of a federation: Lightning's hooks, connected to clients, uplink and server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lbgm._compat.registration import STRATEGY_NAMES
from lightning_lbgm.clients.objectives import LocalObjective
from lightning_lbgm.clients.personal import Personal
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.data.availability import AvailabilityLike
from lightning_lbgm.data.cohort import resolve_cohort_size
from lightning_lbgm.data.dropout import Dropout
from lightning_lbgm.data.participation import Participation
from lightning_lbgm.data.partitioners import IIDPartitioner, Partitioner
from lightning_lbgm.data.samplers import Sampler
from lightning_lbgm.network import NetworkClock, as_network
from lightning_lbgm.protocol.broadcast import as_downlink
from lightning_lbgm.protocol.channel import as_uplink
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.server.aggregation import Aggregator
from lightning_lbgm.server.presets import ServerPreset
from lightning_lbgm.strategy.execution import ExecutionMode
from lightning_lbgm.strategy.hints import with_hints
from lightning_lbgm.strategy.rounds import RoundsStrategy
from lightning_lbgm.strategy.session import Session
from lightning_lbgm.strategy.settings import Settings

__all__ = ["LBGMFederated"]


class LBGMFederated(RoundsStrategy):
    """Train a LightningModule as a federation of many clients, simulated on one device or dealt to several.

    Your module, your DataModule and the rest of your ``Trainer`` stay as they are. One Lightning training batch is
    one communication round: ``max_epochs``, ``max_steps``, ``val_check_interval``, ``log_every_n_steps`` and learning
    rate schedules count rounds, ``configure_optimizers`` makes the clients' optimizer, and validation, test and
    checkpoints see the global model. A strategy object belongs to one ``Trainer``.

    ``log_every_n_steps`` is 1 here if the ``Trainer`` has Lightning's default of 50.

    Args:
        num_clients: K, clients that the training data is dealt to. None: each loader of the list or dict given to
            ``fit`` (or returned by ``train_dataloader``) is a client, and its batches are taken as they come.
        partitioner: Deals the examples to the clients. None: ``IIDPartitioner()``. Not with ``num_clients=None``.
        uplink: Stages that an update passes on its way to the server. None: ``[LookBack(threshold=0.2)]``; ``[]``:
            plain FedAvg; ``[TopK(0.1), LookBack(0.2)]``: stacked.
        downlink: Stages that the global parameters pass on their way to the clients, as the difference from what these
            hold: ``[TopK(0.1), SignSGD()]``. None or ``[]``: each client gets the whole model in each of its rounds.
            With stages, clients train from what they hold, and validation and checkpoints have the server's model.
        clients_per_round: Size of a round's cohort. None: all; an int: a count; a float in (0, 1]: a share.
        local_epochs: Passes of a client over its examples in a round.
        local_steps: Optimizer steps of a client in a round (tau). At most one of the two; neither: one local epoch.
        server_optimizer: Called with the global parameters, returns a ``torch.optim.Optimizer`` that is stepped with
            the mean update as the gradient: ``FedAvgM()``, ``FedAdam(lr=0.01)``, ``FedYogi(lr=0.01)`` or any other.
            None: ``SGD(lr=1.0)``, which is FedAvg.
        weighting: Client weights omega_k: ``"examples"``, n_k over the cohort's sum; or ``"uniform"``.
        buffers: What becomes of all that training changes besides the trainable parameters: BatchNorm's statistics,
            other buffers, frozen parameters that the step moves (a momentum encoder). ``"average"``: float ones are
            sent and averaged, others stay the server's; ``"server"``: the server's stay as they are; ``"client"``:
            each client keeps its own, of every kind, and the global model's stay as they are, so do not judge a
            BatchNorm model by its validation then.
        rounds_per_epoch: Rounds in a Lightning epoch.
        seed: Seed of partition, cohorts, batch order and the clients' randomness. None: that of ``seed_everything``,
            else torch's.
        execution: How clients are simulated: ``"sequential"``, one after the other; ``"vectorized"``, in chunks that
            take their local steps at once, which must be possible; ``"auto"``, vectorised if that is likely to be
            faster (small modules without convolutions or dropout on a CPU, all on a GPU) and was seen to come to the
            same: some clients are trained alone too and compared.
        vectorized_chunk: Most clients in a chunk. None: 20 on a CPU, as many as 4 GiB of parameters allow on a GPU.
        aggregation: How the server makes one update of the cohort's. None: ``WeightedMean()``, which is FedAvg's;
            ``CoordinateMedian()``: robust against a minority of wrong ones.
        objective: What clients minimise besides the module's loss, against drifting apart: ``FedProx(mu=0.1)``,
            ``SCAFFOLD()`` or ``FedDyn(alpha=0.1)``. None: nothing.
        client_store: Where clients' states are kept: ``"memory"``, or a directory, for more clients than memory holds.
            Each client's whole state lies there then, in a sub-folder of the run that goes with it, and only the client
            at hand is in memory. Results are the same bit for bit.
        client_capacity: Clients of which both ends remember what was sent (look-back gradients and the like). Those of
            the client whose last cohort is longest ago go first; its next update goes in full. None: all.
        personal: Parameters and buffers that each client keeps for itself and never sends, such as its last layer: glob
            patterns over the names of ``named_parameters`` and ``named_buffers`` (``["head.*", "*.bn.*"]``; ``*`` goes
            beyond dots), or a function of a name and its tensor. A client starts with the module's values, and the
            global model keeps these. The other parameters are federated; other buffers follow ``buffers``. None or
            ``[]``: nothing.
        personal_steps: The first local steps of a client's turn, which change personal parameters alone; the others
            change shared ones alone (FedRep). None: each step changes all.
        sampler: What draws a round's cohort: ``UniformSampler()``, ``SizeSampler()``, ``PowerOfChoice(d)``, or a
            function ``(round, clients, rng) -> cohort`` that is given the available clients and a NumPy generator, a
            pure function of seed and round. None: uniformly.
        availability: Which clients can be drawn in a round: a probability for each; a function ``(round, client)`` that
            returns a bool or a probability; or a trace, which starts again when it ends: an array of 0 and 1 of the
            shape (rounds, clients), a dict of each client's rounds ``{client: [(from, to), ...]}`` up to before ``to``,
            or a file with one of them (``.npy``, ``.csv``, ``.json``). None: all. If nobody is available, the round
            passes without a step.
        over_select: So many times the cohort's size are chosen, and the fastest count up to its size: by local steps,
            or with ``network`` by the time that they are planned to need.
        deadline: Local steps that a client may need for its update to count, or with ``network`` a time: ``"30 s"``,
            ``"2 min"``. None: any number.
        dropout: Probability that a chosen client's update never arrives, ``Dropout(before, after)`` to distinguish
            drop-outs before and after the model was sent, or a function ``(round, client)`` that returns one of both.
            None: 0.
        network: A clock that says what each round would take in the world, by the bytes of each client's messages:
            ``NetworkClock(uplink="10 Mbit/s", downlink="50 Mbit/s", latency="40 ms", compute="20 ms")``, or the name of
            a preset. None: no clock. It changes who takes part only with ``over_select`` or a ``deadline`` in seconds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or both ``local_epochs`` and ``local_steps`` are given.
        MisconfigurationException: At fit start, if the Trainer or the module asks for what a federation cannot do.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import LBGMFederated, LookBack, PathologicalPartitioner
        >>> strategy = LBGMFederated(
        ...     num_clients=100, partitioner=PathologicalPartitioner(3), uplink=[LookBack(threshold=0.2)]
        ... )
        >>> trainer = Trainer(strategy=strategy, max_epochs=100, accelerator="cpu", logger=False)
    """

    strategy_name = "lbgm_federated"

    @with_hints
    def __init__(
        self,
        num_clients: int | None = 10,
        partitioner: Partitioner | None = None,
        uplink: list[Stage] | Stage | None = None,
        clients_per_round: int | float | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        server_optimizer: ServerPreset | Callable[[Iterable[Parameter]], Optimizer] | None = None,
        weighting: Literal["examples", "uniform"] = "examples",
        buffers: Literal["average", "server", "client"] = "average",
        rounds_per_epoch: int = 1,
        seed: int | None = None,
        execution: ExecutionMode = "auto",
        vectorized_chunk: int | None = None,
        aggregation: Aggregator | None = None,
        objective: LocalObjective | None = None,
        client_store: str = "memory",
        client_capacity: int | None = None,
        downlink: list[Stage] | Stage | None = None,
        personal: list[str] | Callable[[str, Tensor], bool] | None = None,
        personal_steps: int | None = None,
        sampler: Sampler | Callable[[int, Sequence[int], np.random.Generator], Sequence[int]] | None = None,
        availability: AvailabilityLike = None,
        over_select: float = 1.0,
        deadline: int | str | None = None,
        dropout: float | Dropout | Callable[[int, int], Dropout | float] | None = None,
        network: NetworkClock | str | None = None,
    ) -> None:
        self.uplink = as_uplink(uplink)
        self.downlink = as_downlink([] if downlink is None else downlink)
        clock = as_network(network)
        settings = Settings(
            num_clients=num_clients,
            partitioner=partitioner,
            uplink=self.uplink,
            downlink=self.downlink,
            clients_per_round=clients_per_round,
            local_epochs=local_epochs,
            local_steps=local_steps,
            server_optimizer=server_optimizer,
            weighting=weighting,
            buffers=buffers,
            rounds_per_epoch=rounds_per_epoch,
            seed=seed,
            execution=execution,
            vectorized_chunk=vectorized_chunk,
            aggregation=aggregation,
            objective=objective,
            client_store=client_store,
            client_capacity=client_capacity,
            personal=Personal.of(personal, personal_steps, local_steps),
            participation=Participation(sampler, availability, over_select, deadline, dropout, clock),
            network=clock,
        )
        super().__init__(Session(settings))
        self.local_epochs, self.local_steps = settings.epochs, local_steps
        self.server_optimizer, self.weighting, self.buffers, self.seed = server_optimizer, weighting, buffers, seed

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, description in STRATEGY_NAMES.items():
            if name not in strategy_registry:
                settings: dict[str, Any] = {"uplink": []} if name == "fedavg" else {}
                strategy_registry.register(name, cls, description=description, **settings)

    @property
    def num_clients(self) -> int | None:
        """K; None until the training loaders are known, if each of them is a client."""
        return self.session.settings.num_clients if self.session.feed is None else self.session.feed.num_clients

    @property
    def client_names(self) -> tuple[str, ...] | None:
        """The clients' names, if each has a loader of its own."""
        return None if self.session.feed is None else self.session.feed.client_names

    @property
    def cohort_size(self) -> int | None:
        """Clients in a round."""
        return resolve_cohort_size(self.num_clients, self.session.settings.clients_per_round)

    @property
    def partitioner(self) -> Partitioner:
        """What deals the examples to the clients."""
        return self.session.settings.partitioner or IIDPartitioner()

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in a Lightning epoch."""
        return self.session.settings.rounds_per_epoch

    @property
    def round_index(self) -> int:
        """Rounds done, which is the index of the round to come."""
        return self.session.round_index

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""
        return self.session.ledger

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings as plain values, for loggers."""
        return self.session.settings.describe(self.session.feed, self.session.federation, self.session.seed)


LBGMFederated.register_strategies(StrategyRegistry)
