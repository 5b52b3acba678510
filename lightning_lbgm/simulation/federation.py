"""Federation: a communication round from local training to the server's step, and the state between rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from torch import Tensor

from lightning_lbgm.clients.base import ClientTrainer
from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.data.rounds import Round
from lightning_lbgm.data.samplers import Sampler, SamplerState
from lightning_lbgm.network import Links, Plan
from lightning_lbgm.protocol.channel import Channel, SharedChannel
from lightning_lbgm.protocol.downlink import Downlink, WholeModel
from lightning_lbgm.protocol.recency import LeastRecentlyUsed
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.reports.reports import Broadcast, ClientReport, RoundReport
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.objective import ServerObjective
from lightning_lbgm.server.server import Server
from lightning_lbgm.simulation.client_models import client_model, global_model, local_model
from lightning_lbgm.simulation.client_phase import ClientPhase
from lightning_lbgm.simulation.client_store import open_client_states
from lightning_lbgm.simulation.round_parts import round_result
from lightning_lbgm.simulation.undo import RoundUndo
from lightning_lbgm.simulation.world import World

__all__ = ["Federation"]


class Federation:
    """Clients, uplink and server of one run, simulated in one process or in several.

    A round streams the cohort: a ``ClientTrainer`` yields one client's update at a time, a vector of shape ``(M,)``
    that it may reuse. A ``Channel`` makes of it what the server sees; only a ``Message`` crosses.

    Of several processes (ranks) each trains its share of every cohort and holds the state of its own clients. At the
    end of the client phase they put together what they have received; the server's step is the same in each.

    Args:
        flat: The trainable parameters.
        uplink: The stages.
        server: Aggregation and server optimizer.
        buffers: What becomes of the module's buffers.
        weighting: ``"examples"``, omega_k = n_k / sum(n_j) over the cohort; or ``"uniform"``.
        seed: The run's seed.
        world: The processes. None: this one alone.
        channel: The way from a client to the server, with the same stages. None: a ``SharedChannel``.
        downlink: The way from the server to the clients. None: each gets the whole model.
        store: Where clients' states are kept: ``"memory"`` or a directory.
        capacity: Clients of which both ends remember what was sent; None: all.
        sampler: What draws the cohorts, and learns from the rounds; None: nothing learns.
        objective: The server's part of the clients' local objective; None if it has none.
        links: The clients' links to the server, for a clock that says what rounds take; None: no clock.
    """

    def __init__(
        self,
        flat: FlatParameters,
        uplink: Chain,
        server: Server,
        buffers: Buffers,
        weighting: Literal["examples", "uniform"],
        seed: int,
        world: World | None = None,
        *,
        channel: Channel | None = None,
        downlink: Downlink | None = None,
        store: str = "memory",
        capacity: int | None = None,
        sampler: Sampler | None = None,
        objective: ServerObjective | None = None,
        links: Links | None = None,
    ) -> None:
        self.flat = flat
        self.uplink = uplink
        self.channel = channel or SharedChannel(uplink)
        self.downlink = downlink or WholeModel()
        self.server = server
        self.buffers = buffers
        self.objective = objective
        self.links = links
        self.weighting = weighting
        self.seed = seed
        self.world = world or World()
        self.round_index = 0
        self.ledger = Ledger()
        self.clients = open_client_states(store, flat.device)
        self.placement: dict[int, int] = {}  # the rank that holds a client's state, of all clients
        self.recency = LeastRecentlyUsed(capacity)
        self.shared = uplink.init_shared()
        self.sampler = sampler
        self.sampling: SamplerState = {} if sampler is None else sampler.init()
        self._phase: ClientPhase | None = None  # of the round at hand
        self.undo: RoundUndo | None = None  # until the round is final
        self.in_round = False  # whether the client phase has begun and the server has not stepped yet

    def run_clients(
        self,
        round_: Round,
        trainer: ClientTrainer,
        on_client_end: Callable[[ClientReport, int, int], None] | None = None,
        measure_errors: bool = False,
    ) -> Tensor:
        """Run the client phase of a round: local training, uplink, and the streamed sum on the server.

        Afterwards the module holds some client's parameters, until ``finish_round``.

        Args:
            round_: The cohort and its data.
            trainer: Trains the clients.
            on_client_end: Called with each client's report, the number of clients done and the size of the cohort.
            measure_errors: Whether to compare what the server decodes with the exact updates, for the report; the same
                on every rank. It takes two vectors of shape ``(M,)`` and a few passes over each update.

        Returns:
            The loss, shape ``()``: the mean over all local steps of the clients that were not rejected, weighted by
            batch size; NaN if there is none.
        """
        undo = self.undo = RoundUndo(self)
        self.in_round = True
        try:
            phase = self._phase = ClientPhase(self, round_, undo, measure_errors)
            return phase.run(trainer, on_client_end)
        except BaseException:
            self.world.close()
            self.roll_back()
            raise

    def finish_round(self) -> RoundReport:
        """Make the server's step, leave the global parameters in the module, and close the account of the round.

        It can be taken back by ``roll_back`` until ``commit``. If it raises, it is taken back at once.
        """
        try:
            return self._finish_round()
        except BaseException:
            self.roll_back()
            raise

    def _finish_round(self) -> RoundReport:
        assert self._phase is not None
        phase = self._phase
        reports, mean_update = phase.reports, self.server.finish()
        self._end_uplink_round(mean_update, reports)
        error = phase.error(mean_update)
        if self.objective is not None and mean_update is not None:
            self.objective.finish(mean_update)
        norm = self.server.step()
        self.buffers.finish_round(self.server.total_weight)
        broadcast = self.downlink.last
        if broadcast is not None and not phase.is_heard:
            broadcast = Broadcast(error=math.nan)
        report = RoundReport(
            self.round_index, tuple(reports), norm, error, broadcast, phase.dropped, phase.num_available, phase.time()
        )
        self.ledger.record(report)
        if self.sampler is not None:
            self.sampling = self.sampler.end_round(self.sampling, {c.client_id: c.loss for c in reports})
        self.recency.finish()
        self.round_index += 1
        self._phase, self.in_round = None, False
        return report

    def plan(self) -> Plan | None:
        """Return what clients' times can be told before they train; None without a clock, or if it measures."""
        if self.links is None:
            return None
        whole = 8 * (self.server.server_params.nbytes + sum(t.nbytes for t in self.buffers.downlink.values()))
        return self.links.plan(whole + (0 if self.objective is None else self.objective.num_bits), whole)

    def commit(self) -> None:
        """Make the last round final: what it was before is forgotten."""
        if not self.in_round:
            self.undo = None

    def roll_back(self) -> int:
        """Leave everything as it was before the round at hand, or the last one if that is not final yet.

        Returns:
            The number of clients whose state could not be kept: their next update goes in full.
        """
        if self.undo is None:
            return 0
        undo, self.undo = self.undo, None
        self._phase, self.in_round = None, False
        return undo.restore()

    def _end_uplink_round(self, mean_update: Tensor | None, reports: Sequence[ClientReport]) -> None:
        """Let the stages learn from the round what concerns all clients."""
        if mean_update is None:
            return
        result = round_result(self.flat.layout, self.server.server_params, mean_update, reports)
        # No client has the number -1: what the server draws is independent of what they do.
        self.uplink.end_round(self.shared, result, Context(self.round_index, self.shared, self.seed, (-1,)))

    def own_values(self, client_id: int) -> dict[str, Tensor] | None:
        """Return what a client keeps for itself of parameters and buffers, by name; None if there is nothing.

        Of several processes, the client's own has it.
        """
        own = self.buffers.own
        return own.of(self.clients[client_id]) if own.is_any and client_id in self.clients else None

    def take_personal(self, other: Federation) -> None:
        """Take over what another federation's clients keep as personal, as far as it fits, and their places."""
        if not self.buffers.own.has_personal:
            return
        module = self.buffers.module
        kinds = {name: (t.shape, t.dtype) for name, t in (*module.named_parameters(), *module.named_buffers())}
        for client_id, state in other.clients.items():
            values = {n: t for n, t in state.get("personal", {}).items() if kinds.get(n) == (t.shape, t.dtype)}
            if values:
                self.clients[client_id] = {"personal": values}
        self.placement = dict(other.placement)

    def global_model(self) -> AbstractContextManager[None]:
        """Put the global parameters and buffers into the module for a while, if a client trains on it now."""
        return global_model(self)

    def client_model(self, client_id: int) -> AbstractContextManager[None]:
        """Put the global model as a client uses it into the module for a while, on the rank that holds the client."""
        return client_model(self, client_id)

    def local_model(self) -> AbstractContextManager[None]:
        """Put the local model of the client whose turn ends into the module for a while, within ``on_client_end``."""
        assert self._phase is not None
        assert self._phase.turn is not None
        return local_model(self, *self._phase.turn)

    def share_of(self, client_ids: Sequence[int]) -> list[int]:
        """Return which clients this rank is to evaluate: those whose state it holds, and of the others every N-th."""
        rank_of = {k: self.placement.get(k, position % self.world.size) for position, k in enumerate(client_ids)}
        return [client_id for client_id in client_ids if rank_of[client_id] == self.world.rank]
