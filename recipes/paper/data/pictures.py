"""Photographs: from image files to normalised tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ["decode_all", "picture_transform", "read_mosaic", "resize_mask"]


def picture_transform(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    """Return a transform from pictures (``PIL`` or ``uint8`` tensors) to tensors, resized and normalised.

    Args:
        size: Width and height that pictures get; their proportions change with it.
        mean: Mean of each channel, of values scaled into [0, 1].
        std: Standard deviation of each channel.

    Returns:
        A transform that gives ``float32`` of the shape ``(..., channels, size, size)``.
    """
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((size, size), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
            v2.ToPureTensor(),
        ]
    )


def resize_mask(mask: Tensor, size: int) -> Tensor:
    """Resize classes of pixels, ``uint8`` of the shape ``(1, height, width)``, by nearest neighbours."""
    # About a pixel's centre, as pictures are resized too: plain NEAREST takes the neighbour of its corner.
    return F.resize(mask, [size, size], interpolation=v2.InterpolationMode.NEAREST_EXACT)


def read_mosaic(path: Path, side: int) -> Tensor:
    """Cut a file of square pictures side by side, row by row, into them.

    Args:
        path: An image file.
        side: Width and height of a picture in pixels.

    Returns:
        ``uint8`` of the shape ``(rows * columns, 3, side, side)``.
    """
    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))
    rows, columns = grid.shape[0] // side, grid.shape[1] // side
    grid = grid.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(grid.reshape(-1, 3, side, side).copy())


def decode_all(dataset: Dataset[Any]) -> TensorDataset:
    """Decode every example, tensors of one shape, once: local batches are then drawn in bulk."""
    num_examples = len(dataset)  # type: ignore[arg-type]
    columns = [torch.empty(num_examples, *tensor.shape, dtype=tensor.dtype) for tensor in dataset[0]]
    for index in range(num_examples):
        for column, tensor in zip(columns, dataset[index]):
            column[index] = tensor
    return TensorDataset(*columns)
