"""Scores of single clients, and what they say about a federation: mean, worst, 10th percentile, spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_lbgm.reports.reports import ClientReport

__all__ = ["ClientHistory", "ClientScores", "Direction", "score_rows", "summarize"]

_WORDS = ("loss", "error", "mse", "mae", "perplexity")
_PERCENT = 10


@dataclass(frozen=True)
class ClientScores:
    """What the evaluation of one client came to.

    Attributes:
        num_examples: Examples that it was evaluated on.
        metrics: Of the global model, by name.
        tuned: Of the model after some local steps from the global one; empty if that was not asked for.
    """

    num_examples: int
    metrics: dict[str, float]
    tuned: dict[str, float] = field(default_factory=dict)


class Direction:
    """Whether lower values of a metric are better.

    Args:
        lower_is_better: Names of metrics of which lower values are better, or a dict of names with True or False. Of
            other metrics lower is better if the name contains loss, error, mse, mae or perplexity.

    Raises:
        TypeError: If it is neither.

    Examples:
        >>> direction = Direction(["val/bpc"])
        >>> direction("val/bpc"), direction("val/loss"), direction("val/acc")
        (True, True, False)
    """

    def __init__(self, lower_is_better: Sequence[str] | Mapping[str, bool] | None = None) -> None:
        given = lower_is_better or {}
        if isinstance(given, str) or not isinstance(given, (Sequence, Mapping)):
            raise TypeError(
                "`lower_is_better` must be a list of names of metrics, as `['val/bpc']`, or a dict of names with True"
                f" or False; got {given!r}."
            )
        self._known = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, True)

    def __call__(self, name: str) -> bool:
        """Whether lower values of the metric are better."""
        return self._known.get(name, any(word in name.lower() for word in _WORDS))


def summarize(
    scores: Mapping[int, ClientScores], own: Mapping[int, Mapping[str, float]], lower_is_better: Callable[[str], bool]
) -> dict[str, float]:
    """Return the metrics of an evaluation, as docs/metrics.md lists them.

    Args:
        scores: Of each client.
        own: Metrics of each client's own last local model, of the clients that have one.
        lower_is_better: Whether lower values of a metric are better.

    Examples:
        >>> scores = {0: ClientScores(1, {"acc": 0.4}), 1: ClientScores(3, {"acc": 0.8})}
        >>> found = summarize(scores, {0: {"acc": 0.5}, 1: {"acc": 0.8}}, Direction())
        >>> {name: round(value, 3) for name, value in found.items()}
        {'clients/acc_mean': 0.7, 'clients/acc_worst': 0.4, 'clients/acc_p10': 0.44, 'clients/acc_std': 0.2, \
'clients/acc_worse_than_own': 0.5}
    """
    summary: dict[str, float] = {}
    for prefix, kind in (("clients/", "metrics"), ("clients/tuned/", "tuned")):
        for name in _names(scores, kind):
            values = {k: getattr(s, kind)[name] for k, s in scores.items() if name in getattr(s, kind)}
            sizes = [scores[client_id].num_examples for client_id in values]
            summary.update(_spread(f"{prefix}{name}", list(values.values()), sizes, lower_is_better(name)))
            compared = [k for k in values if name in own.get(k, {})] if kind == "metrics" else []
            if compared:
                sign = 1 if lower_is_better(name) else -1
                worse = [sign * values[k] > sign * own[k][name] for k in compared]
                summary[f"clients/{name}_worse_than_own"] = sum(worse) / len(worse)
    return summary


def _names(scores: Mapping[int, ClientScores], kind: str) -> list[str]:
    return list(dict.fromkeys(name for score in scores.values() for name in getattr(score, kind)))


def _spread(name: str, values: list[float], sizes: list[int], lower: bool) -> dict[str, float]:
    numbers = np.asarray(values)
    if np.isnan(numbers).any():
        return {f"{name}_{part}": math.nan for part in ("mean", "worst", "p10", "std")}
    return {
        f"{name}_mean": float(np.average(numbers, weights=sizes)),
        f"{name}_worst": float(numbers.max() if lower else numbers.min()),
        f"{name}_p10": float(np.percentile(numbers, 100 - _PERCENT if lower else _PERCENT)),
        f"{name}_std": float(numbers.std()),
    }


class ClientHistory:
    """What is kept of each client from round to round: bytes that it sent, and metrics of its last local model.

    A round that is recorded again, because it was taken back, replaces what was recorded of it.

    Attributes:
        uplink_bytes: By client.
        own: Metrics by client and name.
    """

    def __init__(self) -> None:
        self.uplink_bytes: dict[int, float] = {}
        self.own: dict[int, dict[str, float]] = {}
        self._round = -1
        self._before: tuple[dict[int, float], dict[int, dict[str, float]]] = {}, {}

    def record(self, round_index: int, reports: Sequence[ClientReport], own: Mapping[int, dict[str, float]]) -> None:
        """Take a round.

        Args:
            round_index: The round.
            reports: Of its clients.
            own: Metrics of the local models of those that were evaluated, by client and name.
        """
        if round_index == self._round:
            self.uplink_bytes, self.own = self._before
        self._round, self._before = round_index, (dict(self.uplink_bytes), dict(self.own))
        for report in reports:
            sent = self.uplink_bytes.get(report.client_id, 0.0)
            self.uplink_bytes[report.client_id] = sent + report.uplink_bits / 8
        self.own.update(own)

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept as built-ins."""
        return {"round": self._round, "uplink_bytes": dict(self.uplink_bytes), "own": dict(self.own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._round = state["round"]
        self.uplink_bytes, self.own = dict(state["uplink_bytes"]), dict(state["own"])
        self._before = dict(self.uplink_bytes), dict(self.own)


def score_rows(
    round_index: int,
    scores: Mapping[int, ClientScores],
    history: ClientHistory,
    names: Sequence[str] | None = None,
    with_own: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table of evaluations for each client; docs/metrics.md names the columns.

    Args:
        round_index: The round after which they were evaluated.
        scores: Of each client.
        history: What is kept of the clients.
        names: The clients' names, if they have some.
        with_own: Whether own models are evaluated.
    """
    metrics, tuned = _names(scores, "metrics"), _names(scores, "tuned")
    for client_id, score in scores.items():
        own = history.own.get(client_id, {})
        yield {
            "round": round_index,
            "client": client_id,
            **({} if names is None else {"name": names[client_id]}),
            "num_examples": score.num_examples,
            **{name: score.metrics.get(name, math.nan) for name in metrics},
            **({f"own/{name}": own.get(name, math.nan) for name in metrics} if with_own else {}),
            **{f"tuned/{name}": score.tuned.get(name, math.nan) for name in tuned},
            "uplink_bytes": history.uplink_bytes.get(client_id, 0.0),
        }
