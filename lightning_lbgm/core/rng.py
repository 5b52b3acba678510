"""Random seeds as a pure function of (seed, purpose, round, client), so that no order of execution changes them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "generator", "isolated_rng", "seed_global_rng"]


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Hash a seed, a purpose and indices into a new seed, independent of all others.

    Args:
        seed: The run's seed.
        purpose: What the randomness is for, such as ``"cohort"``.
        *indices: For instance the round and the client.

    Returns:
        An integer in ``[0, 2**63)``.

    Examples:
        >>> derive_seed(0, "cohort", 3) == derive_seed(0, "cohort", 3)
        True
        >>> derive_seed(0, "cohort", 3) == derive_seed(0, "batches", 3)
        False
    """
    text = repr((int(seed), purpose, tuple(map(int, indices)))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU generator seeded by ``derive_seed``."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *indices))


def seed_global_rng(seed: int, device: torch.device | None = None) -> None:
    """Seed Python's, NumPy's and torch's global generators (and the CUDA device's, if one is given)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: with CUDA built in but unused, it formats a stack trace at every call.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def isolated_rng(device: torch.device | None = None) -> Iterator[None]:
    """Give the global generators back as they were: what runs inside cannot disturb what runs after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
