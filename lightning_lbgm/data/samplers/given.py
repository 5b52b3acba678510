"""A sampler that a user gives as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_lbgm.core.describe import describe
from lightning_lbgm.core.validation import class_hint
from lightning_lbgm.data.samplers.base import Draw, Sampler, SamplerState

__all__ = ["GivenSampler", "as_sampler"]


class GivenSampler(Sampler):
    """A sampler made of a function.

    Args:
        function: Called as ``function(round_index, clients, rng)``, with the available clients in increasing order and
            ``Draw.rng``; returns the cohort.
    """

    def __init__(self, function: Callable[..., Sequence[int]]) -> None:
        self.function = function

    def sample(self, draw: Draw, state: SamplerState) -> Sequence[int]:
        return self.function(draw.round_index, draw.clients, draw.rng)

    def __repr__(self) -> str:
        """Show the function."""
        return describe(self.function)


def as_sampler(value: Any) -> Sampler | None:
    """Return a sampler as it is, a function as a sampler, and None for None.

    Raises:
        TypeError: If it is something else.
    """
    if value is None or isinstance(value, Sampler):
        return value
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            "`sampler` must be a `Sampler` such as `PowerOfChoice(d=20)`, a function `(round, clients, rng) -> cohort`,"
            f" or None for uniform cohorts; got {value!r}.{class_hint(value, Sampler)}"
        )
    return GivenSampler(value)
