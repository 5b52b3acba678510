"""A comparison's results: read from MLflow, as a table, figures and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient

from lightning_lbgm.figures.communication import (
    draw_metric_against_rounds,
    draw_metric_against_total,
    draw_metric_against_uplink,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Result", "draw", "is_lower_better", "read_result", "table", "write_json_lines"]

_BYTES, _FLOATS, _TOTAL = "comm/uplink_bytes_total", "comm/uplink_floats_total", "comm/total_bytes_total"


@dataclass(frozen=True)
class Result:
    """The curves of one run, an entry for each round in which the metric was logged.

    Attributes:
        name: The variant.
        run_id: Its MLflow run.
        metric: Name of the metric.
        rounds: Rounds done in all.
        round: Rounds done at each entry, from 1.
        value: The metric.
        uplink_bytes: Bytes that the clients had sent by then.
        uplink_floats: The same in floats of 32 bits, the unit of the paper's figures.
        total_bytes: Bytes sent in both directions by then.
    """

    name: str
    run_id: str
    metric: str
    rounds: int
    round: list[int]
    value: list[float]
    uplink_bytes: list[float]
    uplink_floats: list[float]
    total_bytes: list[float]

    @property
    def best(self) -> float:
        """Largest value of the metric; the smallest of a loss or an error."""
        known = [value for value in self.value if value == value] or [float("nan")]
        return min(known) if is_lower_better(self.metric) else max(known)


def is_lower_better(metric: str) -> bool:
    """Tell by its name whether a metric is a loss or an error."""
    return any(word in metric.lower() for word in ("loss", "err", "mse", "mae", "perplexity"))


def read_result(client: MlflowClient, run_id: str, name: str, metric: str) -> Result:
    """Read a run's curves off the histories of its metrics.

    Raises:
        ValueError: If it has not logged the metric, or no uplink bytes.
    """
    values, sent, floats, total = (
        {point.step: point.value for point in client.get_metric_history(run_id, key)}
        for key in (metric, _BYTES, _FLOATS, _TOTAL)
    )
    # A metric may be logged before the first round ends, where nothing was sent yet.
    steps = [step for step in sorted(values) if sent and step >= min(sent)]
    if not steps:
        missing = metric if sent else _BYTES
        logged = ", ".join(sorted(client.get_run(run_id).data.metrics)) or "nothing"
        raise ValueError(f"{name} did not log {missing!r}; it logged {logged}. Choose another with --metric.")
    last = [max(s for s in sent if s <= step) for step in steps]
    return Result(
        name=name,
        run_id=run_id,
        metric=metric,
        rounds=max(sent) + 1,
        round=[step + 1 for step in steps],
        value=[values[step] for step in steps],
        uplink_bytes=[sent[step] for step in last],
        uplink_floats=[floats[step] for step in last],
        total_bytes=[total.get(step, float("nan")) for step in last],
    )


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table; shares are of the first one's uplink, and of its bytes in all."""
    metric = results[0].metric
    heads = (
        "method",
        f"best {metric}",
        f"last {metric}",
        "rounds",
        "uplink bytes",
        "uplink floats",
        "share",
        "total share",
    )
    rows = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for result in results:
        sent, first = result.uplink_bytes[-1], results[0].uplink_bytes[-1]
        share = f"{sent / first:.1%}" if first else ""
        total_share = f"{result.total_bytes[-1] / results[0].total_bytes[-1]:.1%}" if first else ""
        counts = (f"{result.rounds}", f"{sent:,.0f}", f"{result.uplink_floats[-1]:,.0f}", share, total_share)
        rows.append((result.name, f"{result.best:.4f}", f"{result.value[-1]:.4f}", *counts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def draw(results: Sequence[Result]) -> dict[str, Figure]:
    """Draw the metric against rounds, against uplink bytes and against those of both directions, by file name."""
    metric = results[0].metric
    rounds = {r.name: list(zip(r.round, r.value)) for r in results}
    uplink = {r.name: list(zip(r.uplink_bytes, r.value)) for r in results}
    total = {r.name: list(zip(r.total_bytes, r.value)) for r in results}
    return {
        "metric_vs_rounds.png": draw_metric_against_rounds(rounds, metric),
        "metric_vs_uplink.png": draw_metric_against_uplink(uplink, metric, log_scale=len(results) > 1),
        "metric_vs_total.png": draw_metric_against_total(total, metric, log_scale=len(results) > 1),
    }


def write_json_lines(results: Sequence[Result], path: Path) -> None:
    """Write a line of JSON for each result."""
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
