"""What the paper's models learn: ordinary LightningModules, which know nothing of clients."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.regression import MeanSquaredError

__all__ = ["Classification", "LandmarkRegression", "Segmentation"]


class Task(pl.LightningModule):
    """A network, its loss, the metric that it is judged by, and SGD.

    Args:
        net: The network.
        metric: Of the validation data; logged as ``val/<metric_name>``.
        metric_name: Its short name.
        lr: The clients' learning rate (eta).
    """

    def __init__(self, net: nn.Module, metric: Metric, metric_name: str, lr: float) -> None:
        super().__init__()
        self.net = net
        self.metric = metric
        self.metric_name = f"val/{metric_name}"
        self.lr = lr
        self.save_hyperparameters({"net": type(net).__name__, "lr": lr})

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        outputs, targets = self.net(batch[0]), batch[1]
        self.metric(outputs, targets)
        self.log("val/loss", self.loss(outputs, targets))
        self.log(self.metric_name, self.metric, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Classification(Task):
    """Classes of images; logs ``val/acc``.

    Args:
        net: Maps images to logits, shape ``(B, num_classes)``.
        num_classes: Classes.
        lr: The clients' learning rate (eta).
        loss: Cross entropy, or for a linear SVM the squared hinge loss, summed over the classes.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        lr: float = 0.01,
        loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy",
    ) -> None:
        super().__init__(net, MulticlassAccuracy(num_classes, average="micro"), "acc", lr)
        self.loss_name = loss

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss_name == "cross_entropy":
            return nn.functional.cross_entropy(outputs, targets)
        # torch divides by the number of classes.
        return nn.functional.multi_margin_loss(outputs, targets, p=2) * outputs.shape[1]


class LandmarkRegression(Task):
    """Coordinates of landmarks in faces; logs ``val/mse``.

    Args:
        net: Maps images to coordinates, shape ``(B, num_coordinates)``.
        lr: The clients' learning rate (eta).
    """

    def __init__(self, net: nn.Module, lr: float = 0.01) -> None:
        super().__init__(net, MeanSquaredError(), "mse", lr)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Segmentation(Task):
    """The class of each pixel; logs ``val/miou``, the mean over the classes of intersection over union.

    Args:
        net: Maps images to logits, shape ``(B, num_classes, S, S)``.
        num_classes: Classes of a pixel, the background among them.
        lr: The clients' learning rate (eta).
        ignore_index: Pixels of this label are not counted; 255 in PASCAL VOC, around objects.
    """

    def __init__(self, net: nn.Module, num_classes: int = 21, lr: float = 0.01, ignore_index: int = 255) -> None:
        super().__init__(net, MulticlassJaccardIndex(num_classes, ignore_index=ignore_index), "miou", lr)
        self.ignore_index = ignore_index

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, ignore_index=self.ignore_index)
