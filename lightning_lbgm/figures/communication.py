"""Communication figures: a metric against uplink or rounds, and LBP errors by client and round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_lbgm.figures.base import byte_formatter, draw_curves, integer_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "draw_lbp_errors",
    "draw_metric_against_rounds",
    "draw_metric_against_time",
    "draw_metric_against_total",
    "draw_metric_against_uplink",
]

_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_metric_against_uplink(
    curves: dict[str, Sequence[tuple[float, float]]], metric: str, *, log_scale: bool = False
) -> Figure:
    """Draw a metric against the bytes that clients have sent so far.

    Args:
        curves: Points ``(uplink bytes so far, metric)`` of each run, by the run's name.
        metric: Name of the metric, for the axis.
        log_scale: Whether the bytes are drawn in decades, for runs of very different cost.
    """
    return _draw_against_bytes(curves, metric, "uplink so far", f"{metric} against uplink", log_scale)


def draw_metric_against_total(
    curves: dict[str, Sequence[tuple[float, float]]], metric: str, *, log_scale: bool = False
) -> Figure:
    """Draw a metric against the bytes sent so far in both directions.

    Args:
        curves: Points ``(uplink and downlink bytes so far, metric)`` of each run, by the run's name.
        metric: Name of the metric, for the axis.
        log_scale: Whether the bytes are drawn in decades, for runs of very different cost.
    """
    label = "uplink and downlink so far"
    return _draw_against_bytes(curves, metric, label, f"{metric} against all that was sent", log_scale)


def draw_metric_against_rounds(curves: dict[str, Sequence[tuple[float, float]]], metric: str) -> Figure:
    """Draw a metric against the rounds done.

    Args:
        curves: Points ``(rounds done, metric)`` of each run, by the run's name.
        metric: Name of the metric, for the axis.
    """
    figure, axes = draw_curves(curves, metric)
    integer_ticks(axes.xaxis)
    axes.set_xlabel("rounds")
    axes.set_title(f"{metric} against rounds")
    return figure


def draw_metric_against_time(
    curves: dict[str, Sequence[tuple[float, float]]], metric: str, *, network: str = "the network"
) -> Figure:
    """Draw a metric against the time that the rounds took on a network: in hours, or in minutes or seconds if short.

    Args:
        curves: Points ``(seconds so far, metric)`` of each run, by the run's name.
        metric: Name of the metric, for the axis.
        network: Name of the network, for the title.
    """
    longest = max((x for points in curves.values() for x, _ in points), default=0.0)
    size, unit = next((pair for pair in _UNITS if longest >= pair[0]), _UNITS[-1])
    scaled: dict[str, Sequence[tuple[float, float]]] = {
        name: [(x / size, y) for x, y in points] for name, points in curves.items()
    }
    figure, axes = draw_curves(scaled, metric)
    axes.set_xlabel(f"{unit} on {network}")
    axes.set_title(f"{metric} against time")
    return figure


def _draw_against_bytes(
    curves: dict[str, Sequence[tuple[float, float]]], metric: str, label: str, title: str, log_scale: bool
) -> Figure:
    figure, axes = draw_curves(curves, metric)
    if log_scale:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(byte_formatter())
    axes.set_xlabel(label)
    axes.set_title(title)
    return figure


def draw_lbp_errors(
    rounds: Sequence[int],
    clients: Sequence[int],
    errors: Sequence[float],
    threshold: float | None = None,
    *,
    cell: tuple[int, int] = (1, 1),
) -> Figure:
    """Draw the LBP error of each client and round as a heat map; white if a client took no part.

    Args:
        rounds: Round of each test.
        clients: Client of each test.
        errors: LBP error of each test, in [0, 1].
        threshold: Marked on the colour bar: errors up to it are recycled.
        cell: Rounds and clients that a cell of the map stands for, from a multiple of them on.
    """
    figure = new_figure()
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
    integer_ticks(axes.xaxis)
    integer_ticks(axes.yaxis)
    axes.set_xlabel("round")
    axes.set_ylabel("client")
    of = "" if cell == (1, 1) else f", means of {cell[0]} x {cell[1]}"
    axes.set_title(f"LBP error per client and round{of}")
    return figure
