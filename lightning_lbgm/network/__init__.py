"""Time on a network: what a synchronous round would take in the world, from the bytes of its messages."""

from lightning_lbgm.network.clock import NetworkClock, as_network
from lightning_lbgm.network.links import Link, Links, Plan
from lightning_lbgm.network.presets import PRESETS, Preset
from lightning_lbgm.network.replay import replay
from lightning_lbgm.network.round_time import ClientTime, RoundTime
from lightning_lbgm.network.units import parse_rate, parse_seconds

__all__ = [
    "PRESETS",
    "ClientTime",
    "Link",
    "Links",
    "NetworkClock",
    "Plan",
    "Preset",
    "RoundTime",
    "as_network",
    "parse_rate",
    "parse_seconds",
    "replay",
]
