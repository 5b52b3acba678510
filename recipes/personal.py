"""Compare FedAvg, FedPer, FedRep and FedBN on clients with different data: ``python -m recipes.personal``.

20 clients share scikit-learn's digits, or with ``--data`` (or ``LBGM_DATA``) a part of Fashion-MNIST, with two classes
each, or with pictures of their own brightness (``--skew features``). Each holds out a quarter of its examples, and is
judged on these with the model that it would use: the shared parameters and its own. It prints a table.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import IIDPartitioner, LBGMFederated, NaturalPartitioner, PathologicalPartitioner
from lightning_lbgm.data import Partitioner

LOCAL_STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedper": {"personal": ["head.*"]},
    "fedrep": {"personal": ["head.*"], "personal_steps": LOCAL_STEPS // 2},
    "fedbn": {"personal": ["norm.*"]},
}


class Classifier(pl.LightningModule):
    """An ordinary LightningModule whose parts have names: a body, a BatchNorm and a head.

    Args:
        num_inputs: Pixels of an image.
        lr: The clients' learning rate (eta).
    """

    def __init__(self, num_inputs: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(num_inputs, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x.flatten(1)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def load_data(root: Path | None, num_examples: int) -> tuple[Tensor, Tensor]:
    """Return images of zero mean and unit deviation, one row each, and their classes: digits, or Fashion-MNIST."""
    if root is None:
        images, classes = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(classes)
        return (x - x.mean()) / x.std(), y
    from recipes.paper.data import FashionMNIST  # which needs torchvision

    data = FashionMNIST(root=str(root), num_train=num_examples)
    data.setup("fit")
    assert isinstance(data.train, TensorDataset)
    x, y = data.train.tensors
    return x.flatten(1), y


def deal(x: Tensor, y: Tensor, num_clients: int, skew: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deal the examples to clients, with a quarter of each one's held out.

    Returns:
        The images, of shape ``(n, pixels)``; the client of each, from 0; and whether it is held out.
    """
    rng = np.random.default_rng(seed)
    partitioner: Partitioner = PathologicalPartitioner(2) if skew == "labels" else IIDPartitioner()
    parts = partitioner.partition(TensorDataset(x, y), num_clients, rng)
    x, owner, held_out = x.clone(), torch.zeros(len(y), dtype=torch.long), torch.zeros(len(y), dtype=torch.bool)
    for client_id, part in enumerate(parts):
        own = torch.as_tensor(rng.permutation(np.asarray(part)))
        owner[own] = client_id
        held_out[own[: len(own) // 4]] = True
        if skew == "features":  # as of cameras: contrast, brightness, and for half of them the negative
            sign = -1 if client_id % 2 else 1
            x[own] = sign * float(rng.uniform(0.5, 2)) * x[own] + float(rng.uniform(-1, 1))
    return x, owner, held_out


def run(method: str, seed: int, args: argparse.Namespace) -> tuple[list[float], int]:
    """Train one method; return each client's accuracy on what it has held out, and the uplink's bytes."""
    pl.seed_everything(seed, verbose=False)
    x, y = load_data(args.data, args.examples)
    x, owner, held_out = deal(x, y, args.clients, args.skew, seed)
    strategy = LBGMFederated(
        num_clients=args.clients,
        partitioner=NaturalPartitioner(owner[~held_out]),
        local_steps=LOCAL_STEPS,
        uplink=[],
        **METHODS[method],
    )
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=args.rounds,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = Classifier(x.shape[1], args.lr)
    trainer.fit(module, DataLoader(TensorDataset(x[~held_out], y[~held_out]), batch_size=16, shuffle=True))
    return evaluate(strategy, module, x, y, owner, held_out), strategy.ledger.uplink_bits // 8


@torch.no_grad()
def evaluate(
    strategy: LBGMFederated, module: Classifier, x: Tensor, y: Tensor, owner: Tensor, held_out: Tensor
) -> list[float]:
    """Return the accuracy of each client's own model on its held-out examples."""
    module.eval()
    accuracies = []
    for client_id in range(int(owner.max()) + 1):
        mine = held_out & (owner == client_id)
        with strategy.client_model(client_id):
            accuracies.append(float((module(x[mine]).argmax(1) == y[mine]).float().mean()))
    return accuracies


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Run the methods and print the comparison; return the accuracies of all clients and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--skew", choices=["labels", "features"], default="labels", help="how the clients differ")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=os.environ.get("LBGM_DATA"), help="folder with FashionMNIST/raw")
    parser.add_argument("--examples", type=int, default=6000, help="examples of Fashion-MNIST")
    args = parser.parse_args(arguments)
    print(f"{'method':<8}{'mean client':>20}{'worst client':>20}{'uplink bytes':>15}{'seconds':>9}")
    results = {}
    for method in args.method:
        begin = time.perf_counter()
        runs = [run(method, seed, args) for seed in args.seeds]
        seconds = time.perf_counter() - begin
        results[method] = [accuracy for accuracies, _ in runs for accuracy in accuracies]
        means = span([statistics.fmean(accuracies) for accuracies, _ in runs])
        worst = span([min(accuracies) for accuracies, _ in runs])
        print(f"{method:<8}{means:>20}{worst:>20}{runs[0][1]:>15,}{seconds:>9.0f}", flush=True)
    return results


def span(values: list[float]) -> str:
    """Write the mean of several seeds and, in brackets, the lowest and the highest."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main()
