"""Partition figures: which labels each client has, as a heat map, and how many examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lightning_lbgm.figures.base import integer_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["draw_client_sizes", "draw_label_map", "label_map"]

_MOST_COLUMNS, _MOST_ROWS = 100, 64
_MOST_BARS, _MOST_NAMES = 40, 20
_LONGEST_NAME = 14
_SMALL_RANGE = 5  # of sizes
_WIDE_RANGE = 50  # of sizes, from which on they are drawn in decades
_SKEW = (
    "distance from the mix of all {label_distance_mean:.2f}, by chance {label_distance_chance:.2f};"
    " {labels_effective_mean:.1f} effective labels a client"
)
_SPREAD = "{size_min:,.0f} to {size_max:,.0f} examples a client, coefficient of variation {size_cv:.2f}"


def draw_label_map(counts: ArrayLike, labels: Sequence[object], numbers: Mapping[str, float] | None = None) -> Figure:
    """Draw which share of a client's examples has which label, a column for a client, and its size above.

    More than 100 clients are sorted by their most frequent label, and evenly spaced ones of them are drawn. More than
    64 labels are drawn as groups of neighbours.

    Args:
        counts: Examples of each label at each client, shape ``(K, C)``.
        labels: The C labels.
        numbers: The partition's heterogeneity, which is summed up below the title.
    """
    grid = np.asarray(counts)
    figure = new_figure()
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 5])
    chosen = _chosen_clients(grid)
    image = label_map(axes, grid[chosen], labels)
    above.bar(range(len(chosen)), grid[chosen].sum(1), width=0.8, color="tab:gray")
    above.set_ylabel("examples", fontsize=8)
    above.tick_params(labelsize=7, bottom=False)
    above.yaxis.get_major_locator().set_params(nbins=2, integer=True)
    above.spines[["top", "right"]].set_visible(False)
    few = len(chosen) == len(grid)
    axes.set_xlabel("client" if few else f"{len(chosen)} of {len(grid):,} clients, by their most frequent label")
    axes.set_ylabel("label")
    if few:
        integer_ticks(axes.xaxis)
    else:
        axes.set_xticks([])
    figure.colorbar(image, ax=axes, label="share of the client's examples")
    figure.suptitle(_title("Labels of the clients", _SKEW, numbers), fontsize=11)
    return figure


def label_map(axes: Axes, counts: ArrayLike, labels: Sequence[object], highest: float | None = None) -> AxesImage:
    """Draw the heat map of ``draw_label_map`` into axes: every client given, white if it has none of a label.

    Args:
        axes: Where to.
        counts: Examples of each label at each client, shape ``(K, C)``.
        labels: The C labels.
        highest: Share that the last colour stands for. None: the highest there is.
    """
    grid = np.asarray(counts, dtype=np.float64)
    group = math.ceil(len(labels) / _MOST_ROWS)
    grid = np.add.reduceat(grid, np.arange(0, grid.shape[1], group), axis=1)
    shares = (grid / np.maximum(grid.sum(1, keepdims=True), 1)).T
    image = axes.imshow(
        np.where(shares > 0, shares, np.nan),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=highest or shares.max(),
    )
    step = math.ceil(len(shares) / _MOST_NAMES)
    rows = range(0, len(shares), step)
    axes.set_yticks(rows, [_name(labels[row * group : (row + 1) * group]) for row in rows], fontsize=7)
    return image


def draw_client_sizes(sizes: ArrayLike, numbers: Mapping[str, float] | None = None) -> Figure:
    """Draw how many examples the clients have: a bar for each of up to 40 clients, else a histogram.

    Args:
        sizes: Examples of each client, shape ``(K,)``.
        numbers: The partition's heterogeneity, which is summed up below the title.
    """
    n = np.asarray(sizes)
    figure = new_figure()
    axes = figure.add_subplot()
    mean = f"mean, {n.mean():,.4g}"
    if len(n) <= _MOST_BARS:
        axes.bar(range(len(n)), n, width=0.8)
        axes.axhline(n.mean(), color="tab:orange", linewidth=1.2, label=mean)
        integer_ticks(axes.xaxis)
        axes.set_xlabel("client")
        axes.set_ylabel("examples")
    else:
        bins, in_decades = _bins(n)
        axes.hist(n, bins=bins)
        axes.axvline(n.mean(), color="tab:orange", linewidth=1.2, label=mean)
        if in_decades:
            axes.set_xscale("log")
        else:
            integer_ticks(axes.xaxis)
            if bins[-1] - bins[0] < 2 * _SMALL_RANGE:  # a bar of a narrow bin would fill the figure
                axes.set_xlim(bins[0] - _SMALL_RANGE, bins[-1] + _SMALL_RANGE)
        integer_ticks(axes.yaxis)
        axes.set_xlabel("examples of a client")
        axes.set_ylabel("clients")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    axes.set_title(_title("Examples of the clients", _SPREAD, numbers), fontsize=11)
    return figure


def _chosen_clients(counts: Any) -> Any:
    """Return the clients to draw, in order."""
    if len(counts) <= _MOST_COLUMNS:
        return np.arange(len(counts))
    sizes = np.maximum(counts.sum(1), 1)
    order = np.lexsort((-counts.max(1) / sizes, counts.argmax(1)))
    return order[((np.arange(_MOST_COLUMNS) + 0.5) * len(order) / _MOST_COLUMNS).astype(np.int64)]


def _bins(sizes: Any) -> tuple[Any, bool]:
    """Return the edges of at most 40 bins of sizes, and whether they are in decades, because sizes differ much."""
    low, high = int(sizes.min()), int(sizes.max())
    if 0 < low * _WIDE_RANGE < high:
        return np.unique(np.floor(np.geomspace(low, high + 1, _MOST_BARS + 1) + 1e-9)) - 0.5, True
    width = math.ceil((high - low + 1) / _MOST_BARS)
    return np.arange(low, high + width + 1, width) - 0.5, False


def _title(title: str, summary: str, numbers: Mapping[str, float] | None) -> str:
    return title if numbers is None else f"{title}\n{summary.format(**numbers)}"


def _name(labels: Sequence[object]) -> str:
    names = [str(label) for label in ([labels[0], labels[-1]] if len(labels) > 1 else labels[:1])]
    short = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in names]
    return " to ".join(short)
