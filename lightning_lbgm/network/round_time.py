"""Time of a synchronous round: each client downloads, computes and uploads, and the server waits for the last one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ClientTime", "RoundTime"]


@dataclass(frozen=True)
class ClientTime:
    """The seconds of one client in one round.

    Attributes:
        client_id: The client.
        download: Until it has the model.
        compute: Of its local steps.
        upload: Until the server has its update.
    """

    client_id: int
    download: float
    compute: float
    upload: float

    @property
    def seconds(self) -> float:
        """From the start of the round until the server has its update."""
        return self.download + self.compute + self.upload


@dataclass(frozen=True)
class RoundTime:
    """The time of one round. Clients work at the same time, and the server has room for all of them.

    Attributes:
        clients: Those whose updates the server used, in any order.
        waited_until: The deadline in seconds, if the server waited for somebody until then; else 0.

    Examples:
        >>> time = RoundTime((ClientTime(0, 1.0, 2.0, 1.0), ClientTime(3, 1.0, 5.0, 4.0)))
        >>> time.seconds, time.straggler, time.upload_share
        (10.0, 3, 0.4)
    """

    clients: Sequence[ClientTime]
    waited_until: float = 0.0

    @functools.cached_property
    def last(self) -> ClientTime | None:
        """The client that the server had last; of several the one with the smallest number. None if there is none."""
        return max(self.clients, key=lambda client: (client.seconds, -client.client_id), default=None)

    @property
    def seconds(self) -> float:
        """Until the server could make its step; 0 if nobody took part."""
        last = self.last
        return max(self.waited_until, 0.0 if last is None else last.seconds)

    @property
    def straggler(self) -> float:
        """The number of the client that the server had last; NaN if there is none."""
        return math.nan if self.last is None else self.last.client_id

    @property
    def download_share(self) -> float:
        """Share of the round in which the straggler downloads, in [0, 1]; NaN if there is none, or no time passes."""
        return self._share(None if self.last is None else self.last.download)

    @property
    def compute_share(self) -> float:
        """Share of the round in which the straggler computes."""
        return self._share(None if self.last is None else self.last.compute)

    @property
    def upload_share(self) -> float:
        """Share of the round in which the straggler uploads."""
        return self._share(None if self.last is None else self.last.upload)

    def _share(self, part: float | None) -> float:
        return part / self.seconds if part is not None and self.seconds > 0 else math.nan
