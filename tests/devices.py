"""The devices that tests of accelerators run on: the CPU, an emulated one, and the accelerator if there is one.

``pytest -m gpu`` runs them on the accelerator alone, as ``make gpu`` does. ``LBGM_TEST_DEVICE`` names another one for
it, such as ``cuda:1`` or ``mps``; with ``cpu`` what ``make gpu`` does is tried without an accelerator.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from far_device import FAR, FarAccelerator, FarTensor, far_device

# cuBLAS reads it at its first call; without it torch refuses matrix products with `Trainer(deterministic=True)`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Device:
    """A device to test on.

    Attributes:
        torch: The device.
        is_real: Whether it is no emulation.
    """

    torch: torch.device
    is_real: bool = True

    def trainer_settings(self) -> dict[str, Any]:
        """Return ``Trainer(accelerator=..., devices=...)``."""
        if not self.is_real:
            return {"accelerator": FarAccelerator(), "devices": 1}
        if self.torch.type == "cuda":
            return {"accelerator": "gpu", "devices": [self.torch.index or 0]}
        return {"accelerator": self.torch.type, "devices": 1}

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.torch)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.torch.type

    def entered(self) -> AbstractContextManager[None]:
        return nullcontext() if self.is_real else far_device()


def near(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU, also after the emulation has ended."""
    return tensor.near if isinstance(tensor, FarTensor) else tensor.detach().cpu()


def find_accelerator() -> torch.device | None:
    """Return the device that ``make gpu`` tests: that of ``LBGM_TEST_DEVICE``, else the first CUDA GPU."""
    named = os.environ.get("LBGM_TEST_DEVICE")
    if named:
        return torch.device(named)
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


ACCELERATOR = find_accelerator()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(ACCELERATOR is None, reason="torch finds no accelerator")]
GPU = pytest.param(Device(ACCELERATOR or torch.device("cuda", 0)), id="gpu", marks=ON_GPU)
DEVICES = [
    pytest.param(Device(torch.device("cpu")), id="cpu"),
    pytest.param(Device(FAR, is_real=False), id="emulated"),
    GPU,
]
REAL_DEVICES = [DEVICES[0], GPU]
