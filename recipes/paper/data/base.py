"""What the paper's data modules share: where the files are, what to do where they are not, and the loaders."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.paper.data.subset import draw_subset

__all__ = ["PaperData"]


class PaperData(pl.LightningDataModule, ABC):
    """A data set whose files are read where they lie: nothing is ever written into ``root``.

    A subclass names its files and reads them. Train and validation set are loaded once, by the first ``setup``.

    Attributes:
        title: The data set's name, in messages.
        place: Folder in ``root`` that holds the files.
        files: Which files, in words.
        page: Address of the data set's official page.
        download_needs: What a download takes, in words.
        in_channels: Channels of an image.

    Args:
        root: Folder that holds the data sets. None: the environment variable ``LBGM_DATA``, else ``data``.
        batch_size: Size of the local batches.
        val_batch_size: Size of the validation batches.
        num_train: Training examples to use. None: all.
        num_val: Validation examples to use. None: all.
        size: Width and height to resize images to. None: as they are.
        num_workers: Processes that decode images, for what is not in memory.
        download: Whether to download into ``cache`` what is missing.
        cache: Folder to download into. None: it cannot be downloaded.
    """

    title: ClassVar[str]
    place: ClassVar[str]
    files: ClassVar[str]
    page: ClassVar[str]
    download_needs: ClassVar[str] = ""
    in_channels: ClassVar[int] = 3

    def __init__(
        self,
        root: str | None,
        batch_size: int,
        val_batch_size: int,
        num_train: int | None,
        num_val: int | None,
        size: int | None,
        num_workers: int = 0,
        download: bool = False,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root or os.environ.get("LBGM_DATA") or "data").expanduser()
        self.cache = None if cache is None else Path(cache).expanduser()
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_train = num_train
        self.num_val = num_val
        self.size = size
        self.num_workers = num_workers
        self.download = download
        self.train: Dataset[Any] | None = None
        self.val: Dataset[Any] | None = None

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """What a model has to give: classes of an image or of a pixel, or coordinates."""

    @abstractmethod
    def is_there(self, folder: Path) -> bool:
        """Tell whether ``folder`` holds the data set."""

    @abstractmethod
    def load(self, folder: Path, train: bool) -> Dataset[Any]:
        """Return the training or the validation set."""

    def wanted(self, num_examples: int, train: bool, strata: Tensor | None = None) -> Tensor:
        """Return the indices of the examples to use, drawn as ``draw_subset`` does."""
        count, name = (self.num_train, "num_train") if train else (self.num_val, "num_val")
        return draw_subset(num_examples, count, strata, name)

    def fetch(self, folder: Path) -> None:
        """Download the data set into ``folder``."""
        raise NotImplementedError

    def folder(self) -> Path:
        """Return the folder that holds the data set: ``root``, else ``cache``.

        Raises:
            FileNotFoundError: If neither does. The message says what to download and where to put it.
        """
        folders = [self.root] if self.cache is None else [self.root, self.cache]
        for folder in folders:
            if self.is_there(folder):
                return folder
        raise FileNotFoundError(self._what_to_do())

    def _what_to_do(self) -> str:
        words = (
            f"{self.title} is not in {self.root / self.place}. Get {self.files} from {self.page} and put them there, or"
            f" name the folder that holds `{self.place}` by the argument `root` or by the environment variable"
            " `LBGM_DATA`."
        )
        if self.cache is None:
            return f"{words} It cannot be downloaded by itself."
        return f"{words} Or pass `download=true`, which fetches it into {self.cache}{self.download_needs}."

    def prepare_data(self) -> None:
        if self.download and self.cache is not None and not any(map(self.is_there, (self.root, self.cache))):
            self.cache.mkdir(parents=True, exist_ok=True)
            self.fetch(self.cache)
        self.folder()

    def setup(self, stage: str) -> None:
        if self.train is None:
            folder = self.folder()
            self.train, self.val = self.load(folder, train=True), self.load(folder, train=False)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val, self.val_batch_size, shuffle=False)

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool) -> DataLoader[Any]:
        assert dataset is not None, "Lightning calls `setup` first"
        workers = self.num_workers
        return DataLoader(dataset, batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)
