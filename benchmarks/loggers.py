"""What logging costs a round, and what memory grows by: ``python -m benchmarks.loggers``.

Rounds of 50 clients of a small model with different loggers, each fit in a process of its own; the fits take turns. A
fit's time includes what is still sent when it ends, and processor time that of other threads. ``--only mlflow --rounds
300`` measures less.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import LBGMCallback, LBGMFederated, LookBack

CLIENTS = 50
FEATURES, CLASSES = 20, 5
WARMUP = 100
"""Rounds after which memory is looked at first."""
KINDS = {
    "none": "no logger",
    "csv": "`CSVLogger`",
    "silent": "`MLFlowLogger`, what Lightning logs alone",
    "mlflow": "`MLFlowLogger`",
    "mlflow-plain": "`MLFlowLogger`, `figures=False, client_table=False`",
}


class Small(pl.LightningModule):
    """A linear classifier that logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Silent(LBGMCallback):
    """Log, keep and draw nothing, so that what is left is Lightning's own."""

    def on_train_batch_start(self, *args: Any) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        pass


class Watch(pl.Callback):
    """Note the time and the memory in use after the first rounds, and the memory after the last."""

    start_s = start_cpu_s = start_bytes = end_bytes = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == WARMUP:
            self.start_s, self.start_cpu_s, self.start_bytes = time.perf_counter(), time.process_time(), _memory()
        self.end_bytes = _memory()


def _memory() -> float:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(kind: str, rounds: int, folder: str) -> dict[str, float]:
    """Make one fit and return milliseconds a round and the megabytes that memory grew by."""
    logger: Any = False
    if kind == "csv":
        logger = CSVLogger(folder)
    elif kind != "none":
        logger = MLFlowLogger("b", tracking_uri=f"sqlite:///{folder}/b.db", artifact_location=f"file://{folder}/a")
    ours = Silent() if kind == "silent" else LBGMCallback()
    if kind in ("silent", "mlflow-plain"):
        ours.figures = ours.client_table = False
    watch = Watch()
    trainer = pl.Trainer(
        strategy=LBGMFederated(num_clients=CLIENTS, uplink=[LookBack(0.2)], seed=0),
        accelerator="cpu",
        max_epochs=WARMUP + rounds,
        logger=logger,
        callbacks=[ours, watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(CLIENTS * 20) % CLASSES
    x = torch.randn(CLASSES, FEATURES, generator=generator)[y] + torch.randn(len(y), FEATURES, generator=generator)
    trainer.fit(Small(), DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True))
    seconds = time.perf_counter() - watch.start_s
    cpu = time.process_time() - watch.start_cpu_s
    return {
        "ms": 1e3 * seconds / rounds,
        "cpu_ms": 1e3 * cpu / rounds,
        "mb": (watch.end_bytes - watch.start_bytes) / 1e6,
    }


def turns(kinds: Sequence[str], rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the medians over fits that take turns, by kind."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, results in found.items():
            command = [sys.executable, "-m", "benchmarks.loggers", "--fit", kind, "--rounds", str(rounds)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    return {
        kind: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for kind, results in found.items()
    }


def main() -> None:
    """Make one fit and print what it cost, or measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit is None:
        print("| logger | round, ms | processor time, ms | memory grows by, MB |\n| --- | ---: | ---: | ---: |")
        for kind, row in turns(args.only, args.rounds, args.repeats).items():
            print(f"| {KINDS[kind]} | {row['ms']:.1f} | {row['cpu_ms']:.1f} | {row['mb']:.1f} |")
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_lbgm", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args.fit, args.rounds, folder)))


if __name__ == "__main__":
    main()
