"""The module, the data and the stages: the same in a simulation and on a network."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_lbgm import QSGD, DirichletPartitioner, LookBack, SignSGD, Ternary, TopK
from lightning_lbgm.data import make_partitions

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"uplink": [], "downlink": []},
    "lbgm": {"uplink": [LookBack(threshold=0.4)], "downlink": []},
    "both": {"uplink": [TopK(0.1), LookBack(threshold=0.4)], "downlink": [TopK(0.1), QSGD(7, bucket_size=512)]},
    "recommended": {"uplink": [Ternary()], "downlink": [TopK(0.05), SignSGD()]},
}
"""Stages by method; any others will do, if both ends have the same."""


class Classifier(pl.LightningModule):
    """A classifier with a hidden layer, as one would write it for a single machine."""

    def __init__(self, inputs: int, hidden: int = 64, lr: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Digits(pl.LightningDataModule):
    """Handwritten digits: all for training, or one partition of them; and the same validation data for all.

    Args:
        name: ``"digits"``, scikit-learn's, or ``"mnist"``.
        folder: Of torchvision's MNIST.
        partition: The partition for training. None: all examples.
        partitions: Number of partitions.
        seed: Of the partition.
    """

    def __init__(self, name: str, folder: str, partition: int | None, partitions: int, seed: int) -> None:
        super().__init__()
        train, self.val = load(name, folder)
        self.inputs = train[0][0].numel()
        self.train: Dataset[Any] = train
        if partition is not None:
            # Each node would have its own data in its own place. Here it is dealt, as in the simulation.
            self.train = Subset(train, make_partitions(train, partitions, PARTITIONER, seed)[partition].tolist())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=1000)


PARTITIONER = DirichletPartitioner(alpha=10.0)


def load(name: str, folder: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training and validation data, of images as vectors."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        sets = [MNIST(folder, train=train) for train in (True, False)]
        train, val = (TensorDataset(s.data.flatten(1).float() / 255, s.targets) for s in sets)
        return train, val
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.tensor(images[order], dtype=torch.float32) / 16, torch.tensor(labels[order])
    return TensorDataset(x[:-360], y[:-360]), TensorDataset(x[-360:], y[-360:])


def make(config: dict[str, Any], partition: int | None) -> tuple[Classifier, Digits]:
    """Return module and data by an app's run config.

    Args:
        config: Flower's ``context.run_config``.
        partition: The node's; None: all examples.
    """
    data = Digits(
        str(config["data"]), str(config["data-dir"]), partition, int(config["partitions"]), int(config["seed"])
    )
    torch.manual_seed(int(config["seed"]))
    return Classifier(data.inputs, int(config["hidden"])), data
