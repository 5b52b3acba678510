"""A study's results: the Pareto front as a table, and all trials as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from lightning_lbgm.figures.base import byte_formatter, new_figure
from recipes.tuning.space import UPLINKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_trials", "table"]


def table(trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], metric: str) -> str:
    """Return the Pareto front as a Markdown table, the cheapest first; shares are of the first FedAvg's bytes."""
    fedavg = next((t for t in trials if t.params["uplink"] == "none" and not t.params["downlink"]), None)
    rows = [
        ("trial", metric, "total bytes", "of FedAvg's", "uplink bytes", "uplink", "downlink", "local steps", "lr"),
        ("---:", "---:", "---:", "---:", "---:", "---", "---", "---:", "---:"),
    ]
    for trial in sorted(front, key=_total):
        params = trial.params
        share = f"{_total(trial) / _total(fedavg):.2%}" if fedavg else ""
        rows.append(
            (
                f"{trial.number}",
                f"{_metric(trial):.4f}",
                f"{_total(trial):,.0f}",
                share,
                f"{trial.user_attrs['uplink_bytes']:,.0f}",
                f"`{_uplink(params)}`",
                f"`[TopK({params['down_fraction']:.3f}), SignSGD()]`" if params["downlink"] else "whole model",
                f"{params['local_steps']}",
                f"{params['lr']:.3f}" if "lr" in params else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _metric(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["metric"])


def _total(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["total_bytes"])


def _uplink(params: dict[str, object]) -> str:
    """Write the stages as they stand in Python."""
    top_k, look_back = (f"TopK({params.get('fraction', 0):.3f})", f"LookBack({params.get('threshold', 0):.2f})")
    return {
        "none": "[]",
        "LookBack": f"[{look_back}]",
        "TopK, LookBack": f"[ErrorFeedback([{top_k}, {look_back}])]",
        "TopK, SignSGD": f"[ErrorFeedback([{top_k}, SignSGD()])]",
        "Ternary": "[Ternary()]",
    }[str(params["uplink"])]


def draw_trials(trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], metric: str) -> Figure:
    """Draw the metric of all trials against the bytes of both directions, a colour for each uplink, and the front."""
    figure = new_figure()
    axes = figure.add_subplot()
    best = sorted(front, key=_total)
    axes.step(
        [_total(t) for t in best], [_metric(t) for t in best], where="post", color="grey", linewidth=1.2, zorder=1
    )
    for number, kind in enumerate(UPLINKS):
        for down, marker in ((False, "o"), (True, "v")):
            chosen = [t for t in trials if t.params["uplink"] == kind and t.params["downlink"] == down]
            if chosen:
                name = f"{'FedAvg' if kind == 'none' else kind}{', downlink too' if down else ''}"
                x, y = [_total(t) for t in chosen], [_metric(t) for t in chosen]
                axes.scatter(x, y, s=22, marker=marker, color=f"C{number}", label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(byte_formatter())
    axes.set_xlabel("uplink and downlink in all")
    axes.set_ylabel(metric)
    axes.set_title(f"{metric} against bytes of {len(trials)} trials, and their Pareto front")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure
