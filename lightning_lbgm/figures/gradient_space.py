"""Gradient space figures, after those of Section 2 of Azam et al., ICLR 2022."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lightning_lbgm.figures.base import integer_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_components", "draw_cosines", "draw_principal_cosines"]


def draw_components(
    epochs: Sequence[int],
    counts: Mapping[str, ArrayLike],
    layer_counts: Mapping[str, ArrayLike] | None = None,
    metric: str | None = None,
    curve: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Draw how many principal components explain the gradients of all epochs up to each, and a metric below.

    Args:
        epochs: The epochs, ``(T,)``.
        counts: Components for the whole model, ``(T,)``, by name (N95, N99).
        layer_counts: The same for each parameter tensor, ``(T, L)``: mean and deviation over tensors are drawn.
        metric: Name of the metric.
        curve: Its points ``(epoch, value)``.
    """
    figure = new_figure()
    heights = [3, 2] if curve else [1]
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    axes = rows[0, 0]
    for name, values in counts.items():
        (line,) = axes.plot(epochs, np.asarray(values), marker=".", markersize=4, linewidth=1.4, label=name)
        if layer_counts is not None:
            layers = np.asarray(layer_counts[name], float)
            mean, deviation = layers.mean(1), layers.std(1)
            label = f"{name}, mean of {layers.shape[1]} tensors ± deviation"
            axes.plot(epochs, mean, linestyle="--", linewidth=1, color=line.get_color(), label=label)
            band = (mean - deviation, mean + deviation)
            axes.fill_between(epochs, *band, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.plot(epochs, 1 + np.arange(len(epochs)), linestyle=":", linewidth=1, color="grey", label="gradients so far")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("principal components")
    axes.set_title("Components that explain the gradients of all epochs so far")
    axes.legend(fontsize=7)
    if curve:
        x, y = zip(*curve)
        rows[1, 0].plot(x, y, marker=".", markersize=4, linewidth=1.4, color="black")
        rows[1, 0].set_ylabel(metric)
    for panel in rows[:, 0]:
        panel.grid(alpha=0.3)
    integer_ticks(axes.yaxis)
    integer_ticks(rows[-1, 0].xaxis)
    rows[-1, 0].set_xlabel("epoch")
    return figure


def draw_principal_cosines(epochs: Sequence[int], cosines: Mapping[str, ArrayLike], share: float) -> Figure:
    """Draw how nearly parallel each epoch's gradient is to each principal direction, a heat map for each entry.

    Args:
        epochs: The epochs, ``(T,)``.
        cosines: Cosines ``(N, T)`` by the name of the tensor; their signs are arbitrary and not drawn.
        share: What the N directions explain, for the title.
    """
    absolute = {name: np.abs(np.asarray(matrix)) for name, matrix in cosines.items()}
    title = f"Epoch gradients against the principal directions that explain {share:.0%}"
    return _draw_heat_maps(epochs, absolute, title, "principal direction", "|cosine|", "viridis", 0)


def draw_cosines(epochs: Sequence[int], cosines: Mapping[str, ArrayLike]) -> Figure:
    """Draw how nearly parallel the epochs' gradients are to each other, a heat map for each entry.

    Args:
        epochs: The epochs, ``(T,)``.
        cosines: Cosines ``(T, T)`` by the name of the tensor.
    """
    return _draw_heat_maps(epochs, cosines, "Epoch gradients against each other", "epoch", "cosine", "RdBu_r", -1)


def _draw_heat_maps(
    epochs: Sequence[int],
    matrices: Mapping[str, ArrayLike],
    title: str,
    row_label: str,
    label: str,
    colours: str,
    lowest: int,
) -> Figure:
    """Draw matrices ``(rows, T)`` in one scale of colours from ``lowest`` to 1, row 0 at the top.

    An epoch without a gradient stays white.
    """
    figure = new_figure()
    columns = math.ceil(math.sqrt(len(matrices)))
    lines = math.ceil(len(matrices) / columns)
    if columns > 1:
        figure.set_size_inches(3.2 * columns, 2.7 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False)
    first, last = epochs[0] - 0.5, epochs[-1] + 0.5
    columns_of = np.asarray(epochs) - epochs[0]
    image = None
    for number, (axes, (name, values)) in enumerate(zip(panels.flat, matrices.items())):
        matrix = np.asarray(values)
        # The epochs stand at their numbers; principal directions are counted from 1.
        top, bottom = (first, last) if row_label == "epoch" else (0.5, len(matrix) + 0.5)
        rows_of = columns_of if row_label == "epoch" else np.arange(len(matrix))
        if len(matrix):
            grid = np.full((rows_of[-1] + 1, columns_of[-1] + 1), np.nan)
            grid[np.ix_(rows_of, columns_of)] = matrix
            image = axes.imshow(
                grid,
                aspect="auto",
                interpolation="nearest",
                cmap=colours,
                vmin=lowest,
                vmax=1,
                extent=(first, last, bottom, top),
            )
        else:
            axes.text(0.5, 0.5, "does not vary", ha="center", va="center", transform=axes.transAxes, fontsize=8)
        integer_ticks(axes.xaxis)
        integer_ticks(axes.yaxis)
        if len(matrices) > 1:
            axes.set_title(name, fontsize=8)
        if number % columns == 0:
            axes.set_ylabel(row_label)
        if number >= len(matrices) - columns:
            axes.set_xlabel("epoch")
    for axes in panels.flat[len(matrices) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=panels, label=label)
    figure.suptitle(title, fontsize=12)
    return figure
