"""LRU eviction of client state: whose state both ends forget if they can remember only so many clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["LeastRecentlyUsed"]


class LeastRecentlyUsed:
    """The clients whose state is kept, a function of the cohorts alone: every process gets the same answer.

    After a round they are the last ``capacity`` of the old order and the cohort behind it. Clients of the old order
    that are neither among them nor in the cohort are forgotten before the round; clients of the cohort that are not
    among them right after their turn.

    Args:
        capacity: How many. None: all, and no order is kept.
        order: The clients, least recently used first.

    Examples:
        >>> recency = LeastRecentlyUsed(2, [1, 2])
        >>> recency.begin([3]), recency.order
        ([1], [1, 2])
        >>> recency.finish()
        >>> recency.order
        [2, 3]
    """

    def __init__(self, capacity: int | None, order: Iterable[int] = ()) -> None:
        self.capacity = capacity
        self.order = list(order)
        self._next = self.order
        self._leaving: set[int] = set()

    def begin(self, cohort: Sequence[int]) -> list[int]:
        """Return the clients to forget before a round."""
        if self.capacity is None:
            return []
        taking_part = set(cohort)
        self._next = [*(client for client in self.order if client not in taking_part), *cohort][-self.capacity :]
        kept = set(self._next)
        self._leaving = taking_part - kept
        return [client for client in self.order if client not in kept and client not in taking_part]

    def is_forgotten_after_turn(self, client_id: int) -> bool:
        """Whether a client of the cohort is to be forgotten right after its turn."""
        return client_id in self._leaving

    def undo(self, order: list[int]) -> None:
        """Take a round back, at whose start ``order`` was this."""
        self.order = self._next = order
        self._leaving = set()

    def finish(self) -> None:
        """End the round; until then ``order`` is that of its start."""
        self.order, self._leaving = self._next, set()
