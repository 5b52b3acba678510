"""The paper's results, ours beside the authors': ``python -m recipes.paper.results``.

Runs what the results file lacks, several runs at a time, and keeps each run's line as soon as it is there, so that a
second call goes on where the first was cut off. docs/results.md shows the tables and figures; to write them anew from
the results in the repository: ``python -m recipes.paper.results --results recipes/paper/results.jsonl --docs``.
``LBGM_DATA`` names the folder of the data.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from recipes.paper import report
from recipes.paper.experiments import EXPERIMENTS, Experiment

HERE = Path(__file__).parent


def command(experiment: Experiment, method: str) -> list[str]:
    """Return the arguments of ``python -m recipes.paper`` that run a method; ``a+b`` names two configs of methods."""
    configs = [HERE / f"{experiment.config}.yaml", *(HERE / "methods" / f"{part}.yaml" for part in method.split("+"))]
    return ["fit", *(f"--config={path}" for path in configs), *experiment.options]


def run(name: str, method: str, store: Path) -> dict[str, Any]:
    """Train once and return the curves, each a list of one number for each validated round.

    ``floats`` are those that a client has sent so far, on average: the unit of the paper's figures.
    """
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from recipes.paper.cli import main

    experiment = EXPERIMENTS[name]
    begin = time.perf_counter()
    cli = main(
        [
            *command(experiment, method),
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.logger.init_args.experiment_name=paper {name}",
            f"--trainer.logger.init_args.run_name={method}",
            f"--trainer.logger.init_args.tracking_uri=sqlite:///{store / 'mlflow.db'}",
            f"--trainer.logger.init_args.artifact_location={(store / 'mlruns' / name).resolve().as_uri()}",
        ]
    )
    logger, clients = cli.trainer.logger, cli.trainer.strategy.num_clients
    curves = {
        key: {point.step: point.value for point in logger.experiment.get_metric_history(logger.run_id, key)}
        for key in (experiment.metric, "comm/uplink_floats_total", "lbgm/recycled_fraction")
    }
    metric, floats, recycled = curves.values()
    return {
        "experiment": name,
        "method": method,
        "rounds": cli.trainer.global_step,
        "round": list(metric),
        "metric": list(metric.values()),
        "floats": [floats[step] / clients for step in metric],
        "recycled": sum(recycled.values()) / len(recycled),
        "share": 1 - float(cli.trainer.callback_metrics["comm/savings"]),
        "seconds": time.perf_counter() - begin,
    }


def run_missing(names: list[str], results: Path, store: Path, jobs: int) -> list[dict[str, Any]]:
    """Run what the results file lacks and return all that is asked for."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(row["experiment"], row["method"]): row for row in rows}
    wanted = [(name, method) for name in names for method in EXPERIMENTS[name].methods]
    missing = [pair for pair in wanted if pair not in known]
    if missing:
        import mlflow

        # Before several processes ask for it: the store's tables are made by the first that does.
        mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}").search_experiments()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *pair, store): pair for pair in missing}
        begin = time.perf_counter()
        for count, future in enumerate(as_completed(futures), 1):
            row = known[futures[future]] = future.result()
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - begin) / count * (len(missing) - count) / 60
            outcome = f"{row['experiment']}, {row['method']}: {row['metric'][-1]:.4f}"
            print(f"{count}/{len(missing)}, {left:.0f} min left: {outcome}", file=sys.stderr)
    return [known[pair] for pair in wanted]


def main() -> None:
    """Run what is missing, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/paper"), help="folder of MLflow's store and figures"
    )
    parser.add_argument("--results", type=Path, help="file of the runs' results; default: results.jsonl in that folder")
    parser.add_argument("--docs", action="store_true", help="write tables and figures into docs/ instead")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = run_missing(args.only, args.results or args.output / "results.jsonl", args.output, args.jobs)
    report.write(args.only, rows, None if args.docs else args.output)


if __name__ == "__main__":
    main()
