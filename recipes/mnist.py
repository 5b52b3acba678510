"""Federated training on MNIST: ``python -m recipes.mnist fit --config recipes/configs/mnist_lbgm.yaml``.

A LightningCLI: every setting of the module, the data, the Trainer and the strategy can be changed in the file or on the
command line, such as ``--trainer.max_epochs=10``. See recipes/README.md for the numbers it gets.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_lbgm  # noqa: F401  (registers the strategies by name)
from recipes.paper.data import MNIST


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
    return LightningCLI(Classifier, MNIST, save_config_callback=LogConfig, args=args)


if __name__ == "__main__":
    main()
