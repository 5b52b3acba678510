"""Rules of who takes part, on digits with clients that differ: ``python -m benchmarks.participation``.

scikit-learn's digits dealt to 60 clients by a Dirichlet distribution, so that they differ in classes and in size, and
cohorts of 6: each rule with three seeds, all of it through the Trainer. About three minutes on one core. It writes the
results to benchmarks/results/participation.jsonl and their table into docs/participation.md; ``--rounds`` tries a
shorter run, and only prints.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_lbgm import DirichletPartitioner, Dropout, LBGMFederated, PowerOfChoice, SizeSampler

__all__ = ["RULES", "run", "table", "write_docs"]

RESULTS = Path(__file__).parent / "results" / "participation.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "participation.md"
ROUNDS, SEEDS = 100, (0, 1, 2)
NUM_CLIENTS, COHORT = 60, 6
GOAL, LATE = 0.85, 20  # accuracy that is to be reached; rounds at the end whose mean accuracy counts

RULES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "availability=0.5": {"availability": 0.5},
    "availability=0.05": {"availability": 0.05},
    "dropout=0.2": {"dropout": 0.2},
    "Dropout(before=0.2)": {"dropout": Dropout(before=0.2)},
    "over_select=1.3": {"over_select": 1.3},
    "over_select=1.3, dropout=0.2": {"over_select": 1.3, "dropout": 0.2},
    "deadline=5": {"deadline": 5},
    "SizeSampler()": {"sampler": SizeSampler(), "weighting": "uniform"},
    "PowerOfChoice(d=12)": {"sampler": PowerOfChoice(12), "weighting": "uniform"},
    "PowerOfChoice(d=24)": {"sampler": PowerOfChoice(24), "weighting": "uniform"},
    "PowerOfChoice(d=60)": {"sampler": PowerOfChoice(60), "weighting": "uniform"},
}


def run(rule: str, seed: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Train once.

    Returns:
        The rule, the seed and the rounds; ``late``, the mean accuracy over the last 20 rounds; ``reached``, the round
        after which the accuracy was 85 % first, or None; of a round the mean ``cohort``, ``dropped`` clients, and
        ``waited``, the local steps of the slowest client that counts; and ``uplink`` and ``downlink`` bytes in all.
    """
    from lightning.pytorch import seed_everything
    from torch.utils.data import DataLoader

    from benchmarks.watched_fit import watched_fit
    from recipes.quickstart import DigitsClassifier, load_data

    seed_everything(seed, verbose=False)
    train, val = load_data()
    strategy = LBGMFederated(
        num_clients=NUM_CLIENTS,
        partitioner=DirichletPartitioner(0.3),
        clients_per_round=COHORT,
        uplink=[],
        seed=seed,
        **RULES[rule],
    )
    loaders = DataLoader(train, batch_size=8, shuffle=True), DataLoader(val, batch_size=len(val))
    module = DigitsClassifier(lr=0.1)
    watch, _ = watched_fit(strategy, module, rounds, train_dataloaders=loaders[0], val_dataloaders=loaders[1])
    reached = next((t + 1 for t, accuracy in enumerate(watch.accuracies) if accuracy >= GOAL), None)
    return {
        "rule": rule,
        "seed": seed,
        "rounds": rounds,
        "late": statistics.mean(watch.accuracies[-LATE:]),
        "reached": reached,
        "cohort": statistics.mean(len(report.clients) for report in watch.reports),
        "dropped": statistics.mean(len(report.dropped) for report in watch.reports),
        "waited": statistics.mean(max((c.local_steps for c in r.clients), default=0) for r in watch.reports),
        "uplink": strategy.ledger.uplink_bits // 8,
        "downlink": strategy.ledger.downlink_bits // 8,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, a line for each rule that has some, means over the seeds."""
    lines = [
        ["rule", "accuracy", f"rounds to {GOAL:.0%}", "clients a round", "dropped", "waits for", "uplink", "downlink"],
        ["---"] * 8,
    ]
    for rule in RULES:
        found = [row for row in rows if row["rule"] == rule]
        if not found:
            continue
        accuracy, cohort, dropped, waited, uplink, downlink = (
            statistics.mean(row[name] for row in found)
            for name in ("late", "cohort", "dropped", "waited", "uplink", "downlink")
        )
        spread = max(abs(row["late"] - accuracy) for row in found)
        reached = [row["reached"] for row in found]
        lines.append(
            [
                f"`{rule}`",
                f"{accuracy:.3f} ± {spread:.3f}",
                "not by all" if None in reached else f"{statistics.mean(reached):.0f}",
                f"{cohort:.1f}",
                f"{dropped:.1f}",
                f"{waited:.1f} steps",
                f"{uplink / 1e6:.2f} MB",
                f"{downlink / 1e6:.2f} MB",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_docs(text: str) -> None:
    """Put the table between its marks in the documentation."""
    begin, end = "<!-- participation: begin -->\n", "<!-- participation: end -->"
    head, rest = DOCS.read_text().split(begin)
    DOCS.write_text(f"{head}{begin}{text}\n{end}{rest.split(end)[1]}")


def load() -> list[dict[str, Any]]:
    """Return the results that the documentation shows."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def main() -> None:
    """Run all, print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [run(rule, seed, args.rounds) for rule in RULES for seed in SEEDS]
    print(table(rows))
    if args.rounds == ROUNDS:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_docs(table(rows))


if __name__ == "__main__":
    main()
