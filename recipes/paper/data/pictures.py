"""Photographs: from image files to normalised tensors, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

__all__ = ["decode_all", "picture_transform"]


def picture_transform(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    """Return a transform from pictures (``PIL`` or ``uint8`` tensors) to tensors, resized and normalised.

    Where it gets a ``tv_tensors.Mask`` beside the picture, that is resized too, by nearest neighbours, so that no class
    comes up that was not there, and nothing else is done to it.

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


def decode_all(dataset: Dataset[Any]) -> TensorDataset:
    """Decode every example once: local batches are then drawn in bulk."""
    items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    columns: list[Tensor] = [torch.stack(column) for column in zip(*items)]
    return TensorDataset(*columns)
