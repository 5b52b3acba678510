"""Whom does recycling hurt? ``python -m recipes.clients``.

Trains FedAvg and LBGM with a low and a high threshold, and evaluates the global model on held-out examples of each
client. On Fashion-MNIST if ``LBGM_DATA`` (or ``--data``) names a folder that holds ``FashionMNIST/raw``, else on
scikit-learn's digits, which need no download. It prints a table, and draws each method's clients.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import ClientEvaluation, LBGMCallback, LBGMFederated, LookBack, PathologicalPartitioner
from recipes.gradient_space import Classifier, load_data, load_mnist

METHODS = {
    "FedAvg": [],
    "LBGM, threshold 0.2": [LookBack(threshold=0.2)],
    "LBGM, threshold 0.8": [LookBack(threshold=0.8)],
}
COLUMNS = ("acc_mean", "acc_worst", "acc_p10", "acc_std", "acc_worse_than_own")


def load(folder: str | None, num_examples: int) -> TensorDataset:
    """Return the training examples, square images of one channel."""
    if not folder:
        return load_data(None, num_examples)[0]
    return TensorDataset(*load_mnist(Path(folder) / "FashionMNIST" / "raw", "train")[:num_examples])


def run(name: str, data: TensorDataset, args: argparse.Namespace) -> pl.Trainer:
    """Train one method and return its trainer."""
    pl.seed_everything(args.seed, verbose=False)
    strategy = LBGMFederated(
        num_clients=args.clients, partitioner=PathologicalPartitioner(classes_per_client=3), uplink=METHODS[name]
    )
    evaluation = ClientEvaluation(split=0.2, every_n_rounds=args.every, fine_tune_steps=args.fine_tune_steps)
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=args.rounds,
        callbacks=[evaluation, LBGMCallback(figures=False)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=args.output / name.replace(", ", "_").replace(" ", "_"),
    )
    module = Classifier("fcn", side=data.tensors[0].shape[-1], lr=args.lr)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))
    return trainer


def main() -> None:
    """Run every method, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("LBGM_DATA"), help="folder that holds FashionMNIST/raw")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--every", type=int, default=20, help="rounds from one evaluation to the next")
    parser.add_argument("--fine-tune-steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    data = load(args.data, args.examples)
    names = ("mean", "worst", "p10", "std", "worse than own", "tuned worst", "savings")
    print(f"{'method':<22}" + "".join(f"{name:>16}" for name in names))
    for method in METHODS:
        metrics = run(method, data, args).callback_metrics
        keys = [*(f"clients/val/{column}" for column in COLUMNS), "clients/tuned/val/acc_worst", "comm/savings"]
        print(f"{method:<22}" + "".join(f"{float(metrics[key]):>16.3f}" for key in keys))
    print(f"\nFigures: {args.output}/*/figures/clients.png")


if __name__ == "__main__":
    main()
