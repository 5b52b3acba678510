"""One run through the Trainer, and the file of results, to which runs that it lacks are added."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.uplink.variants import NUM_CLIENTS, SETTINGS, variants

__all__ = ["Job", "load", "run", "run_missing"]

LEARNING_RATE = 0.1
LAST_ROUNDS, EVERY = 20, 5  # the mean accuracy of the last rounds is that of so few of them


class Job(NamedTuple):
    """A run, as its result names it."""

    setting: str
    data: str
    variant: str
    seed: int


def run(job: Job, rounds: int | None = None) -> dict[str, Any]:
    """Train once.

    Args:
        job: What to run.
        rounds: Rounds; None: the setting's.

    Returns:
        The job; ``accuracy`` after the last round; ``late``, the mean accuracy over the last 20 rounds, at every fifth;
        ``uplink`` and ``total`` bytes (uplink and downlink) as shares of FedAvg's; and the ``seconds`` it took.
    """
    from lightning.pytorch import seed_everything

    import recipes.paper.data
    from benchmarks.watched_fit import watched_fit
    from lightning_lbgm import LBGMFederated, PathologicalPartitioner
    from recipes.mnist import Classifier

    setting = SETTINGS[job.setting]
    variant = next(variant for variant in variants(job.setting) if variant.name == job.variant)
    seed_everything(job.seed, verbose=False)
    rounds = setting.rounds if rounds is None else rounds
    strategy = LBGMFederated(
        num_clients=NUM_CLIENTS,
        partitioner=PathologicalPartitioner(3),
        uplink=variant.uplink,
        clients_per_round=setting.clients_per_round,
        local_steps=setting.local_steps,
        seed=job.seed,
        downlink=variant.downlink,
    )
    begin = time.perf_counter()
    data = getattr(recipes.paper.data, job.data)(batch_size=setting.batch_size)
    module = Classifier(setting.hidden, LEARNING_RATE)
    watch, metrics = watched_fit(strategy, module, rounds, EVERY, datamodule=data)
    return {
        **job._asdict(),
        "rounds": rounds,
        "accuracy": watch.accuracies[-1],
        "late": statistics.mean(watch.accuracies[-(LAST_ROUNDS // EVERY) :]),
        "uplink": 1 - float(metrics["comm/savings"]),
        "total": 1 - float(metrics["comm/total_savings"]),
        "seconds": time.perf_counter() - begin,
    }


def load(results: Path) -> list[dict[str, Any]]:
    """Return the results of a file, none if there is no file yet."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run_missing(jobs: list[Job], results: Path, workers: int, rounds: int | None = None) -> list[dict[str, Any]]:
    """Run what the results file lacks, several at a time, and return all that is asked for."""
    known = {
        Job(row["setting"], row["data"], row["variant"], row["seed"]): row
        for row in load(results)
        if row["rounds"] == (SETTINGS[row["setting"]].rounds if rounds is None else rounds)
    }
    missing = [job for job in jobs if job not in known]
    if not missing:
        return [known[job] for job in jobs]
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, job, rounds): job for job in missing}
        for count, future in enumerate(as_completed(futures), 1):
            row = known[futures[future]] = future.result()
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - begin) / count * (len(missing) - count) / 60
            what = f"{', '.join(map(str, futures[future][:3]))}, seed {row['seed']}"
            print(f"{count}/{len(missing)}, {left:.0f} min left: {what}: {row['accuracy']:.4f}", file=sys.stderr)
    return [known[job] for job in jobs]
