"""Federation: a communication round from local training to the server's step, and the state between rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lbgm.clients.base import ClientTrainer, ClientUpdate, RoundStart
from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.core.rng import isolated_rng
from lightning_lbgm.data.rounds import Round
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.protocol.broadcast import Delivery
from lightning_lbgm.protocol.channel import Channel, SharedChannel
from lightning_lbgm.protocol.downlink import Downlink, WholeModel
from lightning_lbgm.protocol.endpoints import Received
from lightning_lbgm.protocol.message import count_bits
from lightning_lbgm.protocol.recency import LeastRecentlyUsed
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.reports.reports import ClientReport, RoundReport
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.compression_error import CompressionError
from lightning_lbgm.server.server import Server
from lightning_lbgm.simulation.client_store import open_client_states
from lightning_lbgm.simulation.placement import take_share
from lightning_lbgm.simulation.round_parts import MeanLoss, client_report, client_weights, round_result
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
    ) -> None:
        self.flat = flat
        self.uplink = uplink
        self.channel = channel or SharedChannel(uplink)
        self.downlink = downlink or WholeModel()
        self.server = server
        self.buffers = buffers
        self.weighting = weighting
        self.seed = seed
        self.world = world or World()
        self.round_index = 0
        self.ledger = Ledger()
        self.clients = open_client_states(store, flat.device)
        self.placement: dict[int, int] = {}  # the rank that holds a client's state, of all clients
        self.recency = LeastRecentlyUsed(capacity)
        self.shared = uplink.init_shared()
        self._errors: CompressionError | None = None  # if they are measured
        self._deliveries: dict[int, Delivery] = {}  # of the round at hand
        self._reports: list[ClientReport] = []
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
        self._reports = []
        self.undo = RoundUndo(self)
        self.in_round = True
        self.server.begin_round(len(round_.cohort))
        self.buffers.begin_round()
        self._errors = CompressionError(self.server.server_params) if measure_errors else None
        weights = client_weights(round_, self.weighting)
        examples = dict(zip(round_.cohort, round_.num_examples))
        for client_id in self.recency.begin(round_.cohort):
            self._forget(client_id)
        loss = MeanLoss(self.flat.device)
        try:
            start = RoundStart(self._send_down(round_.cohort), self.seed, self._own_buffers, self._objective_state)
            share = take_share(round_, self.placement, self.clients, self.world, self.flat.device)
            with isolated_rng(self.flat.device):
                for update in trainer.run(share, start):
                    client_id = update.client_id
                    report = self._send(update, examples[client_id], weights[client_id])
                    self._reports.append(report)
                    if self.recency.is_forgotten_after_turn(client_id):
                        self._forget(client_id)
                    if report.rejected:
                        trainer.capture.reject()
                    else:
                        trainer.capture.accept()
                        loss.add(update.local)
                    if on_client_end is not None:
                        # Estimate the cohort's progress from this rank's share.
                        on_client_end(report, len(self._reports) * len(weights) // len(share.cohort), len(weights))
            if self.world.size > 1:
                self._combine(trainer.capture, weights, loss)
        except BaseException:
            self.world.close()
            self.roll_back()
            raise
        return loss.value()

    def _send_down(self, cohort: Sequence[int]) -> Tensor:
        """Bring the cohort up to date, on every rank because it concerns all, and return what it holds then."""
        context = Context(self.round_index, {}, self.seed)
        held = self.downlink.begin_round(self.server.server_params, context, self.buffers.downlink)
        self._deliveries = {client_id: self.downlink.deliver(client_id) for client_id in cohort}
        return held

    def _combine(self, capture: RoundLog, weights: Mapping[int, float], loss: MeanLoss) -> None:
        """Make of every rank's client phase the whole round's, the same on every rank."""
        module, device = self.buffers.module, self.flat.device
        own = {
            "reports": self._reports,
            "buffers": self.buffers.received,
            "log": capture.export(module),
            "loss": loss.export(),
        }
        parts = self.world.gather(own, f"round {self.round_index}")
        self._reports = sorted((r for part in parts for r in part["reports"]), key=lambda report: report.client_id)
        sent = [weights[report.client_id] for report in self._reports if not report.rejected]
        self.server.merge(self.world, sent)
        if self._errors is not None:
            self._errors.combine(self.world.all_reduce_sum)
        self.buffers.combine([part["buffers"] for part in parts], self.world.all_reduce_sum)
        capture.combine([part["log"] for part in parts], module, device)
        loss.combine([part["loss"] for part in parts])

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
        mean_update = self.server.finish()
        self._end_uplink_round(mean_update)
        error = self._errors.finish(mean_update, self.server.total_weight) if self._errors is not None else None
        norm = self.server.step()
        self.buffers.finish_round(self.server.total_weight)
        report = RoundReport(self.round_index, tuple(self._reports), norm, error, self.downlink.last)
        self.ledger.record(report)
        self.recency.finish()
        self.round_index += 1
        self._reports = []
        self.in_round = False
        return report

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
        self._reports = []
        self.in_round = False
        return undo.restore()

    def _end_uplink_round(self, mean_update: Tensor | None) -> None:
        """Let the stages learn from the round what concerns all clients."""
        if mean_update is None:
            return
        result = round_result(self.flat.layout, self.server.server_params, mean_update, self._reports)
        # No client has the number -1: what the server draws is independent of what they do.
        self.uplink.end_round(self.shared, result, Context(self.round_index, self.shared, self.seed, (-1,)))

    @contextmanager
    def global_model(self) -> Iterator[None]:
        """Put the global parameters and buffers into the module for a while, if a client trains on it now."""
        if not self.in_round:
            yield
            return
        parameters, buffers = self.flat.read(), self.buffers.read()
        self.flat.write(self.server.server_params)
        self.buffers.load()
        try:
            yield
        finally:
            self.flat.write(parameters)
            self.buffers.load(buffers)

    def _forget(self, client_id: int) -> None:
        """Let both ends forget a client's look-back gradients."""
        state = self.clients.get(client_id)
        if state is not None:
            assert self.undo is not None
            self.undo.remember(client_id, state)
            self.channel.forget(state["uplink"])
            self.clients[client_id] = state

    def _own_buffers(self, client_id: int) -> dict[str, Tensor] | None:
        if self.buffers.mode != "client":
            return None
        return self.clients.get(client_id, {}).get("buffers")

    def _objective_state(self, client_id: int) -> dict[str, Any] | None:
        return self.clients.get(client_id, {}).get("objective")

    @torch.no_grad()
    def _send(self, result: ClientUpdate, num_examples: int, weight: float) -> ClientReport:
        client_id = result.client_id
        assert self.undo is not None
        known = self.clients.get(client_id)
        self.undo.remember(client_id, known)
        update, buffers = Dense(result.update, self.flat.layout), result.buffers
        squared_norm = update.squared_norm()
        finite = math.isfinite(squared_norm) or update.is_finite()  # the norm alone may overflow
        received: Received | None = None
        dense_bits = 0
        squared_error = math.nan
        if finite and self.buffers.is_sound(buffers):
            state = known or {"uplink": self.channel.init()}
            if self.buffers.mode == "client":
                state["buffers"] = {name: buffer.clone() for name, buffer in buffers.items()}
                buffers = {}
            if result.objective is not None:
                state["objective"] = result.objective
            context = Context(self.round_index, self.shared, self.seed, (client_id,))
            received = self.channel.send(client_id, update, buffers, context, state["uplink"])
            if received is not None:
                self.server.receive(received.update, weight)
                if self._errors is not None:
                    squared_error = self._errors.receive(result.update, received.update, weight)
                if received.buffers:
                    self.buffers.receive(received.buffers, weight)
                dense_bits = count_bits(update.num_bits, buffers)
            self.clients[client_id] = state
            self.undo.settle(client_id, state)
        return client_report(
            result, num_examples, squared_norm, received, dense_bits, self._deliveries[client_id], squared_error
        )
