"""The paper's results, ours beside the authors': ``python -m recipes.paper.results``.

Compares the methods of each experiment (``recipes.compare``) and keeps the curves in a results file; what that has
already is not run again, so a second call goes on where the first was cut off. docs/results.md shows the tables and
figures; to write them anew from the results in the repository:
``python -m recipes.paper.results --results recipes/paper/results.jsonl --docs``. ``LBGM_DATA`` names the data's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.compare.__main__ import main as compare
from recipes.paper import report
from recipes.paper.experiments import EXPERIMENTS

__all__ = ["command", "read", "run_missing"]

HERE = Path(__file__).parent
KEPT = ("name", "metric", "rounds", "round", "value", "uplink_floats")


def command(name: str, methods: Sequence[str], output: Path, jobs: int) -> list[str]:
    """Return the arguments of ``python -m recipes.compare`` that run an experiment's methods."""
    experiment = EXPERIMENTS[name]
    return [
        *("--base", str(HERE / f"{experiment.config}.yaml"), "--metric", experiment.metric),
        *("--config", *(str(HERE / "methods" / f"{method}.yaml") for method in methods)),
        *("--tracking-uri", f"sqlite:///{output / 'mlflow.db'}", "--experiment", "paper", "--name", name),
        *("--jobs", str(jobs), "--output", str(output / name), *experiment.options),
    ]


def read(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results kept, by experiment and method."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return {(row["experiment"], row["name"]): row for row in rows}


def run_missing(names: Sequence[str], results: Path, output: Path, jobs: int) -> bool:
    """Run what the results file lacks; returns whether all of it succeeded."""
    succeeded = True
    for name in names:
        known = read(results)
        missing = [method for method in EXPERIMENTS[name].methods if (name, method) not in known]
        if not missing:
            continue
        print(f"\n{EXPERIMENTS[name].title}", file=sys.stderr)
        (output / name / "results.jsonl").unlink(missing_ok=True)
        succeeded &= compare(command(name, missing, output, jobs)) == 0
        if (output / name / "results.jsonl").exists():
            with results.open("a") as file:
                for line in (output / name / "results.jsonl").read_text().splitlines():
                    row = json.loads(line)
                    file.write(json.dumps({"experiment": name, **{key: row[key] for key in KEPT}}) + "\n")
    return succeeded


def main() -> None:
    """Run what is missing, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/paper"), help="folder of MLflow's store and figures"
    )
    parser.add_argument("--results", type=Path, help="file of the curves; default: results.jsonl in that folder")
    parser.add_argument("--docs", action="store_true", help="write tables and figures into docs/ instead")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.results or args.output / "results.jsonl"
    succeeded = run_missing(args.only, results, args.output, args.jobs)
    report.write(args.only, read(results), None if args.docs else args.output)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
