"""The tables and figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.paper.experiments import AUTHORS, EXPERIMENTS, LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "label", "table", "write"]

DOCS = Path(__file__).parents[2] / "docs"


def label(method: str) -> str:
    """Return how tables and figures name a method."""
    return ", ".join(LABELS[part] for part in method.split("+"))


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return an experiment's results as a Markdown table; the authors' column where they have a number."""
    experiment, authors = EXPERIMENTS[name], AUTHORS.get(name, {})
    short = experiment.metric.removeprefix("val/")
    heads = [f"best {short}", f"last {short}", "floats a client", "of FedAvg's", "recycled"]
    if authors:
        heads.insert(1, f"authors' best {short}")
    lines = [f"| method | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
    for row in rows:
        cells = [f"{_best(row):.3f}", f"{row['metric'][-1]:.3f}", f"{row['floats'][-1]:,.0f}", f"{row['share']:.1%}"]
        cells.append(f"{row['recycled']:.0%}" if "lbgm" in row["method"] else "")
        if authors:
            cells.insert(1, f"{authors[row['method']]:.3f}" if row["method"] in authors else "")
        lines.append(f"| {label(row['method'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(row: dict[str, Any]) -> float:
    return min(row["metric"]) if row["experiment"].startswith("faces") else max(row["metric"])


def draw(name: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the paper's three panels: the metric and the floats sent against rounds, and the one against the other."""
    from matplotlib.figure import Figure

    experiment = EXPERIMENTS[name]
    figure = Figure(figsize=(12, 3.8), dpi=90, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for row in rows:
        style = {"label": label(row["method"]), "linewidth": 1.2}
        left.plot(row["round"], row["metric"], **style)
        middle.plot(row["round"], row["floats"], **style)
        right.plot(row["floats"], row["metric"], **style)
    for axes, x, y in (
        (left, "round", experiment.metric),
        (middle, "round", "floats a client has sent"),
        (right, "floats a client has sent", experiment.metric),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
    middle.set_yscale("log")
    right.set_xscale("log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(experiment.title)
    return figure


def write(names: Sequence[str], rows: Sequence[dict[str, Any]], folder: Path | None) -> None:
    """Print the tables and save the figures in ``folder``; None: write both into the documentation."""
    page = DOCS / "results.md"
    text = page.read_text() if folder is None else ""
    for name in names:
        own = [row for row in rows if row["experiment"] == name]
        result = table(name, own)
        figure = draw(name, own)
        if folder is not None:
            print(f"\n{EXPERIMENTS[name].title}\n\n{result}")
            figure.savefig(folder / f"{name}.png")
            continue
        figure.savefig(DOCS / "images" / f"results_{name}.png")
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}{result}\n{end}{rest.split(end)[1]}"
    if folder is None:
        page.write_text(text)
