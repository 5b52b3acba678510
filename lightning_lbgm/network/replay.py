"""Replay: the time of a finished run on another network, from its table of clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lbgm.network.clock import NetworkClock
from lightning_lbgm.network.round_time import RoundTime
from lightning_lbgm.network.table import read_rows

__all__ = ["replay"]


def replay(rows: Iterable[Mapping[str, Any]], clock: NetworkClock, seed: int = 0) -> dict[int, RoundTime]:
    """Return the time of each round of a finished run on a network, without training it again.

    The cohorts are those of the run: clients that it dropped are not waited for, and a deadline in seconds does not
    count, because on another network other clients would have met it.

    Args:
        rows: Rows of the table of clients, ``federated/clients.json`` in MLflow or ``clients.csv``: each with
            ``round``, ``client``, ``decision``, ``downlink_bytes``, ``local_steps`` and ``uplink_bytes``.
        clock: The network. Its compute must not be measured. A table of clients must have a row for each in ``rows``.
        seed: Of the clock's spread.

    Returns:
        The time of each round, by the round, in order.

    Raises:
        ValueError: If the clock measures, its table is of other clients, or a column is missing.

    Examples:
        >>> row = {"round": 0, "client": 2, "decision": "sent", "local_steps": 3}
        >>> rows = [{**row, "downlink_bytes": 2e6, "uplink_bytes": 1e6}]
        >>> replay(rows, NetworkClock(uplink="8 Mbit/s", downlink="16 Mbit/s", compute=0.5))[0].seconds
        3.5
    """
    rounds: dict[int, list[tuple[int, int, int, int]]] = {}
    for row in rows:
        missing = [name for name in _COLUMNS if name not in row]
        if missing:
            raise ValueError(
                f"A row of the table of clients has no column {missing[0]!r}: it needs {', '.join(_COLUMNS)}, as"
                " `LBGMCallback` writes them."
            )
        parts = rounds.setdefault(int(row["round"]), [])
        if row["decision"] != "dropped":
            sent, received = (round(8 * float(row[name])) for name in ("uplink_bytes", "downlink_bytes"))
            parts.append((int(row["client"]), received, int(row["local_steps"]), sent))
    highest = max((part[0] for parts in rounds.values() for part in parts), default=0)
    links = clock.links(seed, _num_clients(clock, highest + 1))
    if links.measures:
        raise ValueError(
            "A run is replayed with a `NetworkClock(compute=...)` in seconds a local step: 'measured' needs a"
            " simulation."
        )
    return {index: links.round_time(rounds[index]) for index in sorted(rounds)}


_COLUMNS = ("round", "client", "decision", "downlink_bytes", "local_steps", "uplink_bytes")


def _num_clients(clock: NetworkClock, at_least: int) -> int:
    """Return K: of a table the number of its rows, because the last clients may not have taken part."""
    if clock.clients is None:
        return at_least
    return max(at_least, len(read_rows(clock.clients)))
