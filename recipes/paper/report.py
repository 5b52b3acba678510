"""The tables and figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.compare.report import is_lower_better
from recipes.paper.experiments import AUTHORS, EXPERIMENTS, LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE", "draw", "table", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
DASHES = {"lbgm_layer": "--", "coefficient": ":"}  # for each kind of test


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return an experiment's results as a Markdown table; the authors' column where they have a number."""
    experiment, authors = EXPERIMENTS[name], AUTHORS.get(name, {})
    short = experiment.metric.removeprefix("val/")
    heads = [f"best {short}", f"last {short}", "floats a client", "of FedAvg's"]
    if authors:
        heads.insert(1, f"authors' best {short}")
    lines = [f"| method | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
    best = min if is_lower_better(experiment.metric) else max
    for row in rows:
        floats, everything = (r["uplink_floats"][-1] for r in (row, rows[0]))
        cells = [f"{best(row['value']):.3f}", f"{row['value'][-1]:.3f}", f"{floats / experiment.clients:,.0f}"]
        cells.append(f"{floats / everything:.1%}")
        if authors:
            cells.insert(1, f"{authors[row['name']]:.3f}" if row["name"] in authors else "")
        lines.append(f"| {LABELS[row['name']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(name: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the paper's three panels: the metric and the floats sent against rounds, and the one against the other."""
    from matplotlib.figure import Figure

    experiment = EXPERIMENTS[name]
    figure = Figure(figsize=(12, 4), dpi=80, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    thresholds = sorted({_threshold(row["name"]) for row in rows})
    for number, row in enumerate(rows):
        # A colour for each threshold, or for each method where they have none.
        colour = thresholds.index(_threshold(row["name"])) if len(thresholds) > 1 else number
        dashes = next((dashes for group, dashes in DASHES.items() if row["name"].startswith(group)), "-")
        style = {"label": LABELS[row["name"]], "linewidth": 1.2, "linestyle": dashes, "color": f"C{colour}"}
        floats = [total / experiment.clients for total in row["uplink_floats"]]
        left.plot(row["round"], row["value"], **style)
        middle.plot(row["round"], floats, **style)
        right.plot(floats, row["value"], **style)
    for axes, x, y in (
        (left, "round", experiment.metric),
        (middle, "round", "floats sent by a client"),
        (right, "floats sent by a client", experiment.metric),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
    middle.set_yscale("log")
    right.set_xscale("log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(rows)), fontsize=8)
    figure.suptitle(experiment.title)
    return figure


def _threshold(method: str) -> str:
    last = method.split("_")[-1]
    return last if last.startswith("0.") else ""


def write(names: Sequence[str], known: dict[tuple[str, str], dict[str, Any]], folder: Path | None) -> None:
    """Print the tables and save the figures in ``folder``; None: write both into the documentation."""
    text = PAGE.read_text() if folder is None else ""
    for name in names:
        rows = [known[name, method] for method in EXPERIMENTS[name].methods if (name, method) in known]
        if not rows:
            continue
        result = table(name, rows)
        draw(name, rows).savefig(
            PAGE.parent / "images" / f"results_{name}.png" if folder is None else folder / f"{name}.png"
        )
        if folder is None:
            begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
            head, rest = text.split(begin)
            text = f"{head}{begin}{result}\n{end}{rest.split(end)[1]}"
        else:
            print(f"\n{EXPERIMENTS[name].title}\n\n{result}")
    if folder is None:
        PAGE.write_text(text)
