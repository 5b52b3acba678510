"""Network clock: each client's link and speed, and the time of its part in a round."""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lightning_lbgm.core.rng import derive_seed
from lightning_lbgm.network.links import Link, Links
from lightning_lbgm.network.presets import PRESETS
from lightning_lbgm.network.table import COLUMNS, read_rows, rows_by_client
from lightning_lbgm.network.units import parse_rate, parse_seconds

__all__ = ["NetworkClock", "as_network"]

_InConfigs = list[dict[str, Any]] | str | None
if TYPE_CHECKING:
    ClientTable = _InConfigs | os.PathLike[str] | Sequence[Mapping[str, Any]] | Any
else:  # for a LightningCLI, which needs types that it can parse
    ClientTable = _InConfigs

_MEASURED = "measured"


@dataclass(frozen=True)
class NetworkClock:
    """What a synchronous round would take in the world, from the bytes of each client's messages.

    A client's time is ``latency + bits received / downlink``, then ``compute`` for each local step, then
    ``latency + bits sent / uplink``. Clients work at the same time, and the round lasts until the server has the last
    update that it needs. docs/network.md says what is counted and what is not.

    Args:
        uplink: Rate from a client to the server: ``"10 Mbit/s"``, ``"1.2 MB/s"``, or a number of bits a second.
        downlink: Rate from the server to a client.
        latency: Round trip between both, as ``ping`` shows it: ``"40 ms"``, or seconds. Each transfer takes one, a
            round so two. None: the preset's, else 0.
        compute: Time of a local step on a client: ``"20 ms"``, or seconds. ``"measured"``: what a step takes in this
            simulation, in the mean of the round; such times differ from run to run. 0: only the network counts.
        spread: Sigma, how different clients are. Client k's rates are the given ones times ``exp(sigma * z_k)``, and
            its compute the given one times ``exp(sigma * y_k)``; z_k and y_k are drawn once for each client from a
            standard normal distribution, by the run's seed. So the given values are the medians, and about four of
            five clients lie within a factor of ``exp(1.28 * sigma)``: 1.9 at 0.5, 3.6 at 1.
        clients: A table with a row for each client instead, or in addition: a list of dicts with some of the keys
            ``client``, ``uplink``, ``downlink``, ``latency``, ``compute``; the path of such a table (``.csv``,
            ``.json``); or a DataFrame. Rows without ``client`` are those of clients 0, 1, ... in order. What a row has
            holds as it is, without spread; the arguments above fill the rest.
        preset: ``"lte"``, ``"home_broadband"`` or ``"data_centre"``: rates and latency that are not given.
        planned_uplink: Share of a whole update that a message is expected to take, above 0. It only serves to decide
            before training who will be in time, if ``over_select`` or a ``deadline`` in seconds asks for that; the
            round's time is that of the bytes that were sent. 1: nobody who is planned in time sends too much to be so.
        planned_downlink: The same of the whole model, for messages to the clients.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, a unit is unknown, or the rates are missing.

    Examples:
        >>> clock = NetworkClock(uplink="8 Mbit/s", downlink="80 Mbit/s", latency="50 ms", compute="0.1 s")
        >>> link = clock.links(seed=0, num_clients=2)[1]
        >>> link.time(1, downlink_bits=80_000_000, steps=5, uplink_bits=4_000_000).seconds
        2.1
    """

    uplink: float | str | None = None
    downlink: float | str | None = None
    latency: float | str | None = None
    compute: float | str = 0.0
    spread: float = 0.0
    clients: ClientTable = None
    preset: str | None = None
    planned_uplink: float = 1.0
    planned_downlink: float = 1.0

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(
                f"`NetworkClock(preset={self.preset!r})` must be one of {', '.join(map(repr, PRESETS))}. For another"
                " network pass `uplink=...`, `downlink=...` and `latency=...`."
            )
        if self.clients is None:
            self._link({})
        elif not isinstance(self.clients, (str, os.PathLike)):  # a file is read when it is needed
            self._check_rows(read_rows(self.clients))
        _check_number("spread", self.spread, "0.5", zero=True)
        _check_number("planned_uplink", self.planned_uplink, "0.01", zero=False)
        _check_number("planned_downlink", self.planned_downlink, "0.1", zero=False)

    def links(self, seed: int, num_clients: int, names: Sequence[str] | None = None) -> Links:
        """Return the clients' links: a pure function of the clock, the seed and the client.

        Args:
            seed: The run's seed.
            num_clients: K.
            names: The clients' names, which a table may use.

        Raises:
            ValueError: If the table cannot be read, or is of other clients.
        """
        rows: dict[int, Mapping[str, Any]] = {}
        computes = [self.compute]
        if self.clients is not None:
            table = read_rows(self.clients)
            self._check_rows(table)
            rows = rows_by_client(table, num_clients, names)
            computes = [row.get("compute", self.compute) for row in table]

        def make(client_id: int) -> Link:
            network, computer = (self._factor(seed, what, client_id) for what in ("network link", "network computer"))
            return self._link(rows.get(client_id, {}), network=network, computer=computer)

        return Links(make, _MEASURED in computes, (self.planned_downlink, self.planned_uplink))

    def _factor(self, seed: int, purpose: str, client_id: int) -> float:
        """Return ``exp(sigma z)`` with a standard normal z that seed, purpose and client determine."""
        if self.spread == 0:
            return 1.0
        uniform = random.Random(derive_seed(seed, purpose, client_id)).random()
        return math.exp(self.spread * _NORMAL.inv_cdf(min(max(uniform, 2**-53), 1 - 2**-53)))

    def _check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for position, row in enumerate(rows):
            self._link(row, f" (client {row.get('client', position)})")

    def _link(self, row: Mapping[str, Any], whose: str = "", network: float = 1.0, computer: float = 1.0) -> Link:
        """Return a client's link: a row's values as they are, others times the client's factors."""
        preset = None if self.preset is None else PRESETS[self.preset]
        values: dict[str, Any] = {}
        for name in COLUMNS:
            value = row.get(name, getattr(self, name))
            values[name] = getattr(preset, name, None) if value is None else value
        for name in ("uplink", "downlink"):
            if values[name] is None:
                raise ValueError(
                    f"`NetworkClock` has no `{name}`{whose}: pass `{name}='10 Mbit/s'`, a `preset` such as"
                    " 'home_broadband', or a table of clients with it."
                )
            rate = parse_rate(f"`NetworkClock({name}=...)`{whose}", values[name])
            values[name] = rate if name in row else rate * network
        latency = parse_seconds(f"`NetworkClock(latency=...)`{whose}", values["latency"] or 0.0)
        slowness = 1.0 if "compute" in row else computer
        if values["compute"] == _MEASURED:
            return Link(values["uplink"], values["downlink"], latency, None, slowness)
        try:
            seconds = parse_seconds(f"`NetworkClock(compute=...)`{whose}", values["compute"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} 'measured' takes the simulation's own time.") from None
        return Link(values["uplink"], values["downlink"], latency, seconds * slowness)

    def __repr__(self) -> str:
        """Show the arguments that are not the defaults."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.clients is not None and not isinstance(self.clients, (str, os.PathLike)):
            shown["clients"] = f"<{type(self.clients).__name__}>"
        changed = (f"{f.name}={shown[f.name]!r}" for f in fields(self) if shown[f.name] != f.default)
        return f"NetworkClock({', '.join(changed)})"


def as_network(value: Any) -> NetworkClock | None:
    """Return what a user gave as a clock; the name of a preset is the clock with it. None for None.

    Raises:
        TypeError: If it is something else.
        ValueError: If it names no preset.
    """
    if value is None or isinstance(value, NetworkClock):
        return value
    if isinstance(value, str):
        return NetworkClock(preset=value)
    hint = " NetworkClock is a class: write NetworkClock(...)." if value is NetworkClock else ""
    raise TypeError(
        "`network` must be a `NetworkClock(uplink='10 Mbit/s', downlink='50 Mbit/s')`, the name of a preset"
        f" ({', '.join(PRESETS)}), or None; got {value!r}.{hint}"
    )


_NORMAL = statistics.NormalDist()


def _check_number(name: str, value: Any, example: str, *, zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`NetworkClock({name}=...)` must be a number, such as {example}; got {value!r}.")
    if not (value >= 0 if zero else value > 0) or not value < math.inf:
        least = "at least 0" if zero else "above 0"
        raise ValueError(f"`NetworkClock({name}=...)` must be finite and {least}, such as {example}; got {value!r}.")
