"""Seam of a sampler: what it draws a cohort from, and what it may remember of earlier rounds."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lbgm.core.describe import describe_call
from lightning_lbgm.core.rng import derive_seed

__all__ = ["Draw", "Sampler", "SamplerState"]

SamplerState = dict[str, Any]
"""What a sampler remembers: built-ins and tensors."""


@dataclass(frozen=True)
class Draw:
    """What the cohort of a round is drawn from.

    Attributes:
        round_index: The round, from 0.
        clients: The clients that are available, at least one, in increasing order.
        size: How many are wanted. There may be fewer clients.
        num_clients: K, available or not.
        num_examples: Returns n_k, a client's number of examples.
        seed: The run's seed.
    """

    round_index: int
    clients: tuple[int, ...]
    size: int
    num_clients: int
    num_examples: Callable[[int], int]
    seed: int

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        """A NumPy generator, fresh at the start of the draw: a pure function of seed and round."""
        return np.random.default_rng(derive_seed(self.seed, "sampler", self.round_index))


class Sampler(ABC):
    """A rule by which the cohort of a round is drawn.

    Every process draws for itself, or takes what the first one has drawn; so draw from ``draw.rng`` alone. A sampler
    holds settings only. What it remembers is a state of the federation's, which stands in checkpoints and is put back
    when a round breaks off.

    Attributes:
        is_ahead: Whether a cohort is known before the round before it is over, because ``sample`` looks at ``draw``
            alone: workers of a DataLoader then fetch ahead into the next round.
    """

    is_ahead = False

    def init(self) -> SamplerState:
        """Make the state that a run starts with."""
        return {}

    def check_size(self, size: int) -> None:  # noqa: B027 (most samplers draw any number)
        """Refuse, with a ``ValueError``, a number of clients that cannot be drawn.

        Args:
            size: Clients wanted in each round.
        """

    @abstractmethod
    def sample(self, draw: Draw, state: SamplerState) -> Sequence[int]:
        """Draw a cohort.

        Args:
            draw: What it is drawn from.
            state: The state, not to be changed.

        Returns:
            Clients of ``draw.clients``, at most ``draw.size`` of them, each once, in any order.
        """

    def end_round(self, state: SamplerState, losses: Mapping[int, float]) -> SamplerState:
        """Learn from a round.

        Args:
            state: The state before it, not to be changed: a round may be taken back.
            losses: Of each client whose update was due, the mean loss over its local steps; NaN if it has none.

        Returns:
            The new state, or the same one if nothing is learned.
        """
        return state

    def __repr__(self) -> str:
        """Show the constructor call, as far as arguments are attributes."""
        return describe_call(self)
