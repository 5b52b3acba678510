"""Uniform sampling: every available client is as likely as any other."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lbgm.data.cohort import sample_cohort
from lightning_lbgm.data.samplers.base import Draw, Sampler, SamplerState

__all__ = ["UniformSampler"]


class UniformSampler(Sampler):
    """Draw uniformly without replacement: what happens without a sampler, with the same cohorts.

    Examples:
        >>> from lightning_lbgm.data import Draw
        >>> UniformSampler().sample(Draw(0, (2, 5, 7), 3, 10, lambda client_id: 1, seed=0), {})
        (2, 5, 7)
    """

    is_ahead = True

    def sample(self, draw: Draw, state: SamplerState) -> Sequence[int]:
        return sample_cohort(draw.num_clients, draw.size, draw.seed, draw.round_index, draw.clients)
