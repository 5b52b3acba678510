"""Federated training on MNIST: ``python -m recipes.mnist fit --config recipes/configs/mnist_lbgm.yaml``.

A LightningCLI: every setting of the module, the data, the Trainer and the strategy can be changed in the file or on the
command line, such as ``--trainer.max_epochs=10``. See recipes/README.md for the numbers it gets.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import MNIST

import lightning_lbgm  # noqa: F401  (registers the strategies by name)


class Classifier(pl.LightningModule):
    """A linear classifier, or one with a hidden layer.

    Args:
        hidden: Width of the hidden layer; None: none.
        lr: The clients' learning rate (eta).
    """

    def __init__(self, hidden: int | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Linear(784, 10)] if hidden is None else [nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
        self.net = nn.Sequential(nn.Flatten(), *layers)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.val_acc(self.net(x), y)
        self.log("val/acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class MNISTData(pl.LightningDataModule):
    """MNIST as tensors in memory: 60,000 images to train on, 10,000 to validate on.

    Args:
        root: Folder that holds ``MNIST/raw``, or is to hold it. None: the environment variable ``LBGM_DATA``, else
            ``data``. It is never written to where the files are there; packed ones are unpacked into ``cache``.
        batch_size: Size of the local batches; at least a client's examples means full-batch steps.
        download: Whether to download what is missing.
        cache: Folder to unpack into.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        download: bool = True,
        cache: str = "~/.cache/lightning_lbgm",
    ) -> None:
        super().__init__()
        self.root = Path(root or os.environ.get("LBGM_DATA") or "data").expanduser()
        self.cache = Path(cache).expanduser()
        self.batch_size = batch_size
        self.download = download

    def prepare_data(self) -> None:
        raw = self.root / "MNIST" / "raw"
        if (raw / "train-images-idx3-ubyte").exists():
            return
        if (raw / "train-images-idx3-ubyte.gz").exists():
            self.root = self.cache
            unpacked = self.cache / "MNIST" / "raw"
            unpacked.mkdir(parents=True, exist_ok=True)
            for packed in raw.glob("*.gz"):
                if not (unpacked / packed.name).exists():
                    shutil.copy(packed, unpacked)
        elif not self.download:
            raise FileNotFoundError(
                f"MNIST is not in {raw}. Set `LBGM_DATA` (or `--data.root`) to the folder that holds `MNIST/raw`, or"
                " pass `--data.download=true`."
            )
        MNIST(str(self.root), download=True)  # fetches only what is not there

    def setup(self, stage: str) -> None:
        self.train, self.val = (self._load(train) for train in (True, False))

    def _load(self, train: bool) -> TensorDataset:
        data = MNIST(str(self.root), train=train)
        images = data.data.float().div_(255).sub_(0.1307).div_(0.3081)  # mean and deviation of the training pixels
        return TensorDataset(images.unsqueeze(1), data.targets)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=2000)


class LogConfig(SaveConfigCallback):
    """Keep the config with the MLflow run (Lightning's own callback wants a folder, which such a logger has not)."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})  # type: ignore[arg-type]

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        config = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_text(logger.run_id, config, "config.yaml")


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the command line, or ``args``."""
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    return LightningCLI(Classifier, MNISTData, save_config_callback=LogConfig, args=args)


if __name__ == "__main__":
    main()
