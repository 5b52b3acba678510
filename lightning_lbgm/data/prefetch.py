"""Prefetch by worker processes, from one client into the next and from one round into the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["Prefetch", "Request"]

Request = tuple[int, list[int]]
"""A seed for random transforms, and example indices."""

_Place = tuple[int, tuple[int, ...]]  # a round and its cohort
_Requests = Callable[[int, int], list[Request]]
_NextCohort = Callable[[int, tuple[int, ...]], "tuple[int, ...] | None"]


class _Upcoming:
    """The batch sampler of the workers: requests from ``start`` on, as long as the round to come is known."""

    def __init__(self, requests: _Requests, next_cohort_after: _NextCohort) -> None:
        self.requests = requests
        self.next_cohort_after = next_cohort_after
        self.start: _Place = (0, ())
        self.sizes: deque[list[int]] = deque()  # of each client asked for and not yet streamed: its batches' sizes

    def __iter__(self) -> Iterator[Request]:
        round_index, cohort = self.start
        while True:
            for client_id in cohort:
                requests = self.requests(round_index, client_id)
                self.sizes.append([len(indices) for _, indices in requests])
                yield from requests
            following = self.next_cohort_after(round_index, cohort)
            if not following:
                return
            round_index, cohort = round_index + 1, following


class Prefetch:
    """Ask a DataLoader's workers for the batches of a round, and at its end for those of the round to come.

    Which batches those are is known beforehand, because they are a pure function of round and client. If the next round
    turns out to be another one, as after a resume, or the round at hand breaks off, what was loaded ahead is dropped.

    Args:
        requests: Returns a client's requests in a round, in order.
        next_cohort_after: Returns the cohort of the round after ``(round_index, cohort)``, or None if it is unknown.
        make_loader: Makes the DataLoader, with persistent workers, from a batch sampler of requests.
    """

    def __init__(
        self, requests: _Requests, next_cohort_after: _NextCohort, make_loader: Callable[[Any], DataLoader[Any]]
    ) -> None:
        # Nothing here may refer to itself in a circle: workers end when the last reference goes, not at some later
        # collection.
        self._upcoming = _Upcoming(requests, next_cohort_after)
        self._loader = make_loader(self._upcoming)
        self._fetched: Iterator[Any] = iter(())
        self._next: _Place | None = None  # what the workers go on with

    def stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[tuple[Any, int]]]]:
        """Yield each client with its batches and their sizes; batches not taken are skipped."""
        here = (round_index, tuple(cohort))
        if not cohort:  # a process without a client in this round
            return
        if self._next != here:
            self._upcoming.start = here
            self._upcoming.sizes.clear()
            self._fetched = iter(self._loader)  # the same workers; what they had loaded is dropped
        self._next = None  # until the round is through
        for client_id in cohort:
            # A client's first request is sure to have been made once its first batch is here.
            first = next(self._fetched)
            batches = _batches(first, self._fetched, self._upcoming.sizes.popleft())
            yield client_id, batches
            for _ in batches:  # what the client did not take
                pass
        following = self._upcoming.next_cohort_after(*here)
        self._next = None if following is None else (round_index + 1, following)

    def rest(self) -> None:
        """End the workers; the next ``stream`` starts others."""
        self._fetched, self._next = iter(()), None
        self._loader._iterator = None


def _batches(first: Any, fetched: Iterator[Any], sizes: list[int]) -> Iterator[tuple[Any, int]]:
    yield first, sizes[0]
    for size in sizes[1:]:
        yield next(fetched), size
