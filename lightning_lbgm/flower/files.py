"""State files: written whole or not at all, and read without running anything that they say."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["dump", "parse", "read_file", "write_file"]


def dump(state: dict[str, Any]) -> bytes:
    """Return a state of built-ins and tensors as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def parse(data: bytes) -> dict[str, Any]:
    """Undo ``dump``, with tensors on the CPU.

    Raises:
        Exception: If the bytes are damaged, or hold anything else than built-ins and tensors.
    """
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"a state is a dict, not a {type(state).__name__}")
    return state


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it has the old or the new content whenever the machine stops.

    Args:
        path: The file, readable by its owner alone: it holds what a node trained.
        data: The content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_file(path: Path) -> bytes | None:
    """Return a file's content; None if there is none."""
    return path.read_bytes() if path.exists() else None
