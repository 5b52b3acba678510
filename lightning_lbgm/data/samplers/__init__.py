"""Samplers: the rules by which a round's cohort is drawn from the clients that are available."""

from lightning_lbgm.data.samplers.base import Draw, Sampler, SamplerState
from lightning_lbgm.data.samplers.given import GivenSampler, as_sampler
from lightning_lbgm.data.samplers.power_of_choice import PowerOfChoice
from lightning_lbgm.data.samplers.size import SizeSampler
from lightning_lbgm.data.samplers.uniform import UniformSampler

__all__ = [
    "Draw",
    "GivenSampler",
    "PowerOfChoice",
    "Sampler",
    "SamplerState",
    "SizeSampler",
    "UniformSampler",
    "as_sampler",
]
