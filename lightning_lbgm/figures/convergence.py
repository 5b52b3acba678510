"""Convergence figure: the compression error over rounds, and its bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_lbgm.figures.base import integer_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_convergence"]


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
    figure = new_figure()
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
    integer_ticks(below.xaxis)
    return figure
