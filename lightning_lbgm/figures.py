"""The figures of a run. matplotlib is imported when a figure is drawn, and never opens a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

__all__ = ["draw_convergence", "draw_lbp_errors", "draw_metric_against_rounds", "draw_metric_against_uplink"]


def draw_metric_against_uplink(
    curves: dict[str, Sequence[tuple[float, float]]], metric: str, *, log_scale: bool = False
) -> Figure:
    """Draw a metric against the bytes sent so far.

    Args:
        curves: Points ``(uplink bytes so far, metric)`` of each run, by the run's name.
        metric: Name of the metric, for the axis.
        log_scale: Whether the bytes are drawn in decades, for runs of very different cost.
    """
    figure, axes = _curves(curves, metric)
    if log_scale:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_byte_formatter())
    axes.set_xlabel("uplink so far")
    axes.set_title(f"{metric} against uplink")
    return figure


def draw_metric_against_rounds(curves: dict[str, Sequence[tuple[float, float]]], metric: str) -> Figure:
    """Draw a metric against the rounds done.

    Args:
        curves: Points ``(rounds done, metric)`` of each run, by the run's name.
        metric: Name of the metric, for the axis.
    """
    figure, axes = _curves(curves, metric)
    _integer_ticks(axes.xaxis)
    axes.set_xlabel("rounds")
    axes.set_title(f"{metric} against rounds")
    return figure


def draw_lbp_errors(
    rounds: Sequence[int],
    clients: Sequence[int],
    errors: Sequence[float],
    threshold: float | None = None,
    *,
    cell: tuple[int, int] = (1, 1),
) -> Figure:
    """Draw the LBP error of each client and round as a heat map; white where a client took no part.

    Args:
        rounds: Round of each test.
        clients: Client of each test.
        errors: LBP error of each test, in [0, 1].
        threshold: Marked on the colour bar: errors up to it are recycled.
        cell: Rounds and clients that a cell of the map stands for, from a multiple of them on.
    """
    figure = _figure()
    axes = figure.add_subplot()
    columns, rows = np.asarray(rounds) // cell[0], np.asarray(clients) // cell[1]
    first, last = int(columns.min()), int(columns.max())
    grid = np.full((int(rows.max()) + 1, last - first + 1), np.nan)
    grid[rows, columns - first] = errors
    extent = (first * cell[0] - 0.5, (last + 1) * cell[0] - 0.5, len(grid) * cell[1] - 0.5, -0.5)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1, extent=extent)
    bar = figure.colorbar(image, ax=axes, label="LBP error, sin²(α)")
    if threshold is not None:
        bar.ax.axhline(threshold, color="red", linewidth=2)
        bar.ax.text(-0.6, threshold, f"δ={threshold:g}", color="red", ha="right", va="center", fontsize=8)
    _integer_ticks(axes.xaxis)
    _integer_ticks(axes.yaxis)
    axes.set_xlabel("round")
    axes.set_ylabel("client")
    of = "" if cell == (1, 1) else f", means of {cell[0]} x {cell[1]}"
    axes.set_title(f"LBP error per client and round{of}")
    return figure


def draw_convergence(
    rounds: Sequence[float],
    means: Sequence[float],
    maxima: Sequence[float],
    gaps: Sequence[float],
    bound: float | None = None,
) -> Figure:
    """Draw the squared error of what was sent, and the gap of the aggregated update, in decades.

    Zeros leave a hole in the line, unless all are zero.

    Args:
        rounds: The rounds.
        means: Mean of ``|d_k|^2 sin^2(alpha_k)`` over each round's cohort.
        maxima: Its largest.
        gaps: Distance of the mean update used from the exact one, over the norm of the exact one.
        bound: Delta^2, marked.
    """
    figure = _figure()
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(rounds, maxima, marker=".", markersize=3, linewidth=1.0, label="largest of the cohort")
    above.plot(rounds, means, marker=".", markersize=3, linewidth=1.0, label="mean")
    if bound is not None:
        above.axhline(bound, color="red", linewidth=1.0, linestyle="--", label=f"Δ²={bound:g}")
    above.set_ylabel("|d|² sin²(α) as sent")
    above.legend(fontsize=8)
    above.set_title("Error of what was sent, and gap of the aggregated update")
    below.plot(rounds, gaps, marker=".", markersize=3, linewidth=1.0, color="tab:green")
    below.set_ylabel("relative gap")
    below.set_xlabel("round")
    for axes, values in ((above, maxima), (below, gaps)):
        if any(value > 0 for value in values):  # else there are no decades to draw
            axes.set_yscale("log", nonpositive="mask")
        axes.grid(alpha=0.3)
    _integer_ticks(below.xaxis)
    return figure


def _curves(curves: dict[str, Sequence[tuple[float, float]]], metric: str) -> tuple[Figure, Axes]:
    """Draw a metric of each run, with a legend where there are several."""
    figure = _figure()
    axes = figure.add_subplot()
    for name, points in curves.items():
        x, y = zip(*points) if points else ((), ())
        axes.plot(x, y, marker=".", markersize=4, linewidth=1.2, label=name)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    return figure, axes


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4.2), dpi=120, layout="constrained")


def _integer_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _byte_formatter() -> Formatter:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit="B")
