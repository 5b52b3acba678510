"""Table of clients: a row for each with its own network and computer, from Python objects or a file."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "read_rows", "rows_by_client"]

COLUMNS = ("uplink", "downlink", "latency", "compute")
_FORMS = (
    "a list of dicts, one for each client, with some of the keys client, uplink, downlink, latency and compute; the"
    " path of such a table (.csv or .json); or a DataFrame"
)


def read_rows(given: Any) -> list[dict[str, Any]]:
    """Return a table's rows as dicts; a file is read now.

    Raises:
        TypeError: If it is no table.
        ValueError: If a file cannot be read, or the table has no rows or unknown columns.
    """
    name = repr(str(given)) if isinstance(given, (str, os.PathLike)) else f"<{type(given).__name__}>"
    rows = _rows(given, name)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"`NetworkClock(clients={name})` must be {_FORMS}; it has {len(rows)} rows.")
    unknown = sorted({str(key) for row in rows for key in row} - {"client", *COLUMNS})
    if unknown:
        raise ValueError(
            f"`NetworkClock(clients={name})` has the column {unknown[0]!r}: the columns are client,"
            f" {', '.join(COLUMNS)}."
        )
    # An empty cell, which a DataFrame has as NaN, is one that the clock's own arguments fill.
    return [{key: v for key, v in row.items() if v is not None and v != "" and v == v} for row in rows]


def rows_by_client(
    rows: Sequence[Mapping[str, Any]], num_clients: int, names: Sequence[str] | None
) -> dict[int, Mapping[str, Any]]:
    """Return the row of each client, by its number.

    Args:
        rows: The rows. Those without the key ``client`` are those of clients 0, 1, ... in order.
        num_clients: K.
        names: The clients' names, which may stand for the numbers.

    Raises:
        ValueError: If a client has none or two, or one is of no client.
    """
    numbers = {name: number for number, name in enumerate(names or ())}
    found: dict[int, Mapping[str, Any]] = {}
    for position, row in enumerate(rows):
        key = row.get("client", position)
        client_id = numbers.get(key, _number(key))
        if not 0 <= client_id < num_clients:
            known = f"from 0 to {num_clients - 1}" + (f", or one of the names {list(numbers)}" if numbers else "")
            raise ValueError(f"`NetworkClock(clients=...)` has a row for client {key!r}, but clients are {known}.")
        if client_id in found:
            raise ValueError(f"`NetworkClock(clients=...)` has two rows for client {key!r}: give it one.")
        found[client_id] = row
    missing = sorted(set(range(num_clients)) - found.keys())
    if missing:
        raise ValueError(
            f"`NetworkClock(clients=...)` has {len(found)} rows, but there are {num_clients} clients: give it one row"
            f" for each; client {missing[0]} has none."
        )
    return found


def _rows(given: Any, name: str) -> list[Any]:
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        try:
            if path.suffix == ".csv":
                with path.open(newline="") as file:
                    return list(csv.DictReader(file))
            if path.suffix == ".json":
                loaded = json.loads(path.read_text())
                return loaded if isinstance(loaded, list) else []
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"`NetworkClock(clients={name})` could not be read: {error}") from error
    elif hasattr(given, "to_dict"):  # a DataFrame, of pandas or like it
        return list(given.to_dict("records"))
    elif hasattr(given, "to_dicts"):  # of polars
        return list(given.to_dicts())
    elif isinstance(given, Sequence):
        return list(given)
    raise TypeError(f"`NetworkClock(clients={name})` must be {_FORMS}.")


def _number(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        return -1
