"""Compare FedAvg, LBGM and TopK + LBGM on scikit-learn's digits: ``python recipes/quickstart.py``.

20 clients with three classes each train a linear classifier by full-batch steps. It prints a table, draws accuracy
against uplink bytes, and stores one MLflow run a method. No data is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import MLFlowLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_lbgm import LBGMCallback, LBGMFederated, LookBack, PathologicalPartitioner, TopK
from lightning_lbgm.figures.communication import draw_metric_against_uplink

METHODS = {
    "FedAvg": [],
    "LBGM": [LookBack(threshold=0.05)],
    "TopK + LBGM": [TopK(0.1), LookBack(threshold=0.05)],
}


class DigitsClassifier(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of clients."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(64, 10)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.val_acc(self.net(x), y)
        self.log("val/acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Curve(pl.Callback):
    """Remember accuracy against uplink bytes, for the figure of all methods."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.points.append((float(metrics["comm/uplink_bytes_total"]), float(metrics["val/acc"])))


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and validation examples, 8 x 8 images scaled into [0, 1]."""
    images, classes = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes))
    train, val = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return train, val


def run(name: str, args: argparse.Namespace, tracking_uri: str) -> tuple[pl.Trainer, list[tuple[float, float]]]:
    """Train one method and return its trainer and its curve."""
    pl.seed_everything(args.seed, verbose=False)
    train, val = load_data()
    strategy = LBGMFederated(
        num_clients=args.clients, partitioner=PathologicalPartitioner(classes_per_client=3), uplink=METHODS[name]
    )
    curve = Curve()
    trainer = pl.Trainer(
        strategy=strategy,
        max_epochs=args.rounds,
        logger=MLFlowLogger(
            "quickstart",
            run_name=name,
            tracking_uri=tracking_uri,
            artifact_location=(args.output / "mlruns").resolve().as_uri(),
        ),
        callbacks=[LBGMCallback(monitor="val/acc"), curve],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=args.output,
    )
    # A batch size of at least a client's examples means one full-batch step a round.
    trainer.fit(
        DigitsClassifier(lr=args.lr), DataLoader(train, batch_size=len(train)), DataLoader(val, batch_size=len(val))
    )
    return trainer, curve.points


def main() -> None:
    """Run every method, then print and draw the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of mlflow.db and of the figure")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    database = args.output / "mlflow.db"
    tracking_uri = f"sqlite:///{database}"
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)

    rows, curves = [], {}
    for name in METHODS:
        begin = time.perf_counter()
        trainer, curves[name] = run(name, args, tracking_uri)
        metrics = trainer.callback_metrics
        rows.append((name, *(float(metrics[key]) for key in ("val/acc", "comm/uplink_bytes_total", "comm/savings"))))
        print(f"{name}: {args.rounds} rounds in {time.perf_counter() - begin:.0f} s")

    print(f"\n{'method':<14}{'accuracy':>10}{'uplink bytes':>15}{'of FedAvg':>11}{'savings':>9}")
    for name, accuracy, uplink, savings in rows:
        print(f"{name:<14}{accuracy:>10.3f}{uplink:>15,.0f}{uplink / rows[0][2]:>11.1%}{savings:>9.1%}")

    figure = args.output / "quickstart.png"
    draw_metric_against_uplink(curves, "val/acc", log_scale=True).savefig(figure)
    print(f"\nFigure: {figure}")
    print(f"Runs:   mlflow ui --backend-store-uri {tracking_uri}   (experiment 'quickstart')")


if __name__ == "__main__":
    main()
