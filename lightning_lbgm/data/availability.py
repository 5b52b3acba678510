"""Availability: which clients can take part in a round, by a probability, a rule or a trace."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_lbgm.core.describe import describe
from lightning_lbgm.data.chance import client_chances

__all__ = ["Availability", "AvailabilityLike", "as_availability"]

_InConfigs = float | Callable[[int, int], float] | dict[int, list[tuple[int, int]]] | list[list[int]] | str | None
if TYPE_CHECKING:
    AvailabilityLike = _InConfigs | os.PathLike[str] | np.ndarray[Any, Any] | Tensor
else:  # for a LightningCLI, which takes the path of a file to be an object's config if an object is allowed
    AvailabilityLike = _InConfigs
"""What ``LBGMFederated(availability=...)`` takes."""

_FORMS = (
    "a probability in (0, 1], a function `(round, client) -> bool or probability`, or a trace: a file (.npy, .csv or"
    " .json), an array of 0 and 1 of the shape (rounds, clients), or a dict of each client's rounds"
    " `{client: [(from, to)]}`"
)
_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".csv": lambda path: np.loadtxt(path, delimiter=",", ndmin=2),
    ".json": lambda path: json.loads(path.read_text()),
}


class Availability(ABC):
    """Which clients can take part in a round: a pure function of the run's seed and the round."""

    is_given = False  # whether it asks a user's function

    @abstractmethod
    def presence(self, round_index: int, num_clients: int, names: Sequence[str] | None) -> Any:
        """Return each client's presence, shape ``(K,)``: whether it is available, or with what probability."""

    def check(self, num_clients: int, names: Sequence[str] | None) -> None:  # noqa: B027 (some fit all clients)
        """Refuse, with a ``ValueError``, what does not go with the federation's clients."""

    def clients(self, round_index: int, num_clients: int, seed: int, names: Sequence[str] | None) -> tuple[int, ...]:
        """Return the clients that are available in a round, in increasing order."""
        presence = np.asarray(self.presence(round_index, num_clients, names))
        if presence.dtype != bool:
            presence = client_chances(seed, "availability", round_index, num_clients) < presence
        return tuple(np.flatnonzero(presence).tolist())


class _Probability(Availability):
    """Each client alike, in each round anew."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, bool) or not 0 < value <= 1:
            raise ValueError(f"`availability={value!r}` must be in (0, 1] as a probability, such as 0.5.")
        self.value = float(value)

    def presence(self, round_index: int, num_clients: int, names: Sequence[str] | None) -> Any:
        return np.full(num_clients, self.value)

    def __repr__(self) -> str:
        return repr(self.value)


class _Rule(Availability):
    """A user's function."""

    is_given = True

    def __init__(self, function: Callable[[int, int], float]) -> None:
        self.function = function

    def presence(self, round_index: int, num_clients: int, names: Sequence[str] | None) -> Any:
        return [float(self._ask(round_index, client_id)) for client_id in range(num_clients)]

    def _ask(self, round_index: int, client_id: int) -> float:
        value = self.function(round_index, client_id)
        try:
            probability = float(value)
        except (TypeError, ValueError):
            probability = math.nan
        if not 0 <= probability <= 1:
            raise ValueError(
                f"`availability={describe(self.function)}` returned {value!r} in round {round_index} for client"
                f" {client_id}: return True, False or a probability in [0, 1]."
            )
        return probability

    def __repr__(self) -> str:
        return describe(self.function)


class _Table(Availability):
    """A trace with a row for each round and a column for each client."""

    def __init__(self, values: Any, name: str) -> None:
        table = np.asarray(values)
        if table.ndim != 2 or not table.size or not np.isin(table, (0, 1)).all():
            raise ValueError(
                f"`availability={name}` must have the shape (rounds, clients) and nothing but 0 and 1; it has the shape"
                f" {table.shape}."
            )
        self.table = table.astype(bool)
        self.name = name
        if not self.table.any():
            raise ValueError(f"`availability={name}` has nothing but 0: nobody would ever take part.")

    def presence(self, round_index: int, num_clients: int, names: Sequence[str] | None) -> Any:
        return self.table[round_index % len(self.table)]

    def check(self, num_clients: int, names: Sequence[str] | None) -> None:
        if self.table.shape[1] != num_clients:
            raise ValueError(
                f"`availability={self.name}` has {self.table.shape[1]} columns, but there are {num_clients} clients:"
                " give it one column for each client."
            )

    def __repr__(self) -> str:
        return self.name


class _Spans(Availability):
    """A trace with the rounds ``from <= round < to`` in which each client is available."""

    def __init__(self, spans: Mapping[Any, Any], name: str) -> None:
        self.name = name
        self.spans = {key: _checked_spans(key, value, name) for key, value in spans.items()}
        self.length = max((to for pairs in self.spans.values() for _, to in pairs), default=0)
        if not self.length:
            raise ValueError(f"`availability={name}` has no round for any client: nobody would ever take part.")

    def presence(self, round_index: int, num_clients: int, names: Sequence[str] | None) -> Any:
        row = np.zeros(num_clients, dtype=bool)
        now, numbers = round_index % self.length, _numbers(names)
        for key, pairs in self.spans.items():
            if any(start <= now < to for start, to in pairs):
                row[_client_of(key, numbers)] = True
        return row

    def check(self, num_clients: int, names: Sequence[str] | None) -> None:
        numbers = _numbers(names)
        for key in self.spans:
            client_id = _client_of(key, numbers)
            if not 0 <= client_id < num_clients:
                known = f"from 0 to {num_clients - 1}" + (f", or one of the names {list(numbers)}" if numbers else "")
                raise ValueError(f"`availability={self.name}` has a client {key!r}, but clients are numbered {known}.")

    def __repr__(self) -> str:
        return self.name


class _File(Availability):
    """A trace in a file, which is read when it is asked for first."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._trace: Availability | None = None
        if self.path.suffix not in _READERS:
            raise ValueError(
                f"`availability={str(path)!r}` must name a file that ends in .npy, .csv or .json; or it is {_FORMS}."
            )

    @property
    def trace(self) -> Availability:
        if self._trace is None:
            try:
                values = _READERS[self.path.suffix](self.path)
            except (OSError, ValueError) as error:
                raise ValueError(f"`availability={str(self.path)!r}` could not be read: {error}") from error
            self._trace = _trace(values, repr(str(self.path)))
        return self._trace

    def presence(self, round_index: int, num_clients: int, names: Sequence[str] | None) -> Any:
        return self.trace.presence(round_index, num_clients, names)

    def check(self, num_clients: int, names: Sequence[str] | None) -> None:
        self.trace.check(num_clients, names)

    def __repr__(self) -> str:
        return repr(str(self.path))


def as_availability(value: Any) -> Availability | None:
    """Return what a user gave as an ``Availability``; None if all clients always are available.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is out of range, or a trace is none.
    """
    if value is None or isinstance(value, Availability):
        return value
    if isinstance(value, (int, float)):
        return _Probability(value)
    if isinstance(value, (str, os.PathLike)):
        return _File(value)
    if isinstance(value, (Mapping, Sequence, np.ndarray, Tensor)):
        return _trace(value.cpu().numpy() if isinstance(value, Tensor) else value, f"<{type(value).__name__}>")
    if callable(value) and not isinstance(value, type):
        return _Rule(value)
    raise TypeError(f"`availability` must be {_FORMS}; got {value!r}.")


def _trace(values: Any, name: str) -> Availability:
    return _Spans(values, name) if isinstance(values, Mapping) else _Table(values, name)


def _checked_spans(key: Any, value: Any, name: str) -> list[tuple[int, int]]:
    try:
        pairs = [(start, to) for start, to in value]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    if not all(type(start) is int and type(to) is int and 0 <= start < to for start, to in pairs):
        raise ValueError(
            f"`availability={name}` must have a list of rounds `(from, to)` for each client, whole numbers with 0 <="
            f" from < to, available from `from` to before `to`; client {key!r} has {value!r}."
        )
    return pairs


def _numbers(names: Sequence[str] | None) -> dict[str, int]:
    return {name: number for number, name in enumerate(names or ())}


def _client_of(key: Any, numbers: Mapping[str, int]) -> int:
    """Return the number of a client that is named, or numbered, also as a string as in JSON; -1 if there is none."""
    if key in numbers:
        return numbers[key]
    try:
        return int(key)
    except (TypeError, ValueError):
        return -1
