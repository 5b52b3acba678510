"""Blocks of a vector that a cache holds, so that what is computed from one on the way never goes through memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["ACCELERATOR", "CACHED", "block_size"]

CACHED = 2**17
"""Entries that a CPU's cache holds: half a MB in float32."""
ACCELERATOR = 2**22


def block_size(tensor: Tensor) -> int:
    """Return how many entries to take at a time, a multiple of 8.

    On a CPU a temporary of M entries costs several passes over memory, for a large one is given back to the system and
    comes as new pages. On an accelerator blocks only bound the memory.
    """
    return CACHED if tensor.device.type == "cpu" else ACCELERATOR
