"""Client phase of a round: local training, the uplink, and the streamed sum on the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_lbgm.clients.base import ClientTrainer, ClientUpdate, RoundStart
from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.compression.context import Context
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.core.rng import isolated_rng
from lightning_lbgm.data.rounds import Round
from lightning_lbgm.network import Links, RoundTime
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.protocol.broadcast import Delivery
from lightning_lbgm.protocol.channel import Channel
from lightning_lbgm.protocol.endpoints import Received
from lightning_lbgm.protocol.message import count_bits
from lightning_lbgm.reports.reports import AggregateError, ClientReport
from lightning_lbgm.server.compression_error import CompressionError
from lightning_lbgm.simulation.placement import take_share
from lightning_lbgm.simulation.round_parts import MeanLoss, client_report, client_weights, dropped_reports
from lightning_lbgm.simulation.stopwatch import Stopwatch
from lightning_lbgm.simulation.undo import RoundState, RoundUndo
from lightning_lbgm.simulation.world import World

__all__ = ["ClientPhase"]


class Simulated(RoundState, Protocol):
    """What the client phase asks of a federation, and changes of it.

    Attributes:
        flat: The trainable parameters.
        channel: The way from a client to the server.
        weighting: How clients count.
        seed: The run's seed.
        world: The processes.
        links: The clients' links to the server; None without a clock.
    """

    flat: FlatParameters
    channel: Channel
    weighting: Literal["examples", "uniform"]
    seed: int
    world: World
    links: Links | None

    def own_values(self, client_id: int) -> dict[str, Tensor] | None:
        """Return what a client keeps for itself of parameters and buffers, by name; None if there is nothing."""


class ClientPhase:
    """The clients' part of one round.

    Args:
        federation: The federation, whose clients, server and buffers it changes.
        round_: The cohort and its data.
        undo: Told of each client's state before it changes.
        measure_errors: Whether to compare what the server decodes with the exact updates.

    Attributes:
        reports: Of the clients that are done; after ``run`` of all, in order of client.
        dropped: Reports of the clients that were chosen and dropped out, in order of client.
        num_available: Clients that could have been chosen; None if nobody can be missing.
        is_heard: Whether the server has sent anything.
        turn: What the client whose turn ends started from and came to, while ``on_client_end`` is called.
    """

    def __init__(self, federation: Simulated, round_: Round, undo: RoundUndo, measure_errors: bool = False) -> None:
        self.reports: list[ClientReport] = []
        self.dropped: tuple[ClientReport, ...] = ()
        self.num_available = round_.num_available
        self.is_heard = bool(round_.cohort or round_.dropped)
        self.turn: tuple[RoundStart, ClientUpdate] | None = None
        self._federation = federation
        self._round = round_
        self._undo = undo
        federation.server.begin_round(len(round_.cohort))
        federation.buffers.begin_round()
        if federation.objective is not None:
            federation.objective.begin_round()
        self._errors = CompressionError(federation.server.server_params) if measure_errors else None
        self._weights = client_weights(round_, federation.weighting)
        self._examples = dict(zip(round_.cohort, round_.num_examples))
        self._loss = MeanLoss(federation.flat.device)
        self._deliveries: dict[int, Delivery] = {}
        measures = federation.links is not None and federation.links.measures
        self._stopwatch = Stopwatch(federation.flat.device) if measures else None
        for client_id in federation.recency.begin(round_.cohort):
            self._forget(client_id)

    def run(
        self, trainer: ClientTrainer, on_client_end: Callable[[ClientReport, int, int], None] | None = None
    ) -> Tensor:
        """Train the clients of this rank, and put together what all ranks have received.

        Args:
            trainer: Trains the clients.
            on_client_end: Called with each client's report, the number of clients done and the size of the cohort.

        Returns:
            The loss, shape ``()``: the mean over all local steps of the clients that were not rejected.
        """
        federation, round_ = self._federation, self._round
        held = self._send_down((*round_.cohort, *round_.dropped))
        if round_.num_available is not None:
            self.dropped = dropped_reports(round_, self._deliveries)
        shared = {} if federation.objective is None else federation.objective.state
        start = RoundStart(held, federation.seed, federation.own_values, self._objective_state, shared)
        share = take_share(round_, federation.placement, federation.clients, federation.world, federation.flat.device)
        with isolated_rng(federation.flat.device):
            updates = trainer.run(share, start)
            for update in updates if self._stopwatch is None else self._stopwatch.watch(updates):
                report = self._send(update)
                self.reports.append(report)
                if federation.recency.is_forgotten_after_turn(update.client_id):
                    self._forget(update.client_id)
                if report.rejected:
                    trainer.capture.reject()
                else:
                    trainer.capture.accept()
                    self._loss.add(update.local)
                if on_client_end is not None:
                    # Estimate the cohort's progress from this rank's share.
                    done = len(self.reports) * len(round_.cohort) // len(share.cohort)
                    self.turn = start, update
                    on_client_end(report, done, len(round_.cohort))
                    self.turn = None
        if federation.world.size > 1:
            self._combine(trainer.capture)
        return self._loss.value()

    def error(self, mean_update: Tensor | None) -> AggregateError | None:
        """Return what compression cost the aggregated update; None if it was not measured, or nothing was received."""
        if self._errors is None:
            return None
        return self._errors.finish(mean_update, self._federation.server.total_weight)

    def time(self) -> RoundTime | None:
        """Return what the round took on the network, after ``run``; None without a clock."""
        if self._federation.links is None:
            return None
        measured = math.nan if self._stopwatch is None else self._stopwatch.seconds_per_step
        parts = ((r.client_id, r.downlink_bits, r.local_steps, r.uplink_bits) for r in self.reports)
        return self._federation.links.round_time(parts, measured, self._round.waits_until)

    def _send_down(self, clients: Sequence[int]) -> Tensor:
        """Bring clients up to date, on every rank because it concerns all, and return what they hold then."""
        federation = self._federation
        if not self.is_heard:
            return federation.server.server_params
        downlink, context = federation.downlink, Context(federation.round_index, {}, federation.seed)
        held = downlink.begin_round(federation.server.server_params, context, federation.buffers.downlink)
        self._deliveries = {client_id: downlink.deliver(client_id) for client_id in clients}
        if federation.objective is not None and (bits := federation.objective.num_bits):
            self._deliveries = {k: replace(sent, bits=sent.bits + bits) for k, sent in self._deliveries.items()}
        return held

    def _combine(self, capture: RoundLog) -> None:
        """Make of every rank's client phase the whole round's, the same on every rank."""
        federation, world, weights = self._federation, self._federation.world, self._weights
        module, device = federation.buffers.module, federation.flat.device
        own = {
            "reports": self.reports,
            "buffers": federation.buffers.received,
            "log": capture.export(module),
            "loss": self._loss.export(),
            "seconds": None if self._stopwatch is None else self._stopwatch.export(),
        }
        parts = world.gather(own, f"round {federation.round_index}")
        self.reports = sorted((r for part in parts for r in part["reports"]), key=lambda report: report.client_id)
        sent = [weights[report.client_id] for report in self.reports if not report.rejected]
        federation.server.merge(world, sent)
        if federation.objective is not None:
            federation.objective.merge(world)
        if self._errors is not None:
            self._errors.combine(world.all_reduce_sum)
        federation.buffers.combine([part["buffers"] for part in parts], world.all_reduce_sum)
        capture.combine([part["log"] for part in parts], module, device)
        self._loss.combine([part["loss"] for part in parts])
        if self._stopwatch is not None:
            self._stopwatch.combine([part["seconds"] for part in parts])

    def _forget(self, client_id: int) -> None:
        """Let both ends forget a client's look-back gradients."""
        state = self._federation.clients.get(client_id)
        if state is not None and "uplink" in state:
            self._undo.remember(client_id, state)
            self._federation.channel.forget(state["uplink"])
            self._federation.clients[client_id] = state

    def _objective_state(self, client_id: int) -> dict[str, Any] | None:
        return self._federation.clients.get(client_id, {}).get("objective")

    @torch.no_grad()
    def _send(self, result: ClientUpdate) -> ClientReport:
        """Let a client send its update, and the server receive it."""
        federation, client_id = self._federation, result.client_id
        weight = self._weights[client_id]
        known = federation.clients.get(client_id)
        self._undo.remember(client_id, known)
        update, buffers = Dense(result.update, federation.flat.layout), result.buffers
        squared_norm = update.squared_norm()
        finite = math.isfinite(squared_norm) or update.is_finite()  # the norm alone may overflow
        received: Received | None = None
        dense_bits = 0
        squared_error = math.nan
        if finite and federation.buffers.is_sound(buffers):
            state = known or {}
            if "uplink" not in state:
                state["uplink"] = federation.channel.init()
            kept, buffers = federation.buffers.own.part(buffers)
            context = Context(federation.round_index, federation.shared, federation.seed, (client_id,))
            received = federation.channel.send(client_id, update, buffers, context, state["uplink"])
            if received is not None:
                state.update(kept)
                if result.objective is not None:
                    state["objective"] = result.objective
                federation.server.receive(received.update, weight)
                if federation.objective is not None:
                    learnt = federation.objective.receive(state.get("objective"), received.update, result.step_sizes)
                    state.update({"objective": learnt} if learnt else {})
                if self._errors is not None:
                    squared_error = self._errors.receive(result.update, received.update, weight)
                if received.buffers:
                    federation.buffers.receive(received.buffers, weight)
                dense_bits = count_bits(update.num_bits, buffers)
            federation.clients[client_id] = state
            self._undo.settle(client_id, state)
        return client_report(
            result,
            self._examples[client_id],
            squared_norm,
            received,
            dense_bits,
            self._deliveries[client_id],
            squared_error,
        )
