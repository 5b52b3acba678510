"""Tables and figures of docs/performance.md, from the rows of results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "performance.jsonl"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"

TITLES = {
    "round": "A round of ours, in rounds of the hand-written loop (one process, one thread)",
    "peers": "Other ways to run the same work, in rounds of the hand-written loop",
    "execution": "Clients side by side, in rounds with one after the other",
    "processes": "Two processes, in rounds of one",
    "stores": "Where look-back gradients are kept, in rounds with them in memory",
    "look_back": "Look-back test and reconstruction of one update",
    "uplinks": "A round of W1 with each uplink, in rounds of the hand-written loop (one process, one thread)",
    "methods": "A round of W1 with other settings, in rounds of FedAvg",
    "stages": "Encoding, decoding and adding one update, in ms and in passes over it (one thread)",
    "feeding": "Feeding a round, in epochs of one DataLoader over as many examples",
    "scaling_clients": "A round by clients (10,000 parameters, one small step)",
    "scaling_parameters": "A round by parameters (4 clients, one small step)",
}
AUTHORS_US = {"0.1 M": 1_582, "1 M": 5_476, "11 M": 192_827}
NOT_MEASURED = "not measured"


def load(path: Path = RESULTS) -> list[Row]:
    """Return the rows of results; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(name: str, rows: list[Row]) -> str:
    """Return a table in Markdown."""
    rows = [row for row in rows if row["table"] == name]
    if name == "look_back":
        return _look_back(rows)
    if name == "stages":
        return _stages(rows)
    if name == "scaling_clients":
        return _clients(rows)
    if name == "scaling_parameters":
        return _parameters(rows)
    workloads = list(dict.fromkeys(row["workload"] for row in rows if "workload" in row))
    if not workloads:
        return _markdown(["", "ratio"], [[row["what"], _ratio(row["ratio"])] for row in rows])
    ratios = {(row["what"], row["workload"]): row["ratio"] for row in rows}
    names = list(dict.fromkeys(row["what"] for row in rows))
    cells = [[what, *(_ratio(ratios.get((what, workload))) for workload in workloads)] for what in names]
    return _markdown(["", *workloads], cells)


def _look_back(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        authors = AUTHORS_US.get(row["what"].split(",")[0]) if row["dtype"] == "float32" else None
        shares = [f"{100 * row[key]:.0f}%" for key in ("test_share", "aggregate_share")]
        micro = [f"{row[key]:,.0f}" for key in ("test_us", "aggregate_us")]
        total = f"{row['test_us'] + row['aggregate_us']:,.0f}"
        return [row["what"], *micro, total, f"{authors:,}" if authors else "", *shares]

    names = ["parameters", "test, us", "aggregation, us", "both, us", "authors' code, us"]
    return _markdown([*names, "test, of bandwidth", "aggregation, of bandwidth"], [cells(row) for row in rows])


def _stages(rows: list[Row]) -> str:
    sizes = {row["parameters"]: row["size"] for row in rows}
    header, names = ["uplink"], list(dict.fromkeys(row["what"] for row in rows))
    for label, size in sizes.items():
        header += [f"{label} ({size:,}): encode, ms", "decode, ms", "add, ms", "all, passes"]
    cells = [[f"`{name}`"] for name in names]
    for row in rows:
        milliseconds = [row[f"{part}_ms"] for part in ("encode", "decode", "add")]
        passes = f"{sum(milliseconds) / row['pass_ms']:.0f}"
        cells[names.index(row["what"])] += [*(f"{value:,.2f}" for value in milliseconds), passes]
    return _markdown(header, cells)


def _clients(rows: list[Row]) -> str:
    cells = [[f"{r['clients']:,}", r["what"], f"{r['seconds']:.3f}", f"{r['us_per_client']:,.0f}"] for r in rows]
    return _markdown(["clients", "in a round", "round, s", "us a client of the round"], cells)


def _parameters(rows: list[Row]) -> str:
    cells = [
        [f"{r['parameters']:,}", f"{r['seconds']:.4f}", f"{r['bound_s']:.4f}", _ratio(r["seconds"] / r["bound_s"])]
        for r in rows
    ]
    return _markdown(["parameters", "round, s", "memory bound, s", "ratio"], cells)


def _ratio(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    line = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, line, *rows))


def filled(text: str, rows: list[Row]) -> str:
    """Return the page with each table between its marks replaced by that of the rows."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{table(match[2], rows)}\n\n{match[3]}"

    text = re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", replace, text, flags=re.DOTALL)
    machine = next((row for row in rows if row["table"] == "machine"), None)
    if machine is not None:
        measured = f"Measured with PyTorch {machine['torch']} on a machine of {machine['cores']} cores."
        text = re.sub(r"(<!-- machine -->).*?(<!-- end -->)", rf"\1\n\n{measured}\n\n\2", text, flags=re.DOTALL)
    return text


def write(rows: list[Row]) -> None:
    """Write the page and the figures."""
    PAGE.write_text(filled(PAGE.read_text(), rows))
    tables = {row["table"] for row in rows}
    if {"round", "peers"} <= tables:
        draw_rounds(rows, IMAGES / "performance_round.png")
    if {"scaling_clients", "scaling_parameters"} <= tables:
        draw_scaling(rows, IMAGES / "performance_scaling.png")


def draw_rounds(rows: list[Row], path: Path) -> None:
    """Draw what a round costs, ours and other ways."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r["table"] in ("round", "peers") and r["what"] != "LBGM's own part"]
    names = list(dict.fromkeys(row["what"] for row in shown))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for offset, (workload, colour) in enumerate((("W1", "tab:blue"), ("W2", "tab:orange"))):
        ratios = {row["what"]: row["ratio"] for row in shown if row["workload"] == workload}
        places = [place + 0.4 * offset - 0.2 for place, name in enumerate(names) if name in ratios]
        axes.barh(places, [ratios[name] for name in names if name in ratios], 0.38, color=colour, label=workload)
    labels = [f"ours, {name}" if name.startswith("[") else name.replace("`", "") for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of a round / hand-written loop's")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_scaling(rows: list[Row], path: Path) -> None:
    """Draw a round's time by clients and by parameters, and by processes, with logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    by_clients, by_parameters, by_processes = figure.subplots(1, 3)
    clients = [row for row in rows if row["table"] == "scaling_clients"]
    for what in dict.fromkeys(row["what"] for row in clients):
        points = [(row["clients"], row["seconds"]) for row in clients if row["what"] == what]
        by_clients.plot(*zip(*points), marker="o", label=what)
    by_clients.set(xscale="log", yscale="log", xlabel="clients", ylabel="round, s", title="Clients")
    by_clients.legend(title="in a round")
    parameters = [row for row in rows if row["table"] == "scaling_parameters"]
    for key, label, style in (("seconds", "measured", "o-"), ("bound_s", "memory bound", "k--")):
        by_parameters.plot([r["parameters"] for r in parameters], [r[key] for r in parameters], style, label=label)
    by_parameters.set(xscale="log", yscale="log", xlabel="parameters", title="Parameters (4 clients)")
    by_parameters.legend()
    for row in rows:
        if row["table"] == "processes" and row["ratio"] is not None:
            by_processes.plot([1, 2], [row["one_s"], row["two_s"]], marker="o", label=row["workload"])
    by_processes.set(xscale="log", yscale="log", xlabel="processes", title="Processes")
    by_processes.set_xticks([1, 2], ["1", "2"])
    if by_processes.lines:
        by_processes.legend()
    else:
        by_processes.text(0.5, 0.5, NOT_MEASURED, ha="center", transform=by_processes.transAxes)
    figure.savefig(path, dpi=120)
