"""Tables and figures of docs/choosing.md, from the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.uplink.variants import DATASETS, SETTINGS, variants

__all__ = ["DOCS", "Summary", "draw", "pareto", "summarise", "table", "write_docs"]

DOCS = Path(__file__).parent.parent.parent / "docs"
LOWEST = 6.0  # points below FedAvg's accuracy, what the figure shows
MARKERS = {"FedAvg": "o", "paper": "^", "stateful": "s", "stateless": "D", "both directions": "*"}
GROUPS = {
    "FedAvg": "FedAvg",
    "paper": "LBGM as in the paper",
    "stateful": "remembers clients",
    "stateless": "remembers nothing",
    "both directions": "both directions",
}


@dataclass(frozen=True)
class Summary:
    """A variant's results on one data set over the seeds.

    Attributes:
        variant: Its name.
        group: Its group in the figure.
        accuracy: Mean accuracy after the last round.
        spread: The widest distance of a seed's accuracy from the mean.
        lost: Points lost against FedAvg of the same seeds, after the last round.
        late: The same in the mean over the last 20 rounds.
        uplink: Share of FedAvg's uplink, mean.
        total: Share of FedAvg's uplink and downlink together, mean.
    """

    variant: str
    group: str
    accuracy: float
    spread: float
    lost: float
    late: float
    uplink: float
    total: float


def summarise(setting: str, data: str, rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """Return a summary of each variant that has results, in the order of ``variants``."""
    runs = {(row["variant"], row["seed"]): row for row in rows if row["setting"] == setting and row["data"] == data}
    summaries = []
    for variant in variants(setting):
        found = [(row, runs["FedAvg", seed]) for (name, seed), row in runs.items() if name == variant.name]
        if not found:
            continue
        accuracy = statistics.mean(row["accuracy"] for row, _ in found)
        summaries.append(
            Summary(
                variant.name,
                variant.group,
                accuracy,
                max(abs(row["accuracy"] - accuracy) for row, _ in found),
                100 * statistics.mean(fedavg["accuracy"] - row["accuracy"] for row, fedavg in found),
                100 * statistics.mean(fedavg["late"] - row["late"] for row, fedavg in found),
                statistics.mean(row["uplink"] for row, _ in found),
                statistics.mean(row["total"] for row, _ in found),
            )
        )
    return summaries


def pareto(summaries: Sequence[Summary]) -> list[Summary]:
    """Return the variants that no other one beats in both accuracy and total bytes, cheapest first."""
    front: list[Summary] = []
    for summary in sorted(summaries, key=lambda s: (s.total, s.lost)):
        if not front or summary.lost < front[-1].lost:
            front.append(summary)
    return front


def table(setting: str, rows: Sequence[dict[str, Any]], datasets: Sequence[str] = DATASETS) -> str:
    """Return the results of a setting as a Markdown table, data sets side by side."""
    found = {data: {s.variant: s for s in summarise(setting, data, rows)} for data in datasets}
    head, rule = ["variant"], ["---"]
    for data in datasets:
        head += [f"{data}: accuracy", "lost", "lost, last 20 rounds", "uplink", "total"]
        rule += ["---"] * 5
    lines = [head, rule]
    for variant in variants(setting):
        cells = [f"`{variant.name}`"]
        for data in datasets:
            s = found[data].get(variant.name)
            cells += (
                [""] * 5
                if s is None
                else [
                    f"{s.accuracy:.4f} ± {s.spread:.4f}",
                    f"{s.lost:+.2f}",
                    f"{s.late:+.2f}",
                    f"{s.uplink:.4f}",
                    f"{s.total:.4f}",
                ]
            )
        if any(cells[1:]):
            lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(setting: str, rows: Sequence[dict[str, Any]], path: Path, datasets: Sequence[str] = DATASETS) -> None:
    """Draw points lost against bytes: the uplink above, both directions below, a column for each data set."""
    from matplotlib.figure import Figure

    datasets = [data for data in datasets if summarise(setting, data, rows)]
    figure = Figure(figsize=(5.4 * len(datasets), 9.6), dpi=110, layout="constrained")
    grid = figure.subplots(3, len(datasets), squeeze=False, gridspec_kw={"height_ratios": [4, 4, 1.6]})
    numbers = {variant.name: number for number, variant in enumerate(variants(setting))}
    for column, data in enumerate(datasets):
        summaries = summarise(setting, data, rows)
        for axes, direction in zip(grid[:2, column], ("uplink", "total")):
            for position, (group, marker) in enumerate(MARKERS.items()):
                points = [s for s in summaries if s.group == group and s.lost < LOWEST]
                if direction == "uplink":
                    points = [s for s in points if group != "both directions"]
                shares = [getattr(s, direction) for s in points]
                axes.plot(shares, [s.late for s in points], marker, color=f"C{position}", label=GROUPS[group])
                for share, s in zip(shares, points):
                    axes.annotate(
                        str(numbers[s.variant]), (share, s.late), xytext=(0, 6), textcoords="offset points", fontsize=8
                    )
            axes.axhline(0, color="grey", linewidth=0.8, linestyle="--")
            axes.set(xscale="log", ylabel="points lost, last 20 rounds", title=data)
            axes.set_xlabel("uplink, share of FedAvg's" if direction == "uplink" else "both directions, of FedAvg's")
            axes.invert_yaxis()
            axes.grid(alpha=0.3)
        grid[2, column].axis("off")
    grid[0, 0].legend(fontsize=8)
    half = -(-len(numbers) // len(datasets))
    for name, number in numbers.items():
        column, row = divmod(number, half)
        grid[2, column].text(0, 1 - row / half, f"{number}  {name}", fontsize=7, va="top")
    figure.suptitle(SETTINGS[setting].title)
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
