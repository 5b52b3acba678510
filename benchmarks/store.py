"""What clients' states cost in memory and on disk: ``python -m benchmarks.store``.

A real ``Trainer`` on a linear module, one example a client, one full-batch step; each case in a process of its own, for
its peak memory. For the large case: ``--clients 10000 --parameters 1000000 --rounds 100 --stores disk``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import LBGMFederated, LookBack

FEATURES = 10


class Linear(pl.LightningModule):
    """Least squares, with as many outputs as it takes to have the parameters asked for."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.net = torch.nn.Linear(FEATURES, num_parameters // FEATURES, bias=False)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return (self.net(x) - y).square().sum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """Take the time at the end of each round, and count who was recycled."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sent = self.recycled = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.times.append(time.perf_counter())
        outcomes = [client.outcome for client in trainer.strategy.last_report.clients]  # type: ignore[attr-defined]
        self.sent += len(outcomes)
        self.recycled += outcomes.count("recycled")


def run_case(args: argparse.Namespace, clients: int, store: str, dtype: str) -> dict[str, float]:
    """Train in this process; return seconds a round, peak memory, disk used and clients that have a state."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(clients, FEATURES, generator=generator), torch.randn(clients, 1))
    with tempfile.TemporaryDirectory(dir=args.store) as directory:
        where = directory if store == "disk" else "memory"
        strategy = LBGMFederated(
            num_clients=clients,
            uplink=[LookBack(0.2, dtype=None if dtype == "float32" else dtype)],
            client_store=where,
            client_capacity=args.capacity,
            clients_per_round=min(clients, args.cohort),
            seed=0,
        )
        clock = Clock()
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            max_epochs=args.rounds,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Linear(args.parameters), DataLoader(data, batch_size=clients))
        used = sum(512 * path.stat().st_blocks for path in Path(directory).rglob("*") if path.is_file())
        federation = strategy._federation
        assert federation is not None
        return {
            "seconds_per_round": (clock.times[-1] - clock.times[0]) / max(1, len(clock.times) - 1),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "disk_gib": used / 2**30,
            "clients": len(federation.clients),
            "recycled": clock.recycled / clock.sent,
        }


def main() -> None:
    """Run every case in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cohort", type=int, default=100, help="clients a round")
    parser.add_argument("--stores", nargs="+", default=["memory", "disk"], choices=["memory", "disk"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--store", help="directory of the disk store; default: the system's for temporary files")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args, int(args.case[0]), *args.case[1:])))
        return
    print("clients  store   LBGs      s/round  peak GiB  disk GiB  clients stored  recycled")
    for clients, store, dtype in itertools.product(args.clients, args.stores, args.dtypes):
        command = [sys.executable, "-m", "benchmarks.store", *sys.argv[1:], "--case", str(clients), store, dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{clients:7d}  {store:6s}  {dtype:8s}  {row['seconds_per_round']:7.3f}  {row['peak_gib']:8.2f}"
            f"  {row['disk_gib']:8.2f}  {row['clients']:14.0f}  {row['recycled']:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
