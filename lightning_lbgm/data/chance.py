"""Chances of clients in a round: numbers that depend on seed, round and client alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_lbgm.core.rng import derive_seed

__all__ = ["client_chances"]


def client_chances(seed: int, purpose: str, round_index: int, num_clients: int) -> Any:
    """Return a number in [0, 1) for each client, shape ``(K,)``, float64.

    That of client k is a pure function of ``(seed, purpose, round_index, k)``, whatever the number of clients.
    """
    return np.random.default_rng(derive_seed(seed, purpose, round_index)).random(num_clients)
