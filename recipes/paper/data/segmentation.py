"""Images with a class for each pixel: Pascal VOC, and a part of COCO with VOC's classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from recipes.paper.data.base import PaperData
from recipes.paper.data.pictures import decode_all, picture_transform, resize_mask

__all__ = ["COCOSegmentation", "VOCSegmentation"]

# COCO's category id of each of VOC's classes, in VOC's order from 1 (aeroplane) to 20 (tvmonitor).
_COCO_IDS = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)


class _Pairs(Dataset[Any]):
    """Pictures and their masks, decoded when asked for.

    Args:
        pictures: Files of n pictures.
        masks: Files of their masks, of one channel or with a palette.
        size: Width and height to resize to.
        mean: Mean of each channel of the pictures.
        std: Standard deviation of each channel.
        table: The class of each value of a mask, shape ``(256,)``. None: they are classes.
    """

    def __init__(
        self,
        pictures: Sequence[str | Path],
        masks: Sequence[str | Path],
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        table: Tensor | None = None,
    ) -> None:
        self.pictures = pictures
        self.masks = masks
        self.size = size
        self.transform = picture_transform(size, mean, std)
        self.table = table

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.pictures[index]) as picture, Image.open(self.masks[index]) as mask:
            x, values = self.transform(picture.convert("RGB")), F.pil_to_tensor(mask)
        y = resize_mask(values, self.size).squeeze(0).long()
        return x, y if self.table is None else self.table[y]


class _Segmentation(PaperData):
    """What the sets of masks share."""

    num_classes: ClassVar[int] = 21
    ignore_index: ClassVar[int] = 255
    size: int
    in_memory: bool

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def pick(self, pairs: _Pairs, train: bool) -> Dataset[Any]:
        """Return the examples wanted, in memory where that is asked for."""
        chosen = self.wanted(len(pairs), train).tolist()
        return decode_all(Subset(pairs, chosen)) if self.in_memory else Subset(pairs, chosen)


class VOCSegmentation(_Segmentation):
    """Pascal VOC 2012's segmentation (Everingham et al., 2010): 1,464 images to train on, 1,449 to validate on.

    An item is ``(x, y)``: x ``float32`` of the shape ``(3, size, size)``, normalised; y ``int64`` of the shape
    ``(size, size)``: 0 background, 1 to 20 the classes, 255 the borders of objects, which a loss has to leave out
    (``ignore_index=255``). Images become square; masks are resized by nearest neighbours.

    The files lie in ``root/VOCdevkit/VOC2012``. Means and deviations are those that the paper's authors publish with
    their code.

    Args:
        root: Folder that holds the data set. None: the environment variable ``LBGM_DATA``, else ``data``. It is never
            written to.
        batch_size: Size of the local batches; at least a client's examples means full-batch steps.
        val_batch_size: Size of the validation batches.
        num_train: Use only so many training examples: always the same, drawn at random. None: all.
        num_val: The same of the validation examples.
        size: Width and height to resize to.
        in_memory: Whether to decode all images once, at the start: 1 GB at size 128. Else they are decoded each time
            they are asked for.
        num_workers: Processes that decode images, where they are not in memory.
        download: Whether to download into ``cache`` what is missing.
        cache: Folder to download into.
    """

    title = "Pascal VOC 2012"
    place = "VOCdevkit/VOC2012"
    files = (
        "VOCtrainval_11-May-2012.tar (its folder VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and"
        " ImageSets/Segmentation)"
    )
    page = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    download_needs = " (2 GB)"
    mean, std = (0.4568, 0.4432, 0.4083), (0.2440, 0.2414, 0.2591)

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 60000,
        val_batch_size: int = 50,
        num_train: int | None = None,
        num_val: int | None = None,
        size: int = 128,
        in_memory: bool = False,
        num_workers: int = 0,
        download: bool = False,
        cache: str = "~/.cache/lightning_lbgm",
    ) -> None:
        super().__init__(root, batch_size, val_batch_size, num_train, num_val, size, num_workers, download, cache)
        self.in_memory = in_memory

    def fetch(self, folder: Path) -> None:
        datasets.VOCSegmentation(str(folder), download=True)

    def is_there(self, folder: Path) -> bool:
        names = (
            "JPEGImages",
            "SegmentationClass",
            "ImageSets/Segmentation/train.txt",
            "ImageSets/Segmentation/val.txt",
        )
        return all((folder / self.place / name).exists() for name in names)

    def load(self, folder: Path, train: bool) -> Dataset[Any]:
        found = datasets.VOCSegmentation(str(folder), image_set="train" if train else "val")
        return self.pick(_Pairs(found.images, found.masks, self.size, self.mean, self.std), train)


class COCOSegmentation(_Segmentation):
    """A part of COCO 2017 (Lin et al., ECCV 2014) with VOC's 20 classes, to stand in for VOC: 100 + 100 images.

    An item is as of ``VOCSegmentation``: x ``float32`` of the shape ``(3, size, size)``, y ``int64`` of the shape
    ``(size, size)`` from 0 to 20. All that is none of VOC's classes is background; no pixel is to be ignored. Cow,
    sheep and tvmonitor do not occur in the training images. Both sets are in memory.

    The files lie in ``root/coco_seg``: ``train/images/*.jpg`` and ``train/masks/*.png`` by the same names, whose pixels
    are COCO's category ids (0: none), and the same in ``val``. Means and deviations are those that the paper's authors
    publish with their code, of the whole of COCO.

    Args:
        root: Folder that holds the data set. None: the environment variable ``LBGM_DATA``, else ``data``. It is never
            written to.
        batch_size: Size of the local batches; at least a client's examples means full-batch steps.
        val_batch_size: Size of the validation batches.
        num_train: Use only so many training examples: always the same, drawn at random. None: all.
        num_val: The same of the validation examples.
        size: Width and height to resize to.
    """

    title = "The part of COCO"
    place = "coco_seg"
    files = (
        "images with panoptic masks, as train/images/NAME.jpg and train/masks/NAME.png (one channel of category ids),"
        " and the same in val,"
    )
    page = "https://cocodataset.org (for the paper's own set use VOCSegmentation)"
    mean, std = (0.4701, 0.4469, 0.4076), (0.2463, 0.2424, 0.2596)
    in_memory = True

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 60000,
        val_batch_size: int = 50,
        num_train: int | None = None,
        num_val: int | None = None,
        size: int = 128,
    ) -> None:
        super().__init__(root, batch_size, val_batch_size, num_train, num_val, size)

    def is_there(self, folder: Path) -> bool:
        return all(_mask_files(folder / self.place / part) for part in ("train", "val"))

    def load(self, folder: Path, train: bool) -> Dataset[Any]:
        table = torch.zeros(256, dtype=torch.int64)
        table[list(_COCO_IDS)] = torch.arange(1, 21)
        masks = _mask_files(folder / self.place / ("train" if train else "val"))
        pictures = [mask.parent.parent / "images" / f"{mask.stem}.jpg" for mask in masks]
        return self.pick(_Pairs(pictures, masks, self.size, self.mean, self.std, table), train)


def _mask_files(folder: Path) -> list[Path]:
    return sorted((folder / "masks").glob("*.png"))
