"""Background thread that sends logged values, so that no round waits for a logger."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Entry", "Sender"]

_INTERVAL = 0.5  # seconds that an entry waits for others at most
_CAPACITY = 1000  # entries that wait at most
_BATCH_VALUES = 1000  # MLflow's limit of metrics in a request
_ATTEMPTS = 3  # batches in a row that fail before nothing more is tried
_PATIENCE = 30.0  # seconds without an answer after which nothing more is tried


@dataclass(frozen=True)
class Entry:
    """Metrics of one step.

    Attributes:
        step: The step.
        metrics: Values by name.
        time_ms: When they were logged, in milliseconds since 1970.
    """

    step: int
    metrics: dict[str, float]
    time_ms: int = field(default_factory=lambda: int(1000 * time.time()))


class Sender:
    """Send entries in their order from a thread, all that came within half a second in one batch.

    A round waits only where a thousand entries are waiting. What cannot be sent is handed back, also if there is no
    answer for half a minute when it is waited for.

    Args:
        send: Sends a batch; it may raise.
        keep: Takes a batch that was not sent, and the error. It must not raise.
    """

    def __init__(
        self, send: Callable[[Sequence[Entry]], None], keep: Callable[[Sequence[Entry], Exception], None]
    ) -> None:
        self._send, self._keep = send, keep
        self._entries: deque[Entry] = deque()
        self._in_flight: list[Entry] = []
        self._changed = threading.Condition()
        self._hurry = self._given_up = False
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def put(self, entry: Entry) -> None:
        """Add an entry."""
        with self._changed:
            room = self._given_up or self._changed.wait_for(lambda: len(self._entries) < _CAPACITY, _PATIENCE)
            self._entries.append(entry)
            if self._thread is None and not self._given_up:
                self._thread = threading.Thread(target=self._run, name="lightning_lbgm-sender", daemon=True)
                self._thread.start()
                _OPEN.add(self)
            if len(self._entries) == 1 or self._is_full():
                self._changed.notify_all()
        if self._given_up or not room:
            self._give_up()

    def close(self) -> None:
        """Send what is waiting, and end the thread; the next entry starts another."""
        if self._thread is None or os.getpid() != self._pid:  # a forked process has no such thread
            return
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._entries and not self._in_flight, _PATIENCE)
            self._hurry, self._thread = False, None
            self._changed.notify_all()
        _OPEN.discard(self)
        if not done:
            self._give_up()

    def _give_up(self) -> None:
        """Hand back what is waiting, and the batch whose fate is not known."""
        with self._changed:
            self._given_up = True
            rest = [*self._in_flight, *self._entries]
            self._in_flight = []
            self._entries.clear()
        self._keep(rest, TimeoutError(f"no answer within {_PATIENCE:g} seconds"))

    def _run(self) -> None:
        thread = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._thread is not thread)
                if self._thread is not thread:  # closed, and nothing is left
                    return
                self._changed.wait_for(lambda: self._hurry or self._is_full(), _INTERVAL)
                batch = self._in_flight = self._take()
                self._changed.notify_all()
            try:
                if batch:
                    self._try(batch)
            finally:
                with self._changed:
                    self._in_flight = []
                    self._changed.notify_all()

    def _try(self, batch: list[Entry]) -> None:
        try:
            if self._failures >= _ATTEMPTS:
                raise ConnectionError(f"{_ATTEMPTS} batches in a row were not taken")
            self._send(batch)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            self._keep(batch, error)

    def _is_full(self) -> bool:
        return sum(len(entry.metrics) for entry in self._entries) >= _BATCH_VALUES

    def _take(self) -> list[Entry]:
        batch: list[Entry] = []
        values = 0
        while self._entries and (not batch or values + len(self._entries[0].metrics) <= _BATCH_VALUES):
            values += len(self._entries[0].metrics)
            batch.append(self._entries.popleft())
        return batch


_OPEN: weakref.WeakSet[Sender] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sender in list(_OPEN):
        sender.close()
