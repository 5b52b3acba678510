"""A round in two processes beside one: ``python -m benchmarks.processes`` is what each of them runs."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.rounds import federation, user_code
from benchmarks.workloads import workloads
from lightning_lbgm import LookBack

Row = dict[str, Any]


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def processes(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round in two processes, in rounds in one; they take turns run by run."""
    for index, workload in enumerate(workloads(quick)):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        row = {"table": "processes", "workload": workload.name, "what": "two / one", "ratio": None}
        for devices in (1, 2) if quick else (1, 2, 2, 1):
            seconds[devices] += _run(index, devices, quick)
        if seconds[2]:
            one, two = statistics.median(seconds[1]), statistics.median(seconds[2])
            row = {**row, "ratio": two / one, "one_s": one, "two_s": two}
        yield row


def _run(index: int, devices: int, quick: bool) -> list[float]:
    """Return a run's seconds of a round; none where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.processes", "--workload", str(index), "--devices", str(devices)]
        command += ["--folder", folder, *(["--quick"] if quick else [])]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    if result.returncode or not lines:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"Processes: devices={devices} did not run: {reason}", file=sys.stderr)
        return []
    seconds: list[float] = json.loads(lines[-1])
    return seconds


def main() -> None:
    """Run one fit and print the seconds of its rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", help="for the callback's figures")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    workload, clock = workloads(args.quick)[args.workload], _Clock()
    warmup, rounds = 2, 3 if args.quick else 8
    trainer = pl.Trainer(
        strategy=federation(workload, [LookBack(0.2)]),
        devices=args.devices,
        accelerator="cpu",
        max_epochs=warmup + rounds,
        callbacks=[clock],
        logger=False,
        default_root_dir=args.folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(*user_code(workload))
    if trainer.is_global_zero:
        print(json.dumps(clock.seconds[warmup:]), flush=True)


if __name__ == "__main__":
    main()
