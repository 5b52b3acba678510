"""A round's metrics and table rows, by their public names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_lbgm.ledger import Ledger, RoundReport

__all__ = ["client_rows", "round_metrics"]


def round_metrics(report: RoundReport, ledger: Ledger) -> dict[str, float]:
    """Return the metrics of a round, the ledger including it; docs/metrics.md says what each means."""
    return {
        "comm/uplink_bytes": report.uplink_bits / 8,
        "comm/uplink_bytes_total": ledger.uplink_bits / 8,
        "comm/uplink_floats_total": ledger.uplink_floats,
        "comm/downlink_bytes_total": ledger.downlink_bits / 8,
        "comm/savings": ledger.savings,
        "lbgm/recycled_fraction": report.recycled_fraction,
        "lbgm/lbp_error_mean": report.lbp_error_mean,
        "lbgm/threshold": report.threshold,
        "fl/cohort_size": float(len(report.clients)),
        "fl/update_norm": report.update_norm,
        "fl/rejected_clients": float(report.num_rejected),
    }


def client_rows(report: RoundReport) -> Iterator[dict[str, Any]]:
    """Yield a row of the clients' table for each client of a round; docs/metrics.md names the columns."""
    for client in report.clients:
        coefficients = [c for c in client.decision.coefficients if c == c] if client.decision else []
        yield {
            "round": report.round_index,
            "client": client.client_id,
            "decision": client.outcome,
            "lbp_error": client.lbp_error,
            "lbc": sum(coefficients) / len(coefficients) if coefficients else float("nan"),
            "uplink_bytes": client.uplink_bits / 8,
            "update_norm": client.update_norm,
            "loss": client.loss,
            "num_examples": client.num_examples,
            "local_steps": client.local_steps,
        }
