"""Figure size, axes and tick formats that all figures share. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

__all__ = ["byte_formatter", "draw_curves", "integer_ticks", "new_figure"]


def draw_curves(curves: dict[str, Sequence[tuple[float, float]]], metric: str) -> tuple[Figure, Axes]:
    """Draw a metric of each run, with a legend if there are several."""
    figure = new_figure()
    axes = figure.add_subplot()
    for name, points in curves.items():
        x, y = zip(*points) if points else ((), ())
        axes.plot(x, y, marker=".", markersize=4, linewidth=1.2, label=name)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    return figure, axes


def new_figure() -> Figure:
    """Make an empty figure of the size that all have."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4.2), dpi=120, layout="constrained")


def integer_ticks(axis: Axis) -> None:
    """Let an axis have ticks at integers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def byte_formatter() -> Formatter:
    """Return the format of bytes, in kB, MB and so on."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit="B")
