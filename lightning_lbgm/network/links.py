"""Links of clients to the server: their times in a round, as they were and as they are planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_lbgm.network.round_time import ClientTime, RoundTime

__all__ = ["Link", "Links", "Plan"]


@dataclass(frozen=True)
class Link:
    """One client's network and computer.

    Attributes:
        uplink: Bits a second to the server.
        downlink: Bits a second from the server.
        latency: Seconds of a round trip.
        step: Seconds of a local step; None if they are measured.
        slowness: What measured seconds are multiplied by.
    """

    uplink: float
    downlink: float
    latency: float
    step: float | None
    slowness: float = 1.0

    def time(
        self, client_id: int, downlink_bits: float, steps: int, uplink_bits: float, measured: float = math.nan
    ) -> ClientTime:
        """Return the client's time in a round.

        Args:
            client_id: The client.
            downlink_bits: Bits that it receives.
            steps: Local steps that it makes.
            uplink_bits: Bits that it sends.
            measured: Seconds of a step that were measured, for a link that has none of its own.
        """
        step = measured * self.slowness if self.step is None else self.step
        return ClientTime(
            client_id,
            self.latency + downlink_bits / self.downlink,
            steps * step if steps else 0.0,
            self.latency + uplink_bits / self.uplink,
        )


class Links:
    """The links of a federation's clients, by their numbers.

    Args:
        make: Returns a client's link.
        measures: Whether the compute of some clients is measured.
        planned: Shares of the whole model that messages to and from a client are expected to take.

    Attributes:
        measures: Whether the compute of some clients is measured.
    """

    def __init__(self, make: Callable[[int], Link], measures: bool, planned: tuple[float, float]) -> None:
        self.measures = measures
        self._make = make
        self._planned = planned
        self._links: dict[int, Link] = {}

    def __getitem__(self, client_id: int) -> Link:
        link = self._links.get(client_id)
        if link is None:
            link = self._links[client_id] = self._make(client_id)
        return link

    def round_time(
        self, parts: Iterable[tuple[int, int, int, int]], measured: float = math.nan, waited_until: float = 0.0
    ) -> RoundTime:
        """Return the time of a round.

        Args:
            parts: Client, bits received, local steps and bits sent of each client whose update the server used.
            measured: Seconds of a local step that were measured.
            waited_until: The deadline in seconds, if the server waited until then; else 0.
        """
        clients = tuple(self[part[0]].time(*part, measured=measured) for part in parts)
        return RoundTime(clients, waited_until)

    def plan(self, downlink_bits: int, uplink_bits: int) -> Plan | None:
        """Return the times that can be told before training; None if computes are measured.

        Args:
            downlink_bits: Bits of the whole model.
            uplink_bits: Bits of a whole update.
        """
        if self.measures:
            return None
        down, up = self._planned
        return Plan(self, down * downlink_bits, up * uplink_bits)


@dataclass(frozen=True)
class Plan:
    """Times of clients as they can be told before training, when nobody knows how many bytes will be sent.

    Attributes:
        links: The clients' links.
        downlink_bits: Bits that a client is expected to receive.
        uplink_bits: Bits that it is expected to send.
    """

    links: Links
    downlink_bits: float
    uplink_bits: float

    def seconds(self, client_id: int, steps: int) -> float:
        """Return the seconds that a client is expected to need for a round."""
        return self.links[client_id].time(client_id, self.downlink_bits, steps, self.uplink_bits).seconds
