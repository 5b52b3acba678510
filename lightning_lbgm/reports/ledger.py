"""Ledger of the bits sent over a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lightning_lbgm.reports.reports import RoundReport

__all__ = ["Ledger"]

_FLOAT_BITS = 32
"""A "float" in the literature's counts of floats sent."""


@dataclass
class Ledger:
    """Totals over a run, in bits, exact integers.

    Attributes:
        uplink_bits: Sent by clients.
        dense_uplink_bits: What FedAvg would have sent: every update in full, from the same clients.
        downlink_bits: Sent by the server.

    Examples:
        >>> Ledger(uplink_bits=10, dense_uplink_bits=40).savings
        0.75
    """

    uplink_bits: int = 0
    dense_uplink_bits: int = 0
    downlink_bits: int = 0

    def record(self, report: RoundReport) -> None:
        """Add one round."""
        for client in report.clients:
            self.uplink_bits += client.uplink_bits
            self.dense_uplink_bits += client.dense_bits
            self.downlink_bits += client.downlink_bits

    @property
    def savings(self) -> float:
        """One minus the uplink so far over what FedAvg would have sent by now; 0 before anything was sent."""
        return 1 - self.uplink_bits / self.dense_uplink_bits if self.dense_uplink_bits else 0.0

    @property
    def uplink_floats(self) -> float:
        """Uplink so far in floats of 32 bits, the unit of the paper's figures."""
        return self.uplink_bits / _FLOAT_BITS

    def state_dict(self) -> dict[str, int]:
        """Return the totals as built-ins."""
        return asdict(self)
