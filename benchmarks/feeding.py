"""Feeding clients beside one epoch of a plain DataLoader over as many examples."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from benchmarks.timing import ratio, take_turns
from lightning_lbgm.data import BatchPlan, ClientFeed, IIDPartitioner, RoundLoader, make_partitions

Row = dict[str, Any]

BATCH_SIZE, LOCAL_STEPS, NUM_CLIENTS = 32, 5, 100


def images(folder: str) -> Dataset[Any] | None:
    """Return MNIST with random transforms, or None where ``LBGM_DATA`` does not name a folder that holds it."""
    source = Path(os.environ.get("LBGM_DATA", "")) / "MNIST" / "raw"
    if not os.environ.get("LBGM_DATA") or not source.is_dir():
        print("Feeding images: skipped; set LBGM_DATA to a folder that holds MNIST/raw/*.gz.", file=sys.stderr)
        return None
    from torchvision import transforms
    from torchvision.datasets import MNIST

    shutil.copytree(source, Path(folder) / "MNIST" / "raw")
    steps = [transforms.RandomAffine(10, (0.1, 0.1)), transforms.ToTensor(), transforms.Normalize(0.1307, 0.3081)]
    return MNIST(folder, train=True, download=True, transform=transforms.Compose(steps))


def client_rounds(loader: DataLoader[Any], num_clients: int) -> Iterator[None]:
    """Draw all local batches of a round at each ``next``, as a fit does."""
    plan = BatchPlan(batch_size=BATCH_SIZE, local_steps=LOCAL_STEPS, shuffle=True)
    partitions = make_partitions(loader.dataset, num_clients, IIDPartitioner(), 0)
    done = 0
    rounds = RoundLoader(ClientFeed(loader, plan, partitions, 0), num_clients, 1, lambda: done)
    while True:
        for round_ in rounds:
            for _, batches in round_.clients():
                for _ in batches:
                    pass
        done += 1
        yield


def epochs(loader: DataLoader[Any]) -> Iterator[None]:
    """Go through a DataLoader at each ``next``."""
    while True:
        for _ in loader:
            pass
        yield


def feeding(quick: bool) -> Iterator[Row]:
    """Yield the time to feed a round, in epochs of one DataLoader over as many examples."""
    num_clients = 10 if quick else NUM_CLIENTS
    num_examples = num_clients * LOCAL_STEPS * BATCH_SIZE
    tensors = TensorDataset(torch.randn(60_000, 784), torch.randint(10, (60_000,)))
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset, workers in (
            ("tensors in memory", tensors, (0,)),
            ("images with random transforms", images(folder), (0, 2)),
        ):
            for num_workers in workers:
                row = {"table": "feeding", "what": f"{name}, num_workers={num_workers}", "ratio": None}
                if dataset is None:
                    yield row
                    continue
                settings: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": num_workers}
                settings["persistent_workers"] = num_workers > 0
                plain = DataLoader(dataset, sampler=RandomSampler(dataset, num_samples=num_examples), **settings)  # type: ignore[arg-type]
                clients = DataLoader(dataset, shuffle=True, **settings)
                contestants = {"plain": partial(epochs, plain), "clients": partial(client_rounds, clients, num_clients)}
                seconds = take_turns(contestants, rounds=3 if quick else 4, warmup=1)
                yield {**row, "ratio": ratio(seconds, "clients", "plain")}
