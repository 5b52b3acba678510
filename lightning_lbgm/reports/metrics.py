"""Metrics and table rows of a round, by their public names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.reports.reports import RoundReport

__all__ = ["client_rows", "convergence_metrics", "round_metrics"]


def round_metrics(report: RoundReport, ledger: Ledger) -> dict[str, float]:
    """Return the metrics of a round, the ledger including it; docs/metrics.md says what each means."""
    return {
        "comm/uplink_bytes": report.uplink_bits / 8,
        "comm/uplink_bytes_total": ledger.uplink_bits / 8,
        "comm/uplink_floats_total": ledger.uplink_floats,
        "comm/downlink_bytes": report.downlink_bits / 8,
        "comm/downlink_bytes_total": ledger.downlink_bits / 8,
        "comm/total_bytes_total": ledger.total_bits / 8,
        "comm/savings": ledger.savings,
        "comm/total_savings": ledger.total_savings,
        "lbgm/recycled_fraction": report.recycled_fraction,
        "lbgm/lbp_error_mean": report.lbp_error_mean,
        "lbgm/threshold": report.threshold,
        "fl/cohort_size": float(len(report.clients)),
        "fl/update_norm": report.update_norm,
        "fl/rejected_clients": float(report.num_rejected),
        **_turnout_metrics(report),
        **_broadcast_metrics(report),
        **_time_metrics(report, ledger),
        **{f"client/{name}": value for name, value in report.client_metrics.items()},
    }


def _turnout_metrics(report: RoundReport) -> dict[str, float]:
    if report.num_available is None:
        return {}
    return {"fl/available_clients": float(report.num_available), "fl/dropped_clients": float(len(report.dropped))}


def _time_metrics(report: RoundReport, ledger: Ledger) -> dict[str, float]:
    time = report.time
    if time is None:
        return {}
    return {
        "time/round_seconds": time.seconds,
        "time/total_seconds": ledger.seconds,
        "time/download_share": time.download_share,
        "time/compute_share": time.compute_share,
        "time/upload_share": time.upload_share,
        "time/straggler": time.straggler,
    }


def _client_seconds(report: RoundReport) -> dict[int, dict[str, float]]:
    """Return the columns of a clock for each client; NaN for those that the server did not wait for."""
    if report.time is None:
        return {}
    names = ("download_seconds", "compute_seconds", "upload_seconds")
    known = {time.client_id: (time.download, time.compute, time.upload) for time in report.time.clients}
    nothing = (math.nan,) * len(names)
    return {client.client_id: dict(zip(names, known.get(client.client_id, nothing))) for client in report.chosen}


def _broadcast_metrics(report: RoundReport) -> dict[str, float]:
    if report.broadcast is None:
        return {}
    metrics = {"comm/downlink_error": report.broadcast.error, "comm/whole_models": float(report.num_whole_models)}
    tests = report.broadcast.decision.recycled if report.broadcast.decision is not None else ()
    if tests:  # `Predict` decides without one
        metrics["lbgm/downlink_recycled_fraction"] = sum(tests) / len(tests)
    return metrics


def client_rows(report: RoundReport) -> Iterator[dict[str, Any]]:
    """Yield a row of the clients' table for each client of a round; docs/metrics.md names the columns."""
    names = sorted({name for client in report.clients for name in client.metrics})
    seconds = _client_seconds(report)
    for client in report.chosen:
        coefficients = [c for c in client.decision.coefficients if c == c] if client.decision else []
        yield {
            "round": report.round_index,
            "client": client.client_id,
            "decision": client.outcome,
            "lbp_error": client.lbp_error,
            "lbc": sum(coefficients) / len(coefficients) if coefficients else float("nan"),
            "uplink_bytes": client.uplink_bits / 8,
            "downlink_bytes": client.downlink_bits / 8,
            "update_norm": client.update_norm,
            "loss": client.loss,
            "num_examples": client.num_examples,
            "local_steps": client.local_steps,
            **seconds.get(client.client_id, {}),
            **_broadcast_metrics(report),
            **{f"client/{name}": client.metrics.get(name, math.nan) for name in names},
        }


def convergence_metrics(report: RoundReport, lr: float, bound: float | None = None) -> dict[str, float]:
    """Return what the paper's convergence result is about, of a round whose errors were measured.

    Args:
        report: The round.
        lr: eta, the clients' learning rate in that round.
        bound: Delta^2; with it the share of the clients above it.

    Returns:
        The metrics that docs/metrics.md lists. NaN if no client was received, and the ``sent_error`` ones if
        ``lr`` is 0 or NaN.
    """
    clients = [client for client in report.clients if not client.rejected]
    norms = [client.update_norm for client in clients] or [math.nan]
    # A client that made no step has sent a zero update, of which nothing is lost.
    scales = [(lr * max(client.local_steps, 1)) ** 2 for client in clients]
    errors = [client.squared_error / scale if scale > 0 else math.nan for client, scale in zip(clients, scales)]
    if not errors or any(math.isnan(error) for error in errors):
        errors = [math.nan]
    metrics = {
        "convergence/sent_error_mean": sum(errors) / len(errors),
        "convergence/sent_error_max": max(errors),
        "convergence/update_norm_mean": sum(norms) / len(norms),
        "convergence/update_norm_min": min(norms),
        "convergence/update_norm_max": max(norms),
        "convergence/gap_norm": report.error.norm if report.error else math.nan,
        "convergence/gap_relative": report.error.relative if report.error else math.nan,
        "convergence/gap_cosine": report.error.cosine if report.error else math.nan,
    }
    if bound is not None:
        over = [math.nan if math.isnan(error) else float(error > bound) for error in errors]
        metrics["convergence/over_bound_fraction"] = sum(over) / len(over)
    return metrics
