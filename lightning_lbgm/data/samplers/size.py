"""Sampling by size: clients with more examples are drawn more often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_lbgm.data.samplers.base import Draw, Sampler, SamplerState

__all__ = ["SizeSampler", "draw_by_size"]


class SizeSampler(Sampler):
    """Draw without replacement, one client after the other, each time with a probability in proportion to n_k.

    The size then counts in the draw, so that ``LBGMFederated(weighting="uniform")`` goes with it: with
    ``weighting="examples"`` it would count twice.

    Examples:
        >>> from lightning_lbgm.data import Draw
        >>> sizes = {2: 1, 5: 10**9}
        >>> SizeSampler().sample(Draw(0, (2, 5), 1, 10, sizes.__getitem__, seed=0), {})
        [5]
    """

    is_ahead = True

    def sample(self, draw: Draw, state: SamplerState) -> Sequence[int]:
        return draw_by_size(draw, draw.size)


def draw_by_size(draw: Draw, count: int) -> list[int]:
    """Draw clients by n_k without replacement, in the order in which they are drawn; all if there are no more."""
    # Of independent exponential times with the rates n_k, the first is that of client k with the probability
    # n_k / sum(n_j), and those left are again such times: the order of the times is that of the draws.
    rates = np.array([draw.num_examples(client_id) for client_id in draw.clients], dtype=np.float64)
    order = np.argsort(draw.rng.exponential(size=len(rates)) / rates, kind="stable")
    return [draw.clients[position] for position in order[:count].tolist()]
