"""How few directions do the epoch gradients of centralized training span? ``python recipes/gradient_space.py``.

Trains a classifier on MNIST where ``LBGM_DATA`` (or ``--data``) names a folder that holds ``MNIST/raw``, else on
scikit-learn's digits, which need no download. It prints N95-PCA and N99-PCA, draws the figures of the gradient space,
and stores an MLflow run.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_lbgm import GradientSpaceCallback

NETS = {
    "fcn": lambda side: nn.Sequential(nn.Flatten(), nn.Linear(side**2, 128), nn.ReLU(), nn.Linear(128, 10)),
    "cnn": lambda side: nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ),
}


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of the analysis."""

    def __init__(self, net: str, side: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = NETS[net](side)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.val_acc(self.net(x), y)
        self.log("val/acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def load_data(folder: str | None, num_examples: int) -> tuple[TensorDataset, TensorDataset]:
    """Return training and validation examples, square images of one channel."""
    if folder is None:
        images, classes = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes))
        train, val = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
        return TensorDataset(*train[:]), TensorDataset(*val[:])
    train, val = (load_mnist(Path(folder) / "MNIST" / "raw", prefix) for prefix in ("train", "t10k"))
    return TensorDataset(*train[:num_examples]), val


def load_mnist(raw: Path, prefix: str) -> TensorDataset:
    """Return the images of MNIST, or of a set in its format, by MNIST's mean and deviation, and their classes."""

    def read(name: str, header: int) -> Tensor:
        path = raw / f"{prefix}-{name}-ubyte"
        content = (
            path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
        )
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())

    images = read("images-idx3", 16).view(-1, 1, 28, 28).float().div_(255).sub_(0.1307).div_(0.3081)
    return TensorDataset(images, read("labels-idx1", 8).long())


def main() -> None:
    """Train, and say what the gradients span."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("LBGM_DATA") or None, help="folder that holds MNIST/raw")
    parser.add_argument("--net", choices=NETS, default="fcn")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--examples", type=int, default=10_000, help="training examples of MNIST")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--center", choices=("entries", "epochs", "none"), default="entries")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the gradients analysed, not of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("gradient_space"), help="folder of what is written")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(args.seed, verbose=False)
    args.output.mkdir(parents=True, exist_ok=True)

    train, val = load_data(args.data, args.examples)
    callback = GradientSpaceCallback(
        monitor="val/acc", center=None if args.center == "none" else args.center, momentum=args.momentum
    )
    tracking_uri = f"sqlite:///{args.output / 'mlflow.db'}"
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[callback],
        logger=[
            MLFlowLogger(
                "gradient-space",
                tracking_uri=tracking_uri,
                artifact_location=(args.output / "mlruns").resolve().as_uri(),
            ),
            CSVLogger(args.output, name="", version=""),  # the figures and the table as plain files too
        ],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=args.output,
    )
    side = train.tensors[0].shape[-1]
    trainer.fit(
        Classifier(args.net, side, args.lr),
        DataLoader(train, batch_size=args.batch_size, shuffle=True),
        DataLoader(val, batch_size=2000),
    )

    metrics = trainer.callback_metrics
    print(f"\n{'MNIST' if args.data else 'digits'}, {args.net}: validation accuracy {float(metrics['val/acc']):.3f}")
    print(f"{args.epochs} epoch gradients of {callback.space.layout.size:,} entries;")
    print(f"{float(metrics['gradient_space/n95']):.0f} principal components explain 95 %,", end=" ")
    print(f"{float(metrics['gradient_space/n99']):.0f} explain 99 % of their variance")
    print(f"\nFigures: {args.output / 'figures'}")
    print(f"Run:     mlflow ui --backend-store-uri {tracking_uri}   (experiment 'gradient-space')")


if __name__ == "__main__":
    main()
