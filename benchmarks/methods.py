"""Accuracy of federated methods on clients with different data: ``python -m benchmarks.methods``.

Fashion-MNIST, 100 clients with 3 classes each, 10 of them a round, an MLP, all of it through the Trainer. A run's
result is kept in a file as soon as it is there, so a second call goes on where the first was cut off. ``LBGM_DATA``
names the folder that holds ``FashionMNIST/raw``. docs/methods.md shows the results in benchmarks/results; to write it
anew from them: ``python -m benchmarks.methods --docs``. ``--tune`` runs the values that each method's parameter was
chosen from.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "methods.jsonl", ROOT / "docs" / "methods.md"
LEARNING_RATE, BATCH_SIZE, HIDDEN, EVERY, LAST = 0.1, 32, 128, 5, 20
GOAL = 0.80  # accuracy whose first round is told

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the clients train."""

    title: str
    local_steps: int
    rounds: int
    clients_per_round: int = 10
    weighting: str = "uniform"


SETTINGS = {"drift": Setting("50 local steps of batch 32", 50, 100)}


@dataclass(frozen=True)
class Method:
    """A method: the arguments of ``LBGMFederated`` that make it, and its parameter's values that were tried."""

    make: Callable[[Any], dict[str, Any]]
    chosen: dict[str, Any]  # the parameter by setting
    tried: tuple[Any, ...] = field(default=(None,))


def methods() -> dict[str, Method]:
    """Return what is compared, FedAvg first."""
    from lightning_lbgm import SCAFFOLD, FedAdam, FedAvgM, FedDyn, FedProx, FedYogi

    return {
        "FedAvg": Method(lambda _: {}, {}),
        "FedProx": Method(lambda mu: {"objective": FedProx(mu)}, {"drift": 0.1}, (0.01, 0.1, 1.0)),
        "SCAFFOLD": Method(lambda _: {"objective": SCAFFOLD()}, {}),
        "FedDyn": Method(lambda alpha: {"objective": FedDyn(alpha)}, {"drift": 0.03}, (0.01, 0.03, 0.1)),
        "FedAvgM": Method(lambda beta: {"server_optimizer": FedAvgM(momentum=beta)}, {"drift": 0.7}, (0.7,)),
        "FedAdam": Method(lambda lr: {"server_optimizer": FedAdam(lr=lr)}, {"drift": 0.01}, (0.01,)),
        "FedYogi": Method(lambda lr: {"server_optimizer": FedYogi(lr=lr)}, {"drift": 0.01}, (0.01,)),
    }


def run(setting_name: str, name: str, value: Any, seed: int, rounds: int | None = None) -> Row:
    """Train once and return what came of it.

    Args:
        setting_name: One of ``SETTINGS``.
        name: One of ``methods()``.
        value: Of its parameter.
        seed: Of partition, cohorts, batches and weights.
        rounds: None: the setting's.

    Returns:
        ``accuracy``, the mean over the last 20 rounds at every fifth; ``spread``, its standard deviation there;
        ``goal``, the first of these rounds with 80 %; ``bytes``, of both directions as a share of FedAvg's.
    """
    from lightning.pytorch import seed_everything

    import recipes.paper.data
    from benchmarks.watched_fit import watched_fit
    from lightning_lbgm import LBGMFederated, PathologicalPartitioner
    from recipes.mnist import Classifier

    setting = SETTINGS[setting_name]
    rounds = rounds or setting.rounds
    seed_everything(seed, verbose=False)
    strategy = LBGMFederated(
        num_clients=100,
        partitioner=PathologicalPartitioner(3),
        uplink=[],
        clients_per_round=setting.clients_per_round,
        local_steps=setting.local_steps,
        weighting=setting.weighting,  # type: ignore[arg-type]
        seed=seed,
        **methods()[name].make(value),
    )
    begin = time.perf_counter()
    data = recipes.paper.data.FashionMNIST(batch_size=BATCH_SIZE)
    watch, metrics = watched_fit(strategy, Classifier(HIDDEN, LEARNING_RATE), rounds, EVERY, datamodule=data)
    last = watch.accuracies[-(LAST // EVERY) :]
    reached = [EVERY * (position + 1) for position, accuracy in enumerate(watch.accuracies) if accuracy >= GOAL]
    return {
        "setting": setting_name,
        "method": name,
        "value": value,
        "seed": seed,
        "rounds": rounds,
        "accuracy": statistics.mean(last),
        "spread": statistics.pstdev(last),
        "goal": reached[0] if reached else None,
        "bytes": 1 - float(metrics["comm/total_savings"]),
        "seconds": time.perf_counter() - begin,
    }


def load(path: Path) -> list[Row]:
    """Return the results of a file, none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(jobs: list[tuple[str, str, Any, int]], path: Path, rounds: int | None) -> list[Row]:
    """Run what the file lacks and return all that is asked for."""
    known = {(r["setting"], r["method"], r["value"], r["seed"], r["rounds"]): r for r in load(path)}
    rows = []
    for job in jobs:
        key = (*job, rounds or SETTINGS[job[0]].rounds)
        if key not in known:
            known[key] = run(*job, rounds)
            with path.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            row = known[key]
            print(f"{job}: {row['accuracy']:.4f}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
        rows.append(known[key])
    return rows


def table(rows: list[Row], compared: list[Row] | None = None) -> str:
    """Return one setting's results as a Markdown table; several values of a parameter are rows of their own.

    Args:
        rows: The results.
        compared: Those that have FedAvg's of the same seeds. None: ``rows``.
    """
    lines = [
        "| method | parameter | seeds | accuracy | against FedAvg | between rounds | rounds to 80 % | bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    fedavg = {row["seed"]: row["accuracy"] for row in compared or rows if row["method"] == "FedAvg"}
    for name, value in dict.fromkeys((row["method"], row["value"]) for row in rows):
        found = [row for row in rows if (row["method"], row["value"]) == (name, value)]
        accuracies = [row["accuracy"] for row in found]
        accuracy = statistics.mean(accuracies)
        gains = [100 * (row["accuracy"] - fedavg[row["seed"]]) for row in found if row["seed"] in fedavg]
        goals = [row["goal"] for row in found]
        cells = [
            name,
            "" if value is None else f"{value:g}",
            str(len(found)),
            f"{accuracy:.4f} ± {max(abs(a - accuracy) for a in accuracies):.4f}",
            f"{statistics.mean(gains):+.2f}" if gains else "",
            f"{100 * statistics.mean(row['spread'] for row in found):.2f}",
            "never" if None in goals else f"{statistics.mean(goals):.0f}",
            f"{statistics.mean(row['bytes'] for row in found):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables of the page by name, of what there is: each setting's, and that of its tuning."""
    found = {}
    for setting, settings in SETTINGS.items():
        own = [row for row in rows if row["setting"] == setting and row["rounds"] == settings.rounds]
        made = methods().items()
        chosen = [(name, method.chosen.get(setting)) for name, method in made]
        tried = [(name, value) for name, method in made for value in method.tried if len(method.tried) > 1]
        for title, pairs, seeds in ((setting, chosen, None), (f"{setting} tuning", tried, (0,))):
            shown = [row for pair in pairs for row in own if (row["method"], row["value"]) == pair]
            found[title] = table([row for row in shown if seeds is None or row["seed"] in seeds], own)
    return found


def filled(text: str, name: str, content: str) -> str:
    """Return a page with what is between a table's marks replaced."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="rounds of a run, to try things; default: the setting's")
    parser.add_argument("--only", nargs="+", help="these methods, and FedAvg")
    parser.add_argument("--tune", action="store_true", help="all values of each parameter, on the first seed alone")
    parser.add_argument("--output", type=Path, default=Path("outputs/methods.jsonl"), help="file of results")
    parser.add_argument("--docs", action="store_true", help="take the results of docs/methods.md and write it anew")
    args = parser.parse_args()
    path = RESULTS if args.docs else args.output
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = {name: m for name, m in methods().items() if not args.only or name in ("FedAvg", *args.only)}
    for setting in args.settings:
        values = {name: m.tried if args.tune else (m.chosen.get(setting),) for name, m in chosen.items()}
        seeds = args.seeds[:1] if args.tune else args.seeds
        jobs = [(setting, name, value, seed) for name in chosen for value in values[name] for seed in seeds]
        text = table(run_missing(jobs, path, args.rounds))
        print(f"\n{SETTINGS[setting].title}\n\n{text}", flush=True)
    if args.docs:
        page = PAGE.read_text()
        for name, text in tables(load(RESULTS)).items():
            page = filled(page, name, text)
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
