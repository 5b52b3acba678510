"""Accuracy against uplink bytes, for every stage of the uplink: ``python -m benchmarks.uplink``.

MNIST, 100 clients with 3 classes each, 60 rounds, the whole of it through the Trainer, in two settings:

- ``paper``: linear model, one full-batch step a round, learning rate 0.1;
- ``noisy``: MLP 784-128-10, 5 local steps of batch 32, learning rate 0.1.

Every uplink is run with several seeds: about an hour on two cores. A run's result is kept in a file as soon as it is
there, so a second call goes on where the first was cut off. ``LBGM_DATA`` names the folder that holds ``MNIST/raw``.
docs/choosing.md shows the results in benchmarks/results; to write it anew from them:
``python -m benchmarks.uplink --results benchmarks/results/uplink.jsonl --docs``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lbgm import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    SignSGD,
    TargetSavings,
    TopK,
)
from lightning_lbgm.compression import Chain, Stage

NUM_CLIENTS, ROUNDS, LEARNING_RATE = 100, 60, 0.1
LOWEST = 0.06  # below FedAvg's accuracy, what the figure shows
DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Setting:
    """A model and how its clients train."""

    hidden: int | None
    batch_size: int
    local_steps: int | None


MARKERS = {
    "FedAvg": "o",
    "compressor": "s",
    "compressor + LookBack": "D",
    "LookBack": "^",
    "EF(LookBack)": "v",
    "LookBack by row": "<",
    "EF(LookBack by row)": ">",
    "Predict": "p",
    "DIANA": "*",
    "LayerRecycling": "X",
}
TITLES = {
    "paper": "Linear model, full-batch steps (the paper's setting)",
    "noisy": "MLP, 5 local steps of batch 32",
}
SETTINGS = {
    "paper": Setting(hidden=None, batch_size=60_000, local_steps=None),
    "noisy": Setting(hidden=128, batch_size=32, local_steps=5),
}


def uplinks(setting: str) -> dict[str, tuple[str, list[Stage]]]:
    """Return the uplinks to compare by name, each with the group that it belongs to in the figure."""
    bf16 = Cast(torch.bfloat16)
    rows: dict[str, tuple[str, list[Stage]]] = {"FedAvg": ("FedAvg", [])}

    def add(group: str, *stages: Stage, feedback: bool = False) -> None:
        name = " + ".join(map(_short, stages))
        rows[f"EF({name})" if feedback else name] = (group, [ErrorFeedback(list(stages))] if feedback else list(stages))

    # Thresholds that suit each setting: with and without error feedback, for the whole vector and by row.
    plain, fed, by_row = {"paper": (0.05, 0.8, 0.06), "noisy": (0.7, 0.8, 0.9)}[setting]
    for stage in (TopK(0.1), ATOMO(2), PowerSGD(2), SignSGD(), QSGD(7, bucket_size=512), RandK(0.1), bf16):
        add("compressor", stage)
        add("compressor + LookBack", stage, LookBack(plain, rank=4))
        if not isinstance(stage, (QSGD, RandK, Cast)):  # the biased ones
            add("compressor", stage, feedback=True)
            add("compressor + LookBack", stage, LookBack(fed, rank=4), feedback=True)
    for fraction in (0.03, 0.01):
        add("compressor", TopK(fraction), feedback=True)
    for stage in (bf16, QSGD(7, bucket_size=512), SignSGD()):
        add("compressor", TopK(0.03), stage, feedback=True)
    add("LookBack", LookBack(0.2))
    for rank in (1, 4, 8, 16):
        add("LookBack", LookBack(plain, rank=rank))
        add("EF(LookBack)", LookBack(fed, rank=rank), feedback=True)
    add("LookBack by row", LookBack(by_row, rank=4, rowwise=True))
    add("LookBack by row", bf16, LookBack(by_row, rank=4, rowwise=True))
    for rank in (4, 8):
        add("EF(LookBack by row)", LookBack(0.9, rank=rank, rowwise=True), feedback=True)
    add("EF(LookBack by row)", bf16, LookBack(0.9, rank=8, rowwise=True), feedback=True)
    add("EF(LookBack)", LookBack(TargetSavings(0.8), rank=8), feedback=True)
    add("EF(LookBack by row)", LookBack(TargetSavings(0.9), rank=8, rowwise=True), feedback=True)
    for fraction in (0.03, 0.01):
        add("Predict", Predict(8, TopK(fraction)), feedback=True)
        add("DIANA", DIANA(TopK(fraction)), feedback=True)
        add("DIANA", DIANA([TopK(fraction), SignSGD()]), feedback=True)
    for num_layers in (1,) if setting == "paper" else (1, 3):
        add("LayerRecycling", LayerRecycling(num_layers))
    return rows


def _short(value: Any) -> str:
    """Name a stage by its settings, without those that are at their default and say little."""
    if isinstance(value, Chain):
        return " + ".join(map(_short, value.stages))
    if not isinstance(value, (Stage, TargetSavings)):
        return str(value).removeprefix("torch.")
    settings = []
    for name, parameter in inspect.signature(type(value)).parameters.items():
        if not hasattr(value, name):
            continue  # deprecated
        always = name in ("threshold", "levels", "dtype") and parameter.default is not None
        plain = parameter.default is parameter.empty or always
        if plain or getattr(value, name) != parameter.default:
            settings.append(_short(getattr(value, name)) if plain else f"{name}={getattr(value, name)!r}")
    return f"{type(value).__name__}({', '.join(settings)})"


def run(setting: str, name: str, seed: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Train once and return the final accuracy, the uplink as a share of FedAvg's, and the seconds it took."""
    import lightning.pytorch as pl

    from lightning_lbgm import LBGMFederated, PathologicalPartitioner
    from recipes.mnist import Classifier
    from recipes.paper.data import MNIST

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    how = SETTINGS[setting]
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        strategy=LBGMFederated(
            num_clients=NUM_CLIENTS,
            partitioner=PathologicalPartitioner(3),
            uplink=uplinks(setting)[name][1],
            local_steps=how.local_steps,
            seed=seed,
        ),
        max_epochs=rounds,
        check_val_every_n_epoch=min(5, rounds),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    begin = time.perf_counter()
    trainer.fit(Classifier(how.hidden, LEARNING_RATE), datamodule=MNIST(batch_size=how.batch_size))
    return {
        "setting": setting,
        "uplink": name,
        "seed": seed,
        "rounds": rounds,
        "accuracy": float(trainer.callback_metrics["val/acc"]),
        "share": 1 - float(trainer.callback_metrics["comm/savings"]),
        "seconds": time.perf_counter() - begin,
    }


def run_missing(jobs: list[tuple[str, str, int]], results: Path, workers: int) -> list[dict[str, Any]]:
    """Run what the results file lacks, several at a time, and return all that is asked for."""
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(row["setting"], row["uplink"], row["seed"]): row for row in done}
    missing = [job for job in jobs if job not in known]
    if not missing:
        return [known[job] for job in jobs]
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *job): job for job in missing}
        for count, future in enumerate(as_completed(futures), 1):
            row = known[futures[future]] = future.result()
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - begin) / count * (len(missing) - count) / 60
            what = f"{row['setting']}, {row['uplink']}, seed {row['seed']}"
            print(f"{count}/{len(missing)}, {left:.0f} min left: {what}: {row['accuracy']:.4f}", file=sys.stderr)
    return [known[job] for job in jobs]


@dataclass(frozen=True)
class Summary:
    """An uplink's results over the seeds: means, and the widest distance from the mean."""

    uplink: str
    group: str
    accuracy: float
    accuracy_spread: float
    share: float
    share_spread: float
    lost: float  # points, against FedAvg of the same seeds


def summarise(setting: str, rows: list[dict[str, Any]]) -> list[Summary]:
    """Return a summary of each uplink, in the order of ``uplinks``."""

    def values(name: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["uplink"] == name and row["setting"] == setting]

    summaries = []
    for name, (group, _) in uplinks(setting).items():
        accuracies, shares = values(name, "accuracy"), values(name, "share")
        if not accuracies:
            continue
        lost = 100 * (statistics.mean(values("FedAvg", "accuracy")) - statistics.mean(accuracies))
        summaries.append(Summary(name, group, *_mean_and_spread(accuracies), *_mean_and_spread(shares), lost))
    return summaries


def _mean_and_spread(values: list[float]) -> tuple[float, float]:
    mean = statistics.mean(values)
    return mean, max(abs(value - mean) for value in values)


def pareto(summaries: list[Summary]) -> list[Summary]:
    """Return the uplinks that no other one beats in both accuracy and bytes, cheapest first."""
    front: list[Summary] = []
    for summary in sorted(summaries, key=lambda s: (s.share, -s.accuracy)):
        if not front or summary.accuracy > front[-1].accuracy:
            front.append(summary)
    return front


def table(summaries: list[Summary]) -> str:
    """Return the results as a Markdown table; a star marks the Pareto front."""
    front = {summary.uplink for summary in pareto(summaries)}
    lines = ["| uplink | accuracy | points lost | share of FedAvg's uplink | |", "| --- | --- | --- | --- | --- |"]
    for s in summaries:
        star = "*" if s.uplink in front else ""
        accuracy = f"{s.accuracy:.4f} ± {s.accuracy_spread:.4f}"
        lines.append(f"| `{s.uplink}` | {accuracy} | {s.lost:+.2f} | {s.share:.4f} ± {s.share_spread:.4f} | {star} |")
    return "\n".join(lines)


def draw(setting: str, summaries: list[Summary], path: Path) -> None:
    """Draw accuracy against bytes, the Pareto front as a line with the names of its points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.2), dpi=120, layout="constrained")
    axes, key = figure.subplots(2, gridspec_kw={"height_ratios": [5, 1]})
    key.axis("off")
    fedavg = next(s for s in summaries if s.group == "FedAvg")
    axes.axhline(fedavg.accuracy, color="grey", linewidth=0.8, linestyle="--", label="FedAvg's accuracy")
    for (group, marker), colour in zip(MARKERS.items(), range(10)):
        points = [s for s in summaries if s.group == group]
        if points:
            axes.errorbar(
                [s.share for s in points],
                [s.accuracy for s in points],
                yerr=[s.accuracy_spread for s in points],
                fmt=marker,
                color=f"C{colour}",
                markersize=6,
                elinewidth=0.7,
                label=group,
            )
    front = pareto(summaries)
    axes.plot([s.share for s in front], [s.accuracy for s in front], color="black", linewidth=0.8, label="Pareto front")
    shown = [s for s in front if s.accuracy > fedavg.accuracy - LOWEST]
    half = -(-len(shown) // 2)
    for number, s in enumerate(shown, 1):
        axes.annotate(str(number), (s.share, s.accuracy), xytext=(0, 7), textcoords="offset points", ha="center")
        column, row = divmod(number - 1, half)
        key.text(column / 2, 1 - row / half, f"{number}  {s.uplink}", fontsize=7, va="top")
    axes.set_xscale("log")
    axes.set_ylim(fedavg.accuracy - LOWEST, fedavg.accuracy + 0.008)
    axes.set_xlabel("uplink, share of FedAvg's")
    axes.set_ylabel(f"accuracy after {ROUNDS} rounds (mean; bars to the farthest seed)")
    axes.set_title(TITLES[setting])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def write_docs(tables: dict[str, str]) -> None:
    """Put the tables between their marks in the documentation."""
    page = DOCS / "choosing.md"
    text = page.read_text()
    for setting, rows in tables.items():
        begin, end = f"<!-- {setting}: begin -->\n", f"<!-- {setting}: end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}{rows}\n{end}{rest.split(end)[1]}"
    page.write_text(text)


def main() -> None:
    """Run what is missing, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="uplinks whose name has this in it, and FedAvg")
    parser.add_argument("--output", type=Path, default=Path("outputs/uplink"), help="folder of the figures")
    parser.add_argument("--results", type=Path, help="file of the runs' results; default: results.jsonl in that folder")
    parser.add_argument("--docs", action="store_true", help="write tables and figures into docs/ instead")
    args = parser.parse_args()
    figures = DOCS / "images" if args.docs else args.output
    results = args.results or args.output / "results.jsonl"
    for folder in (figures, results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (setting, name, seed)
        for setting in args.settings
        for seed in args.seeds
        for name in uplinks(setting)
        if args.only in name or name == "FedAvg"
    ]
    rows = run_missing(jobs, results, args.workers)
    tables = {}
    for setting in args.settings:
        summaries = summarise(setting, rows)
        tables[setting] = table(summaries)
        print(f"\n{TITLES[setting]}, {len(args.seeds)} seeds\n\n{tables[setting]}")
        draw(setting, summaries, figures / f"uplink_{setting}.png")
    if args.docs:
        write_docs(tables)


if __name__ == "__main__":
    main()
