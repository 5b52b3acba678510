"""Ledger of the bits sent over a run, and of its time on a network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_lbgm.reports.reports import RoundReport

__all__ = ["Ledger"]

_FLOAT_BITS = 32
"""A "float" in the literature's counts of floats sent."""


@dataclass
class Ledger:
    """Totals over a run: bits are exact integers.

    Attributes:
        uplink_bits: Sent by clients.
        dense_uplink_bits: What FedAvg would have sent: every update in full, from the same clients.
        downlink_bits: Sent by the server.
        dense_downlink_bits: What FedAvg's server would have sent: the whole model, to the same clients.
        seconds: What the rounds took on the network, those with a clock.

    Examples:
        >>> Ledger(uplink_bits=10, dense_uplink_bits=40).savings
        0.75
    """

    uplink_bits: int = 0
    dense_uplink_bits: int = 0
    downlink_bits: int = 0
    dense_downlink_bits: int = 0
    seconds: float = 0.0

    @staticmethod
    def from_state(state: dict[str, Any]) -> Ledger:
        """Go on from ``state_dict``, also of a run from before there were stages on the downlink, or clocks."""
        return Ledger(**{"dense_downlink_bits": state["downlink_bits"], **state})

    def record(self, report: RoundReport) -> None:
        """Add one round."""
        for client in report.chosen:
            self.uplink_bits += client.uplink_bits
            self.dense_uplink_bits += client.dense_bits
            self.downlink_bits += client.downlink_bits
            self.dense_downlink_bits += client.dense_downlink_bits
        if report.time is not None:
            self.seconds += report.time.seconds

    @property
    def savings(self) -> float:
        """One minus the uplink so far over what FedAvg would have sent by now; 0 before anything was sent."""
        return 1 - self.uplink_bits / self.dense_uplink_bits if self.dense_uplink_bits else 0.0

    @property
    def total_bits(self) -> int:
        """Sent in both directions."""
        return self.uplink_bits + self.downlink_bits

    @property
    def total_savings(self) -> float:
        """One minus all that was sent so far, in both directions, over what FedAvg would have sent by now; else 0."""
        dense = self.dense_uplink_bits + self.dense_downlink_bits
        return 1 - self.total_bits / dense if dense else 0.0

    @property
    def uplink_floats(self) -> float:
        """Uplink so far in floats of 32 bits, the unit of the paper's figures."""
        return self.uplink_bits / _FLOAT_BITS

    def state_dict(self) -> dict[str, Any]:
        """Return the totals as built-ins; without a clock there are no seconds, as in earlier versions."""
        totals = asdict(self)
        if not self.seconds:
            del totals["seconds"]
        return totals
