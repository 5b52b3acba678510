"""What the strategies of both ends have in common: rounds, and what callbacks of a federation ask for."""

from __future__ import annotations

from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.strategy.rounds import RoundsStrategy
from lightning_lbgm.strategy.session import Session

__all__ = ["EngineStrategy"]


class EngineStrategy(RoundsStrategy):
    """Run rounds of a federation that goes beyond this process.

    Args:
        session: The federation, as this end has it.

    Attributes:
        uplink: The stages.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.uplink = session.settings.uplink

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in a Lightning epoch."""
        return self.session.settings.rounds_per_epoch

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""
        return self.session.ledger
