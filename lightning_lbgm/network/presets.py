"""Presets of networks, with the published source of each number; docs/network.md says more about them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A network that has been measured.

    Attributes:
        title: What it is.
        uplink: From a client to the server.
        downlink: From the server to a client.
        latency: Round trip, as ``ping`` shows it.
        source: Where the numbers are from; "assumed" if from nowhere.
    """

    title: str
    uplink: str
    downlink: str
    latency: str
    source: str


PRESETS = {
    "lte": Preset(
        "LTE",
        uplink="7.4 Mbit/s",
        downlink="21.7 Mbit/s",
        latency="46 ms",
        source="Opensignal, The State of Mobile Network Experience, May 2019: means of the United Kingdom, before 5G",
    ),
    "home_broadband": Preset(
        "home broadband",
        uplink="18.4 Mbit/s",
        downlink="69.4 Mbit/s",
        latency="10 ms",
        source="Ofcom, UK Home Broadband Performance, September 2023: medians; latency: Ookla, Speedtest Global Index,"
        " November 2022, fixed networks of the world",
    ),
    "data_centre": Preset(
        "data centre",
        uplink="10 Gbit/s",
        downlink="10 Gbit/s",
        latency="0.5 ms",
        source="assumed: a 10 Gbit/s port for each machine, and a round trip below a millisecond within one place",
    ),
}
"""Networks by the name that ``NetworkClock(preset=...)`` takes."""
