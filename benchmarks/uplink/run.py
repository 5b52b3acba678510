"""One run through the Trainer, and the file of results, to which runs that it lacks are added."""

from __future__ import annotations

import json
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
    import lightning.pytorch as pl

    import recipes.paper.data
    from lightning_lbgm import LBGMFederated, PathologicalPartitioner
    from recipes.mnist import Classifier

    class Accuracies(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(float(trainer.callback_metrics["val/acc"]))

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setting = SETTINGS[job.setting]
    variant = next(variant for variant in variants(job.setting) if variant.name == job.variant)
    accuracies = Accuracies()
    pl.seed_everything(job.seed, verbose=False)
    rounds = setting.rounds if rounds is None else rounds
    trainer = pl.Trainer(
        strategy=LBGMFederated(
            num_clients=NUM_CLIENTS,
            partitioner=PathologicalPartitioner(3),
            uplink=variant.uplink,
            clients_per_round=setting.clients_per_round,
            local_steps=setting.local_steps,
            seed=job.seed,
            downlink=variant.downlink,
        ),
        max_epochs=rounds,
        check_val_every_n_epoch=min(EVERY, rounds),
        accelerator="cpu",
        logger=False,
        callbacks=[accuracies],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    begin = time.perf_counter()
    data = getattr(recipes.paper.data, job.data)(batch_size=setting.batch_size)
    trainer.fit(Classifier(setting.hidden, LEARNING_RATE), datamodule=data)
    metrics = trainer.callback_metrics
    return {
        **job._asdict(),
        "rounds": rounds,
        "accuracy": accuracies.seen[-1],
        "late": statistics.mean(accuracies.seen[-(LAST_ROUNDS // EVERY) :]),
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
