"""The figure of the first page, accuracy against bytes on MNIST: ``python -m benchmarks.uplink.first_page``.

FedAvg, LBGM, and the recommended uplink and downlink in the paper's setting (``variants.SETTINGS["paper"]``), by seeds.
Curves are kept in benchmarks/results/first_page.jsonl as soon as they are there; runs that it has are not made again.
The figure is drawn for light and for dark pages, with a transparent ground. ``LBGM_DATA`` names the folder that holds
``MNIST/raw``. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.uplink.report import DOCS
from benchmarks.uplink.run import load
from benchmarks.uplink.variants import SETTINGS, variants

__all__ = ["METHODS", "RESULTS", "curve", "draw", "summary"]

RESULTS = Path(__file__).parent.parent / "results" / "first_page.jsonl"
# Of each line: the variant, its label, and its colours on a light and on a dark page.
METHODS = {
    "FedAvg": ("FedAvg", "FedAvg", "#5f6673", "#a9b1be"),
    "LBGM": ("LookBack(0.2)", "LBGM on the uplink", "#b3590a", "#f2a65a"),
    "recommended": ("↑ Ternary() ↓ TopK(0.03) + SignSGD()", "recommended uplink and downlink", "#1f6fb4", "#6db8f2"),
}
LABELS = {"FedAvg": ((0, 20), "center"), "LBGM": ((0, -28), "center"), "recommended": ((2, 22), "left")}  # in points
SEEDS = (0, 1, 2)


def run(method: str, seed: int, rounds: int | None = None) -> dict[str, Any]:
    """Train once; the accuracy after each round, and the bytes sent until then by clients and by the server."""
    from lightning.pytorch import seed_everything

    import recipes.paper.data
    from benchmarks.uplink.run import LEARNING_RATE
    from benchmarks.uplink.variants import NUM_CLIENTS
    from benchmarks.watched_fit import watched_fit
    from lightning_lbgm import LBGMFederated, PathologicalPartitioner
    from recipes.mnist import Classifier

    setting = SETTINGS["paper"]
    variant = next(variant for variant in variants("paper") if variant.name == METHODS[method][0])
    seed_everything(seed, verbose=False)
    strategy = LBGMFederated(
        num_clients=NUM_CLIENTS,
        partitioner=PathologicalPartitioner(3),
        uplink=variant.uplink,
        downlink=variant.downlink,
        seed=seed,
    )
    data = recipes.paper.data.MNIST(batch_size=setting.batch_size)
    module = Classifier(setting.hidden, LEARNING_RATE)
    watch, _ = watched_fit(strategy, module, rounds or setting.rounds, datamodule=data)
    uplink = [sum(client.uplink_bits for client in report.clients) // 8 for report in watch.reports]
    downlink = [report.downlink_bits // 8 for report in watch.reports]
    return {"method": method, "seed": seed, "accuracy": watch.accuracies, "uplink": uplink, "downlink": downlink}


def curve(rows: list[dict[str, Any]], method: str) -> list[tuple[float, float]]:
    """Return the points (bytes of both directions so far, accuracy) after each round, means over the seeds."""
    runs = [row for row in rows if row["method"] == method]
    points, sent = [], 0.0
    for index in range(len(runs[0]["accuracy"])):
        sent += statistics.mean(row["uplink"][index] + row["downlink"][index] for row in runs)
        points.append((sent, statistics.mean(row["accuracy"][index] for row in runs)))
    return points


def summary(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Return for each method the last accuracy, and its shares of FedAvg's uplink and of all of FedAvg's bytes."""
    found = {}
    for method in METHODS:
        runs = [row for row in rows if row["method"] == method]
        up, down = (statistics.mean(sum(row[direction]) for row in runs) for direction in ("uplink", "downlink"))
        found[method] = (statistics.mean(row["accuracy"][-1] for row in runs), up, up + down)
    _, up, both = found["FedAvg"]
    return {method: (accuracy, mine / up, all_mine / both) for method, (accuracy, mine, all_mine) in found.items()}


def draw(rows: list[dict[str, Any]], path: Path, *, dark: bool) -> None:
    """Draw accuracy against the bytes of both directions, each line with its name and share."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    ink = "#d5d9e2" if dark else "#30343c"
    with rc_context({"svg.hashsalt": "lightning_lbgm", "font.size": 11}):  # the same file each time
        figure = Figure(figsize=(7.2, 3.5), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for method, (accuracy, _, share) in summary(rows).items():
            _, label, *colours = METHODS[method]
            colour = colours[dark]
            x, y = zip(*curve(rows, method))
            axes.plot(x, y, color=colour, linewidth=2.4)
            axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=6)
            what = f"{label}\n{accuracy:.1%}" + ("" if method == "FedAvg" else f", {share:.0%} of the bytes")
            offset, align = LABELS[method]
            axes.annotate(
                what, (x[-1], y[-1]), xytext=offset, textcoords="offset points", color=colour, ha=align, va="center"
            )
        axes.set(ylim=(0.55, 0.97), xlim=(0, 440e6))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("sent by clients and server so far", color=ink)
        axes.set_ylabel("accuracy", color=ink)
        axes.tick_params(which="both", colors=ink)
        for side, spine in axes.spines.items():
            spine.set(color=ink, visible=side in ("left", "bottom"))
        axes.grid(alpha=0.2, color=ink)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, print what each method comes to, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS / "images", help="folder of the figures")
    args = parser.parse_args()
    rows = load(RESULTS)
    for method in METHODS:
        for seed in SEEDS:
            if not any((row["method"], row["seed"]) == (method, seed) for row in rows):
                rows.append(run(method, seed))
                with RESULTS.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    for method, (accuracy, up, both) in summary(rows).items():
        print(f"{method:<12} accuracy {accuracy:.4f}, {up:.2%} of FedAvg's uplink, {both:.2%} of all bytes")
    for name, dark in (("light", False), ("dark", True)):
        draw(rows, args.output / f"first_page_{name}.svg", dark=dark)


if __name__ == "__main__":
    main()
