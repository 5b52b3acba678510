"""Blocks of a vector that a cache holds, so that what is computed from one on the way never goes through memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ACCELERATOR", "CACHED", "block_size", "scratch"]

CACHED = 2**17
"""Entries that a CPU's cache holds: half a MB in float32."""
ACCELERATOR = 2**22


def block_size(tensor: Tensor) -> int:
    """Return how many entries to take at a time, a multiple of 8.

    On a CPU a temporary of M entries costs several passes over memory, for a large one is given back to the system and
    comes as new pages. On an accelerator blocks only bound the memory.
    """
    return CACHED if tensor.device.type == "cpu" else ACCELERATOR


class _Kept(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[tuple[str, type[Any]], NDArray[Any]] = {}


_kept = _Kept()


def scratch(name: str, count: int, dtype: type[Any]) -> NDArray[Any]:
    """Return memory of a block for what is computed on the way: the same for the same name and thread.

    Memory that is asked for anew comes as new pages, which take longer than a pass over them.

    Args:
        name: Of what is kept there, until the next call with it.
        count: Entries, at most ``CACHED`` or a few more. Their values are undefined.
        dtype: Their NumPy type.
    """
    array = _kept.arrays.get((name, dtype))
    if array is None or len(array) < count:
        array = _kept.arrays[name, dtype] = np.empty(count, dtype)
    return array[:count]
