"""Images with one class each: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, as tensors in memory.

Means and deviations are those of the training set's pixels, scaled into [0, 1], for each channel.
"""

from __future__ import annotations

import gzip
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from recipes.paper.data.base import PaperData
from recipes.paper.data.pictures import read_mosaic

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "ClassificationData", "FashionMNIST"]


class ClassificationData(PaperData):
    """Images of one size, each of one class.

    An item is ``(x, y)``: x ``float32`` of the shape ``(in_channels, size, size)``, normalised to mean 0 and deviation
    1 over the training set; y a scalar ``int64`` from 0 to ``num_classes - 1``. Both sets are a ``TensorDataset``, from
    which local batches are drawn in bulk.

    Args:
        root: Folder that holds the data set. None: the environment variable ``LBGM_DATA``, else ``data``. It is never
            written to.
        batch_size: Size of the local batches; at least a client's examples means full-batch steps.
        val_batch_size: Size of the validation batches.
        num_train: Use only so many training examples: always the same, drawn at random with each class's share kept.
            None: all.
        num_val: The same of the validation examples.
        size: Width and height to resize to. None: as they are.
        download: Whether to download into ``cache`` what is missing.
        cache: Folder to download into.
    """

    source: ClassVar[Any]
    num_classes: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 60000,
        val_batch_size: int = 2000,
        num_train: int | None = None,
        num_val: int | None = None,
        size: int | None = None,
        download: bool = False,
        cache: str = "~/.cache/lightning_lbgm",
    ) -> None:
        super().__init__(root, batch_size, val_batch_size, num_train, num_val, size, download=download, cache=cache)

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def fetch(self, folder: Path) -> None:
        self.source(str(folder), download=True)

    @abstractmethod
    def read(self, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
        """Return the images, ``uint8`` of the shape ``(n, in_channels, height, width)``, and classes, ``int64``."""

    def load(self, folder: Path, train: bool) -> TensorDataset:
        images, classes = self.read(folder, train)
        indices = self.wanted(len(classes), train, classes)
        if len(indices) < len(classes):
            images, classes = images[indices], classes[indices]
        if self.size is not None:
            images = F.resize(images, [self.size, self.size], antialias=True)
        x = F.normalize(images.float().div_(255), list(self.mean), list(self.std), inplace=True)
        return TensorDataset(x, classes)


class MNIST(ClassificationData):
    """MNIST, handwritten digits (LeCun et al., 1998): 60,000 images of 28 x 28 to train on, 10,000 to validate on.

    The four files lie in ``root/MNIST/raw``, packed or unpacked.
    """

    source = datasets.MNIST
    title = "MNIST"
    place = "MNIST/raw"
    files = (
        "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and"
        " t10k-labels-idx1-ubyte.gz"
    )
    page = "http://yann.lecun.com/exdb/mnist/"
    in_channels = 1
    num_classes = 10
    mean, std = (0.1307,), (0.3081,)

    def _files(self, folder: Path, train: bool) -> list[Path | None]:
        part = "train" if train else "t10k"
        names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        paths = [[folder / self.place / f"{name}{ending}" for ending in ("", ".gz")] for name in names]
        return [next((path for path in choice if path.is_file()), None) for choice in paths]

    def is_there(self, folder: Path) -> bool:
        return all(self._files(folder, True) + self._files(folder, False))

    def read(self, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
        images, classes = (_read_idx(path) for path in self._files(folder, train) if path is not None)
        return images.unsqueeze(1), classes.long()


class FashionMNIST(MNIST):
    """Fashion-MNIST, pictures of clothes (Xiao et al., arXiv 1708.07747), with MNIST's sizes and file names.

    The four files lie in ``root/FashionMNIST/raw``, packed or unpacked.
    """

    source = datasets.FashionMNIST
    title = "Fashion-MNIST"
    place = "FashionMNIST/raw"
    page = "https://github.com/zalandoresearch/fashion-mnist"
    mean, std = (0.2860,), (0.3530,)


class CIFAR100(ClassificationData):
    """CIFAR-100, 100 kinds of things (Krizhevsky, 2009): 50,000 images of 32 x 32 to train on, 10,000 to validate on.

    The files lie in ``root/cifar-100-python``.
    """

    source = datasets.CIFAR100
    title = "CIFAR-100"
    place = "cifar-100-python"
    files = "the files of cifar-100-python.tar.gz"
    page = "https://www.cs.toronto.edu/~kriz/cifar.html"
    num_classes = 100
    mean, std = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)

    def is_there(self, folder: Path) -> bool:
        names = [name for name, _ in self.source.train_list + self.source.test_list]
        return all((folder / self.place / name).is_file() for name in [*names, self.source.meta["filename"]])

    def read(self, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
        data = self.source(str(folder), train=train)
        return torch.from_numpy(data.data.transpose(0, 3, 1, 2).copy()), torch.tensor(data.targets)


class CIFAR10(CIFAR100):
    """CIFAR-10, ten kinds of things (Krizhevsky, 2009): 50,000 images of 32 x 32 to train on, 10,000 to validate on.

    The files lie in ``root/cifar-10-batches-py``. Where only ``root/cifar10`` is there, it is read instead: a part of
    the set as lossless mosaics, ``data_batch_1.webp`` and further ones and ``test_batch.webp``, each of images side by
    side, row by row, and ``labels.npz``.
    """

    source = datasets.CIFAR10
    title = "CIFAR-10"
    place = "cifar-10-batches-py"
    files = "the files of cifar-10-python.tar.gz"
    num_classes = 10
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def is_there(self, folder: Path) -> bool:
        return super().is_there(folder) or (
            all(_mosaics(folder, train) for train in (True, False)) and (folder / "cifar10" / "labels.npz").is_file()
        )

    def read(self, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
        if super().is_there(folder):
            return super().read(folder, train)
        mosaics = _mosaics(folder, train)
        labels = np.load(folder / "cifar10" / "labels.npz")
        classes = torch.from_numpy(np.concatenate([labels[path.stem] for path in mosaics])).long()
        if train:
            rank_zero_info(
                f"CIFAR-10: {folder / 'cifar10'} holds a subset of {len(classes):,} of the 50,000 training images."
            )
        return torch.cat([read_mosaic(path, 32) for path in mosaics]), classes


def _read_idx(path: Path) -> Tensor:
    """Read a file of the IDX format of bytes: the number of dimensions at byte 3, the dimensions, the values."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = bytearray(file.read())
    shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape))


def _mosaics(folder: Path, train: bool) -> list[Path]:
    return sorted((folder / "cifar10").glob("data_batch_*.webp" if train else "test_batch.webp"))
