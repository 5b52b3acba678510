"""A comparison's results: read from MLflow, as a table, figures and JSON lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
        also: Each further metric's mean over its last ``tail`` values, by name.
        seed: The run's seed, if several were asked for.
        tail: Values at the end that count as the last one: cohorts swing from round to round.
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
    also: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    tail: int = 1

    @property
    def last(self) -> float:
        """The metric at the end: the mean over the last ``tail`` entries."""
        return statistics.fmean(self.value[-self.tail :])

    @property
    def best(self) -> float:
        """Largest value of the metric; the smallest of a loss or an error."""
        known = [value for value in self.value if value == value] or [float("nan")]
        return min(known) if is_lower_better(self.metric) else max(known)


def is_lower_better(metric: str) -> bool:
    """Tell by its name whether a metric is a loss or an error."""
    return any(word in metric.lower() for word in ("loss", "err", "mse", "mae", "perplexity"))


def read_result(
    client: MlflowClient,
    run_id: str,
    name: str,
    metric: str,
    also: Sequence[str] = (),
    seed: int | None = None,
    tail: int = 1,
) -> Result:
    """Read a run's curves off the histories of its metrics.

    Args:
        client: The store.
        run_id: The run.
        name: The variant's name.
        metric: What is compared.
        also: Further metrics, of which the last values are read.
        seed: The run's seed, if several were asked for.
        tail: Values at the end that count as the last one.

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
    found = {
        key: [point.value for point in sorted(client.get_metric_history(run_id, key), key=lambda point: point.step)]
        for key in also
    }
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
        also={key: statistics.fmean(history[-tail:]) for key, history in found.items() if history},
        seed=seed,
        tail=tail,
    )


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table; shares are of the first one's uplink, and of its bytes in all.

    Of several seeds it has the mean, of metrics with the widest distance from it, and of bytes the mean.
    """
    first, metric, also = results[0], results[0].metric, list(dict.fromkeys(key for r in results for key in r.also))
    heads = (
        "method",
        f"best {metric}",
        f"last {metric}",
        *(f"last {key}" for key in also),
        "rounds",
        "uplink bytes",
        "uplink floats",
        "total bytes",
        "share",
        "total share",
    )
    rows = [heads, ("---", *["---:"] * (len(heads) - 1))]
    groups = _by_name(results)
    base_uplink, base_total = (_mean(groups[first.name], key) for key in (_last_uplink, _last_total))
    for name, runs in groups.items():
        uplink, total = _mean(runs, _last_uplink), _mean(runs, _last_total)
        rows.append(
            (
                name,
                _spread([run.best for run in runs]),
                _spread([run.last for run in runs]),
                *(_spread([run.also.get(key, float("nan")) for run in runs]) for key in also),
                f"{max(run.rounds for run in runs)}",
                f"{uplink:,.0f}",
                f"{_mean(runs, lambda run: run.uplink_floats[-1]):,.0f}",
                f"{total:,.0f}",
                f"{uplink / base_uplink:.1%}" if base_uplink else "",
                f"{total / base_total:.1%}" if base_total else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups


def _last_uplink(result: Result) -> float:
    return result.uplink_bytes[-1]


def _last_total(result: Result) -> float:
    return result.total_bytes[-1]


def _mean(runs: Sequence[Result], value: Callable[[Result], float]) -> float:
    return statistics.fmean(map(value, runs))


def _spread(values: Sequence[float]) -> str:
    """Show the mean, and of several values the widest distance from it."""
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {max(abs(value - mean) for value in values):.4f}"


def _mean_curve(runs: Sequence[Result], across: Callable[[Result], Sequence[float]]) -> list[tuple[float, float]]:
    """Return the points of the mean over seeds, at the rounds that all of them have."""
    points = [dict(zip(run.round, zip(across(run), run.value))) for run in runs]
    rounds = sorted(set(points[0]).intersection(*points[1:]))
    return [(statistics.fmean(p[r][0] for p in points), statistics.fmean(p[r][1] for p in points)) for r in rounds]


def draw(results: Sequence[Result]) -> dict[str, Figure]:
    """Draw the metric against rounds, uplink bytes and bytes of both directions, by file name; of seeds the mean."""
    metric, groups = results[0].metric, _by_name(results)
    rounds = {name: _mean_curve(runs, lambda run: run.round) for name, runs in groups.items()}
    uplink = {name: _mean_curve(runs, lambda run: run.uplink_bytes) for name, runs in groups.items()}
    total = {name: _mean_curve(runs, lambda run: run.total_bytes) for name, runs in groups.items()}
    return {
        "metric_vs_rounds.png": draw_metric_against_rounds(rounds, metric),
        "metric_vs_uplink.png": draw_metric_against_uplink(uplink, metric, log_scale=len(groups) > 1),
        "metric_vs_total.png": draw_metric_against_total(total, metric, log_scale=len(groups) > 1),
    }


def write_json_lines(results: Sequence[Result], path: Path) -> None:
    """Write a line of JSON for each result."""
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
