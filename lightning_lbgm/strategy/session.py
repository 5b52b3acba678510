"""Session: what belongs to the fits of one Trainer, its federation, seed, restored state and patches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_lbgm.clients.objectives import SharedObjective
from lightning_lbgm.clients.optimizer_start import OptimizerStart
from lightning_lbgm.clients.personal import Alternation, PersonalParameters
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.data.feed import Feed
from lightning_lbgm.protocol.channel import Channel
from lightning_lbgm.protocol.downlink import Downlink, DownlinkServer
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.objective import ServerObjective
from lightning_lbgm.server.server import Server
from lightning_lbgm.simulation.checkpoint import VERSION
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.simulation.world import World
from lightning_lbgm.strategy.checks import warn_of_changed_parameters
from lightning_lbgm.strategy.resuming import resume
from lightning_lbgm.strategy.settings import Settings
from lightning_lbgm.strategy.transaction import RoundTransaction

__all__ = ["Session"]


class Session:
    """A federation over the fits of one Trainer.

    Args:
        settings: The federation's settings.

    Attributes:
        federation: Made at the start of the first fit, or anew if the trainable parameters change.
        restored: A checkpoint's state until the first round: a finished run that is resumed has none.
        identity: What a checkpoint must agree with.
        feed: The clients' data, once the training loader is known.
        seed_of_fit: The seed that the processes of this fit have agreed on.
        local_counts: What callbacks ask of each local batch.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.federation: Federation | None = None
        self.restored: dict[str, Any] | None = None
        self.identity: dict[str, Any] = {}
        self.feed: Feed | None = None
        self.seed_of_fit: int | None = None
        self.local_counts: list[Any] = []
        self.warned_of_zero_rate = False
        self._trainer: pl.Trainer | None = None  # of the last fit
        self._patches: list[Callable[[], None]] = []
        self._end_trial: Callable[[], None] | None = None
        self._transaction: RoundTransaction | None = None
        self._broke_off = False  # whether a round was taken back whose error is still on its way
        self._optimizer_start: tuple[Optimizer, OptimizerStart] | None = None

    # What it has come to

    @property
    def round_index(self) -> int:
        """Rounds done, which is the index of the round to come."""
        if self.restored is not None:
            return int(self.restored["round_index"])
        return self.federation.round_index if self.federation is not None else 0

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""
        if self.restored is not None:
            return Ledger.from_state(self.restored["ledger"])
        return self.federation.ledger if self.federation is not None else Ledger()

    @property
    def seed(self) -> int:
        """The run's seed: of the fit, the settings, the checkpoint, the federation, else Lightning's or torch's."""
        restored = None if self.restored is None else int(self.restored["seed"])
        federated = None if self.federation is None else self.federation.seed
        for seed in (self.seed_of_fit, self.settings.seed, restored, federated):
            if seed is not None:
                return seed
        return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % 2**32)

    def require(self) -> Federation:
        """Return the federation of a fit that has begun."""
        assert self.federation is not None
        return self.federation

    # Making the federation

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, world: World) -> Federation:
        """Return the federation that this fit trains: the last fit's if it goes on, else a new or a resumed one."""
        continues = self._trainer is trainer and trainer.global_step > 0 and self.restored is None
        if self.federation is None or not continues or not self.federation.flat.is_current(module):
            self.make(module, world)
        federation = self.require()
        if federation.round_index == 0 and trainer.global_step > 0:
            rank_zero_warn(
                "The checkpoint has no federation's state: clients start without look-back gradients and the account of"
                " bytes starts at zero."
            )
            federation.round_index = trainer.global_step
        self._trainer = trainer
        self.warned_of_zero_rate = False
        return federation

    def make(self, module: pl.LightningModule, world: World) -> Federation:
        """Make the federation, and continue it from a checkpoint that was loaded."""
        settings, feed = self.settings, self.feed
        assert feed is not None
        try:
            personal = None if settings.personal is None else PersonalParameters(settings.personal, module)
            flat = FlatParameters(module, None if personal is None else personal.includes)
        except ValueError as error:
            raise MisconfigurationException(f"`{type(module).__name__}` cannot be federated. {error}") from error
        server, objective = Server(flat, settings.server_optimizer, settings.aggregation), None
        network = settings.network
        if isinstance(settings.objective, SharedObjective):
            objective = ServerObjective(settings.objective, feed.num_clients, server.server_params)
        federation = Federation(
            flat,
            settings.uplink,
            server,
            Buffers(module, settings.buffers, personal),
            settings.weighting,
            self.seed,
            world,
            channel=self.make_channel(module, flat),
            downlink=self.make_downlink(flat),
            store=settings.store,
            capacity=settings.capacity,
            sampler=settings.participation.sampler,
            objective=objective,
            links=None if network is None else network.links(self.seed, feed.num_clients, feed.client_names),
        )
        self.identity = settings.identify(federation, feed, VERSION)
        restored, self.restored = self.restored, None
        if restored is not None:
            resume(settings, federation, feed, restored)
        self.federation = federation
        return federation

    def make_channel(self, module: pl.LightningModule, flat: FlatParameters) -> Channel | None:
        """Return the way from a client to the server; None: within this process."""
        return None

    def make_downlink(self, flat: FlatParameters) -> Downlink | None:
        """Return the way from the server to the clients; None: each gets the whole model."""
        downlink = self.settings.downlink
        return DownlinkServer(downlink, flat.layout) if downlink.stages else None

    def current(self, module: pl.LightningModule, world: World) -> Federation:
        """Return the federation, made anew if a callback has frozen or unfrozen parameters."""
        known = self.require()
        if known.flat.is_current(module):
            return known
        fresh = self.make(module, world)
        if known.round_index:
            warn_of_changed_parameters(known.round_index, known.flat.num_parameters, fresh.flat.num_parameters)
        fresh.round_index, fresh.ledger, fresh.seed = known.round_index, known.ledger, known.seed
        fresh.sampling = known.sampling
        fresh.take_personal(known)
        return fresh

    def alternation(self) -> Alternation | None:
        """Return which parameters a local step of this round changes; None if all."""
        personal, federation = self.settings.personal, self.require()
        if personal is None or personal.steps is None:
            return None
        own = list(federation.buffers.personal().values())
        return Alternation(personal.steps, federation.flat.parameters, own) if own else None

    def start_of(self, optimizer: Optimizer) -> OptimizerStart:
        """Return the state that the optimizer was made with."""
        if self._optimizer_start is None or self._optimizer_start[0] is not optimizer:
            self._optimizer_start = optimizer, OptimizerStart(optimizer)
        return self._optimizer_start[1]

    # Rounds as transactions

    def begin_round(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the round before final; from here on what happens can be taken back."""
        self.commit()
        self._transaction = RoundTransaction(trainer, module)

    def commit(self) -> None:
        """Make the last round final."""
        if self.federation is not None:
            self.federation.commit()

    def roll_back(self) -> None:
        """Leave module, clients, ledger and loop counters as they were before the round that broke off, if one did."""
        transaction, self._transaction = self._transaction, None
        if transaction is None or not transaction.is_open:
            return
        self._broke_off = True
        lost = self.federation.roll_back() if self.federation is not None else 0
        transaction.undo()
        if lost:
            rank_zero_warn(
                f"The round that broke off was taken back. What {lost} of its clients had kept was too large to be held"
                " twice: their next updates go in full."
            )

    def take_broken(self) -> bool:
        """Return whether a round was taken back since this was asked last."""
        broke_off, self._broke_off = self._broke_off, False
        return broke_off

    # Patches of a fit

    @property
    def is_patched(self) -> bool:
        """Whether a fit has begun that has not been torn down."""
        return bool(self._patches)

    def patch(self, *undo: Callable[[], None]) -> None:
        """Remember how to undo what was patched for this fit."""
        self._patches += undo

    def begin_trial(self, end: Callable[[], None] | None) -> None:
        """Remember how to end a tuner's trial, if there is one."""
        self._end_trial = end

    def end(self) -> None:
        """End a fit: its last round is final, and a tuner's trial is over."""
        self.commit()
        if self._end_trial is not None:
            self._end_trial()
            self._end_trial = None

    def close(self) -> None:
        """Undo the patches of a fit."""
        for undo in self._patches:
            undo()
        self._patches = []
        self.seed_of_fit = None
        self._transaction = None
