"""The device that is measured: the CPU, unless ``python -m benchmarks --device`` names another one."""

from __future__ import annotations

from typing import Any

import torch

_device = torch.device("cpu")


def use(name: str) -> None:
    """Measure on another device, such as ``"cuda"``."""
    global _device
    _device = torch.device(name)


def current() -> torch.device:
    """Return the device."""
    return _device


def trainer_settings() -> dict[str, Any]:
    """Return ``Trainer(accelerator=..., devices=...)`` for it."""
    if _device.type == "cuda":
        return {"accelerator": "gpu", "devices": [_device.index or 0]}
    return {"accelerator": _device.type, "devices": 1}


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)
    elif _device.type == "mps":
        torch.mps.synchronize()
