"""Partitioners side by side: ``python -m recipes.partitions --images docs/images``.

Deals the training images of Fashion-MNIST to clients by each rule and prints how much the clients differ, if
``LBGM_DATA`` (or ``--data``) names a folder that holds ``FashionMNIST/raw``; else those of scikit-learn's digits, which
need no download. ``--images`` names the folder for the figures of docs/partitions.md. Nothing is trained.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_lbgm import (
    DirichletPartitioner,
    FeaturePartitioner,
    IIDPartitioner,
    PathologicalPartitioner,
    QuantityPartitioner,
    ShardPartitioner,
)
from lightning_lbgm.data import Partitioner, count_labels, heterogeneity, make_partitions
from lightning_lbgm.figures.partition import draw_client_sizes, draw_label_map, label_map
from recipes.gradient_space import load_data, load_mnist

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "examples": "{size_min:,.0f} to {size_max:,.0f}",
    "CV": "{size_cv:.2f}",
    "distance": "{label_distance_mean:.2f}",
    "largest": "{label_distance_max:.2f}",
    "by chance": "{label_distance_chance:.2f}",
    "effective labels": "{labels_effective_mean:.1f}",
}


def brightness(example: list[Tensor]) -> Tensor:
    """Return the mean pixel of an image."""
    return example[0].mean()


PARTITIONERS: dict[str, Partitioner] = {
    "IIDPartitioner()": IIDPartitioner(),
    "QuantityPartitioner(0.5)": QuantityPartitioner(0.5),
    "DirichletPartitioner(1.0)": DirichletPartitioner(1.0),
    "DirichletPartitioner(0.1)": DirichletPartitioner(0.1),
    "PathologicalPartitioner(2)": PathologicalPartitioner(2),
    "ShardPartitioner(2)": ShardPartitioner(2),
    "FeaturePartitioner(brightness, 0.1)": FeaturePartitioner(brightness, 0.1),
}


def load(folder: str | None) -> TensorDataset:
    """Return the training images, of one channel, and their classes."""
    if not folder:
        return load_data(None, 0)[0]
    return load_mnist(Path(folder) / "FashionMNIST" / "raw", "train")


def row(name: str, found: dict[str, float]) -> str:
    """Return a row of the table."""
    return f"| `{name}` | " + " | ".join(cell.format(**found) for cell in COLUMNS.values()) + " |"


def draw(counts: dict[str, np.ndarray], names: dict[str, list[object]]) -> Figure:
    """Draw each partition as a heat map with the clients' sizes above, in one scale of colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 5.6), dpi=140)
    outer = figure.add_gridspec(
        2, (len(counts) + 1) // 2, left=0.03, right=0.915, top=0.925, bottom=0.06, wspace=0.2, hspace=0.22
    )
    image = None
    for (name, grid), cell in zip(counts.items(), outer):
        inner = cell.subgridspec(2, 1, height_ratios=[1, 5], hspace=0.03)
        above, axes = figure.add_subplot(inner[0]), figure.add_subplot(inner[1])
        above.bar(range(len(grid)), grid.sum(1), width=0.8, color="tab:gray")
        above.set_xlim(-0.5, len(grid) - 0.5)
        above.set_axis_off()
        above.set_title(name, fontsize=8.5)
        image = label_map(axes, grid, names[name], highest=1.0)
        axes.set_xticks([])
    figure.colorbar(image, cax=figure.add_axes((0.93, 0.25, 0.014, 0.5)), label="share of the client's examples")
    figure.supxlabel("a column for each client, its number of examples above", fontsize=10)
    return figure


def main() -> None:
    """Deal the images by each rule, print the table, and draw the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("LBGM_DATA"), help="folder that holds FashionMNIST/raw")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--many", type=int, default=3000, help="clients of the figure of a long federation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=Path, help="folder of the figures; none are drawn without it")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give

    data = load(args.data)
    labels = data.tensors[1].numpy()
    print("| partitioner | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    counts: dict[str, np.ndarray] = {}
    for name, partitioner in PARTITIONERS.items():
        partitions = make_partitions(data, args.clients, partitioner, args.seed)
        counts[name], classes = count_labels(partitions, labels)
        print(row(name, heterogeneity(counts[name].sum(1), counts[name])))
    names: dict[str, list[object]] = {name: list(classes) for name in counts}

    # The last partition again, by what it is skewed in: tenths of the images, from the darkest to the brightest.
    values = data.tensors[0].flatten(1).mean(1).numpy()
    tenth = np.argsort(np.argsort(values)) * 10 // len(values)
    by_feature = "the last, by tenths of brightness"
    counts[by_feature], _ = count_labels(partitions, tenth)
    names[by_feature] = [number for number in range(1, 11)]
    print("\nThe last one by tenths of brightness instead of labels:")
    print(row(name, heterogeneity(counts[by_feature].sum(1), counts[by_feature])))
    if args.images is None:
        return

    args.images.mkdir(parents=True, exist_ok=True)
    draw(counts, names).savefig(args.images / "partitions.png")
    many = make_partitions(data, min(args.many, len(labels) // 10), DirichletPartitioner(0.1), args.seed)
    for suffix, chosen in (("", counts["DirichletPartitioner(0.1)"]), ("_many", count_labels(many, labels)[0])):
        found = heterogeneity(chosen.sum(1), chosen)
        draw_label_map(chosen, classes, found).savefig(args.images / f"partition_labels{suffix}.png")
        draw_client_sizes(chosen.sum(1), found).savefig(args.images / f"partition_sizes{suffix}.png")


if __name__ == "__main__":
    main()
