"""A comparison's results: read from MLflow, as a table, figures and JSON lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient

from lightning_lbgm.figures.communication import (
    draw_metric_against_rounds,
    draw_metric_against_time,
    draw_metric_against_total,
    draw_metric_against_uplink,
)
from recipes.compare.times import OWN, Network, lasts, less, reached, read_times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Result", "draw", "is_lower_better", "read_result", "table", "time_table", "write_json_lines"]

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
        seconds: Time on each network by then, by its name; ``"own"`` is the run's own clock.
        shares: Of the whole time on each network, what stragglers spent on download, compute and upload.
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
    seconds: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)

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
    networks: Sequence[Network] = (),
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
        networks: Networks to replay it on.

    Raises:
        ValueError: If it has not logged the metric, or no uplink bytes, or has no table of clients to replay.
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
    times = read_times(client, run_id, networks)
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
        seconds={name: [found.at(step) for step in last] for name, found in times.items()},
        shares={name: found.shares for name, found in times.items()},
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
    return _aligned(rows)


def time_table(results: Sequence[Result], titles: Mapping[str, str], target: float | None = None) -> str:
    """Return the times on networks as a Markdown table; what is less is less than the first one's. Of seeds the mean.

    Args:
        results: The results.
        titles: Titles of the networks, by name, in order.
        target: Value of the metric. None: the worst of the last ones, which all reach.
    """
    metric, groups = results[0].metric, _by_name(results)
    lower = is_lower_better(metric)
    if target is None:
        target = (max if lower else min)(_mean(runs, lambda run: run.last) for runs in groups.values())
    than = f"than {results[0].name}"
    heads = ("method", "network", "to the end", than, f"to {target:.4g}", than, "download", "compute", "upload")
    rows = [heads, ("---", "---", *["---:"] * (len(heads) - 2))]
    for network, title in titles.items():
        base: tuple[float | None, float | None] | None = None
        for name, runs in groups.items():
            if not all(network in run.seconds for run in runs):
                continue
            end = _mean(runs, lambda run, network=network: run.seconds[network][-1])
            curve = _mean_curve(runs, lambda run, network=network: run.seconds[network])
            there = reached(curve, target, lower)
            base = base or (end, there)
            shares = [statistics.fmean(values) for values in zip(*(run.shares[network] for run in runs))]
            cells = (lasts(end), less(end, base[0]), lasts(there), less(there, base[1]), *(f"{s:.0%}" for s in shares))
            rows.append((name, title, *cells))
    return _aligned(rows, text_columns=2)


def _aligned(rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        " | ".join(cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
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


def draw(results: Sequence[Result], titles: Mapping[str, str] | None = None) -> dict[str, Figure]:
    """Draw the metric against rounds, uplink bytes, bytes of both directions and time, by file name; of seeds the mean.

    Args:
        results: The results.
        titles: Titles of the networks whose times are drawn, by name.
    """
    metric, groups = results[0].metric, _by_name(results)
    rounds = {name: _mean_curve(runs, lambda run: run.round) for name, runs in groups.items()}
    uplink = {name: _mean_curve(runs, lambda run: run.uplink_bytes) for name, runs in groups.items()}
    total = {name: _mean_curve(runs, lambda run: run.total_bytes) for name, runs in groups.items()}
    figures = {
        "metric_vs_rounds.png": draw_metric_against_rounds(rounds, metric),
        "metric_vs_uplink.png": draw_metric_against_uplink(uplink, metric, log_scale=len(groups) > 1),
        "metric_vs_total.png": draw_metric_against_total(total, metric, log_scale=len(groups) > 1),
    }
    for network, title in (titles or {}).items():
        timed = {n: runs for n, runs in groups.items() if all(network in run.seconds for run in runs)}
        curves = {n: _mean_curve(runs, lambda run, network=network: run.seconds[network]) for n, runs in timed.items()}
        name = "metric_vs_hours.png" if network == OWN else f"metric_vs_hours_{network}.png"
        figures[name] = draw_metric_against_time(curves, metric, network=title)
    return figures


def write_json_lines(results: Sequence[Result], path: Path) -> None:
    """Write a line of JSON for each result."""
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
