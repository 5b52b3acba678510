"""Client weights, mean loss and result of a round, as plain values of its reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_lbgm.clients.base import ClientUpdate, LocalResult
from lightning_lbgm.compression.context import RoundResult
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.data.rounds import Round
from lightning_lbgm.protocol.broadcast import Delivery
from lightning_lbgm.protocol.endpoints import Received
from lightning_lbgm.reports.reports import ClientReport

__all__ = ["MeanLoss", "client_report", "client_weights", "dropped_reports", "round_result"]


def client_weights(round_: Round, weighting: Literal["examples", "uniform"]) -> dict[int, float]:
    """Return omega_k of a round's cohort, by client: ``n_k / sum(n_j)``, or the same for all."""
    counts = round_.num_examples if weighting == "examples" else (1,) * len(round_.cohort)
    total = sum(counts)
    return {client_id: count / total for client_id, count in zip(round_.cohort, counts)}


class MeanLoss:
    """The mean loss over the local steps of a round, weighted by batch size.

    Args:
        device: Where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._weight = 0

    def add(self, local: LocalResult) -> None:
        """Add a client's steps."""
        if local.loss_sum is not None:
            self._sum = self._sum + local.loss_sum
            self._weight += local.num_examples

    def export(self) -> tuple[float, int]:
        """Return sum and weight as plain values, for other processes."""
        return float(self._sum), self._weight

    def combine(self, parts: Sequence[tuple[float, int]]) -> None:
        """Make it the mean over all processes, from what each has exported."""
        sums, weights = zip(*parts)
        self._sum, self._weight = torch.tensor(sum(sums), dtype=self._sum.dtype, device=self._sum.device), sum(weights)

    def value(self) -> Tensor:
        """Return the mean, shape ``()``; NaN if there was no step."""
        return self._sum / self._weight if self._weight else self._sum * math.nan


def client_report(
    result: ClientUpdate,
    num_examples: int,
    squared_norm: float,
    received: Received | None,
    dense_bits: int,
    delivery: Delivery,
    squared_error: float,
) -> ClientReport:
    """Return the report of a client's part in a round.

    Args:
        result: What its training came to.
        num_examples: Examples in its partition.
        squared_norm: ``|g_k|^2``.
        received: What the server has of its update; None if that was left out.
        dense_bits: Bits that FedAvg would have sent for it; 0 if it was left out.
        delivery: What it received from the server.
        squared_error: ``|g_k - g~_k|^2``; NaN if it was not measured.
    """
    local = result.local
    decision = received.decision if received is not None else None
    return ClientReport(
        client_id=result.client_id,
        num_examples=num_examples,
        local_steps=local.num_steps,
        loss=float(local.loss_sum) / local.num_examples if local.loss_sum is not None else math.nan,
        update_norm=math.sqrt(squared_norm) if squared_norm >= 0 else math.nan,
        uplink_bits=received.bits if received is not None else 0,
        dense_bits=dense_bits,
        downlink_bits=delivery.bits,
        dense_downlink_bits=delivery.dense_bits,
        whole_model=delivery.whole,
        decision=decision,
        rejected=received is None,
        squared_error=squared_error,
        metrics={**local.metrics, **(decision.metrics if decision is not None else {})},
        missing=result.missing,
    )


def dropped_reports(round_: Round, deliveries: Mapping[int, Delivery]) -> tuple[ClientReport, ...]:
    """Return the reports of the clients that were chosen and dropped out, in order of client.

    Args:
        round_: The round.
        deliveries: What each client received from the server, of those that it reached.
    """
    return tuple(
        ClientReport(
            client_id=client_id,
            num_examples=round_.num_examples_of(client_id),
            local_steps=0,
            loss=math.nan,
            update_norm=math.nan,
            uplink_bits=0,
            dense_bits=0,
            downlink_bits=delivery.bits,
            dense_downlink_bits=delivery.dense_bits,
            whole_model=delivery.whole,
            dropped=True,
        )
        for client_id in sorted((*round_.dropped, *round_.unreached))
        for delivery in (deliveries.get(client_id, Delivery(0, 0)),)
    )


def round_result(
    layout: Layout, server_params: Tensor, mean_update: Tensor, reports: Sequence[ClientReport]
) -> RoundResult:
    """Return what the server knows at the end of a round, of the clients that were not rejected."""
    sent = [report for report in reports if not report.rejected]
    return RoundResult(
        layout=layout,
        server_params=server_params,
        mean_update=mean_update,
        uplink_bits=tuple(report.uplink_bits for report in sent),
        dense_bits=tuple(report.dense_bits for report in sent),
        decisions=tuple(report.decision for report in sent),
    )
