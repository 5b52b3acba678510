"""Time on networks: a comparison's finished runs, replayed from the bytes that their clients sent and received."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lightning_lbgm import NetworkClock
from lightning_lbgm.callbacks.mlflow_batches import without_progress_bars
from lightning_lbgm.network import PRESETS, RoundTime, replay

__all__ = ["OWN", "Network", "Times", "lasts", "less", "make_networks", "reached", "read_times"]

OWN = "own"
"""Name of the network that runs had a clock of."""
_TABLE = "federated/clients.json"
_PARTS = ("download", "compute", "upload")


@dataclass(frozen=True)
class Network:
    """A network to replay runs on.

    Attributes:
        name: Its name in files.
        title: Its name in tables and figures.
        clock: The clock.
    """

    name: str
    title: str
    clock: NetworkClock


@dataclass(frozen=True)
class Times:
    """The time of one run on one network.

    Attributes:
        seconds: Until the end of each round, by the round, in order. Rounds without anybody have no entry.
        shares: Of the whole time, what the stragglers spent on download, compute and upload.
    """

    seconds: dict[int, float]
    shares: list[float]

    def at(self, round_index: int) -> float:
        """Return the seconds until the end of a round."""
        return max((s for known, s in self.seconds.items() if known <= round_index), default=0.0)


def make_networks(names: Sequence[str], compute: str, spread: float) -> list[Network]:
    """Return the networks that a command line names.

    Args:
        names: Presets, or YAML files with arguments of ``NetworkClock``.
        compute: Time of a local step; a file may have its own.
        spread: Sigma of the clients' differences; a file may have its own.

    Raises:
        ValueError: If one is neither, or an argument is wrong.
    """
    networks = []
    for name in names:
        settings: dict[str, Any] = {"compute": compute, "spread": spread}
        if name in PRESETS:
            title = PRESETS[name].title
            networks.append(Network(name, title, NetworkClock(preset=name, **settings)))
            continue
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise ValueError(
                f"--networks {name} must be one of {', '.join(PRESETS)}, or a YAML file of a NetworkClock."
            )
        loaded = yaml.safe_load(path.read_text())
        try:
            networks.append(Network(path.stem, path.stem, NetworkClock(**{**settings, **loaded})))
        except TypeError as error:
            raise ValueError(f"--networks {name}: {error}") from error
    if len({OWN, *(network.name for network in networks)}) <= len(networks):
        raise ValueError(f"--networks must have different names, and none the name {OWN!r}; got {' '.join(names)}.")
    return networks


def read_times(client: MlflowClient, run_id: str, networks: Sequence[Network]) -> dict[str, Times]:
    """Return a finished run's times on networks, by name, and under ``OWN`` those of its own clock if it had one.

    Raises:
        ValueError: If it has no table of clients.
    """
    times = {}
    own = {p.step: p.value for p in client.get_metric_history(run_id, "time/total_seconds")}
    if own:
        seconds = {step: own[step] for step in sorted(own)}
        total = max(seconds.values())
        rounds = {step: now - before for (step, now), before in zip(seconds.items(), [0.0, *seconds.values()])}
        shares = []
        for part in _PARTS:
            share = {p.step: p.value for p in client.get_metric_history(run_id, f"time/{part}_share")}
            spent = sum(share[step] * length for step, length in rounds.items() if share.get(step, 0.0) > 0)
            shares.append(spent / total if total else 0.0)
        times[OWN] = Times(seconds, shares)
    if networks:
        rows = list(_rows(client, run_id))
        seed = int(client.get_run(run_id).data.params.get("federated/seed", 0))
        for network in networks:
            times[network.name] = _times(replay(rows, network.clock, seed))
    return times


def _times(rounds: Mapping[int, RoundTime]) -> Times:
    seconds = dict(zip(rounds, itertools.accumulate(time.seconds for time in rounds.values())))
    last = [time.last for time in rounds.values() if time.last is not None]
    total = max(seconds.values(), default=0.0)
    return Times(seconds, [sum(getattr(client, part) for client in last) / total if total else 0.0 for part in _PARTS])


def _rows(client: MlflowClient, run_id: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with without_progress_bars():
                path = client.download_artifacts(run_id, _TABLE, folder)
        except (MlflowException, OSError) as error:
            raise ValueError(
                f"run {run_id} has no {_TABLE}, which --networks replays: leave LBGMCallback(client_table=True)."
            ) from error
        table = json.loads(Path(path).read_text())
    return (dict(zip(table["columns"], row)) for row in table["data"])


def reached(curve: Sequence[tuple[float, float]], target: float, is_lower_better: bool) -> float | None:
    """Return where a curve first is as good as a target; None if it never is."""
    return next((x for x, y in curve if (y <= target if is_lower_better else y >= target)), None)


def lasts(seconds: float | None) -> str:
    """Show a time."""
    if seconds is None:
        return "never"
    size, unit = next(pair for pair in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= pair[0])
    return f"{seconds / (size or 1):.1f} {unit}"


def less(seconds: float | None, base: float | None) -> str:
    """Show how much less than another a time is."""
    if seconds is None or base is None or seconds == base:
        return ""
    return f"{lasts(abs(base - seconds))} {'less' if seconds < base else 'more'}"
