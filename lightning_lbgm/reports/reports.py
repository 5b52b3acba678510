"""Reports of a client and of a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_lbgm.compression.context import Decision
from lightning_lbgm.network import RoundTime

__all__ = ["AggregateError", "Broadcast", "ClientReport", "RoundReport"]


@dataclass(frozen=True)
class ClientReport:
    """One client's part in one round.

    Attributes:
        client_id: The client.
        num_examples: Examples in its partition.
        local_steps: Optimizer steps that it made.
        loss: Mean loss over its local steps, weighted by batch size.
        update_norm: ``|g_k|`` before compression; not finite if rejected.
        uplink_bits: Bits that it sent.
        dense_bits: Bits that FedAvg would have sent for it.
        downlink_bits: Bits that it received.
        dense_downlink_bits: Bits of the whole model, which FedAvg would have sent to it.
        whole_model: Whether it received the whole model.
        decision: The look-back tests' outcome, or None if none was made.
        rejected: Whether it was left out, because its update was not finite or did not reach the server.
        dropped: Whether it was chosen and dropped out, or came too late: it was not trained here.
        squared_error: ``|g_k - g~_k|^2``, with what the server decoded; NaN if it was not measured, or rejected.
        metrics: Further numbers by name, of the client's trainer, the stages and callbacks, which may add to it.
        missing: Why it was rejected, in words, if its update did not reach the server; else empty.
    """

    client_id: int
    num_examples: int
    local_steps: int
    loss: float
    update_norm: float
    uplink_bits: int
    dense_bits: int
    downlink_bits: int
    dense_downlink_bits: int = 0
    whole_model: bool = True
    decision: Decision | None = None
    rejected: bool = False
    squared_error: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    dropped: bool = False
    missing: str = ""

    @property
    def outcome(self) -> str:
        """What became of its update: ``"dropped"``, ``"rejected"``, ``"sent"``, or what the stage that decided says."""
        if self.dropped:
            return "dropped"
        if self.rejected:
            return "rejected"
        return "sent" if self.decision is None else self.decision.outcome

    @property
    def lbp_error(self) -> float:
        """Mean LBP error of the client's tests; NaN if none was made."""
        return mean_or_nan(self.decision.errors) if self.decision else math.nan


@dataclass(frozen=True)
class AggregateError:
    """How far the mean update that the server used is from the exact one, the same mean before compression.

    Attributes:
        norm: L2 norm of their difference.
        exact_norm: L2 norm of the exact one.
        cosine: Cosine of the angle between them, in [-1, 1]; NaN if one of them is zero.
    """

    norm: float
    exact_norm: float
    cosine: float

    @property
    def relative(self) -> float:
        """``norm / exact_norm``; NaN if the exact one is zero."""
        return self.norm / self.exact_norm if self.exact_norm > 0 else math.nan


@dataclass(frozen=True)
class Broadcast:
    """What the server sent to all clients in a round.

    Attributes:
        bits: Of the message, without buffers; 0 in a round in which every client gets the whole model.
        error: Share of ``|w - w^|^2`` that it left, in [0, 1]; 0 if clients held w already.
        decision: The look-back tests of the stages; None if none was made.
    """

    bits: int = 0
    error: float = 0.0
    decision: Decision | None = None


@dataclass(frozen=True)
class RoundReport:
    """One round.

    Attributes:
        round_index: The round, from 0.
        clients: The cohort's reports, in order of client.
        update_norm: L2 norm of the aggregated update, the server's pseudo-gradient.
        error: What compression cost the aggregated update; None if it was not measured, or nothing was received.
        broadcast: What the server sent to all clients; None if each gets the whole model anyway.
        dropped: Reports of the clients that were chosen and do not belong to the cohort, in order of client.
        num_available: Clients that could have been chosen; None if nobody can be missing.
        time: What the round took on the network; None without a clock.
    """

    round_index: int
    clients: tuple[ClientReport, ...]
    update_norm: float
    error: AggregateError | None = None
    broadcast: Broadcast | None = None
    dropped: tuple[ClientReport, ...] = ()
    num_available: int | None = None
    time: RoundTime | None = None

    @property
    def chosen(self) -> tuple[ClientReport, ...]:
        """The reports of all clients that were chosen, in order of client."""
        if not self.dropped:
            return self.clients
        return tuple(sorted((*self.clients, *self.dropped), key=lambda client: client.client_id))

    @property
    def downlink_bits(self) -> int:
        """Bits that clients received, those that dropped out included."""
        return sum(client.downlink_bits for client in self.chosen)

    @property
    def num_whole_models(self) -> int:
        """Clients that received the whole model."""
        return sum(client.whole_model for client in self.chosen)

    @property
    def uplink_bits(self) -> int:
        """Bits that the cohort sent."""
        return sum(client.uplink_bits for client in self.clients)

    @property
    def num_rejected(self) -> int:
        """Clients left out because their update was not finite, or did not reach the server."""
        return sum(client.rejected for client in self.clients)

    @property
    def recycled_fraction(self) -> float:
        """Share of the look-back tests that recycled, in [0, 1]; 0 if none was made."""
        recycled = [flag for c in self.clients if c.decision for flag in c.decision.recycled]
        return sum(recycled) / len(recycled) if recycled else 0.0

    @property
    def client_metrics(self) -> dict[str, float]:
        """Mean of each of the clients' further metrics, by name, over the clients that have it."""
        values: dict[str, list[float]] = {}
        for client in self.clients:
            for name, value in client.metrics.items():
                values.setdefault(name, []).append(value)
        return {name: mean_or_nan(numbers) for name, numbers in sorted(values.items())}

    @property
    def lbp_error_mean(self) -> float:
        """Mean LBP error over the look-back tests; NaN if none was made."""
        return mean_or_nan([error for c in self.clients if c.decision for error in c.decision.errors])

    @property
    def threshold(self) -> float:
        """Threshold of the round's look-back tests; NaN if none was made."""
        return mean_or_nan(
            [c.decision.threshold for c in self.clients if c.decision and c.decision.threshold is not None]
        )


def mean_or_nan(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
