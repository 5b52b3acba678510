"""Threshold of the look-back test: a number, a function of the round, or controlled to reach a wanted saving."""

from __future__ import annotations

import numbers
from collections.abc import Callable

from lightning_lbgm.compression.context import Context, RoundResult, State
from lightning_lbgm.core.validation import check_count

__all__ = ["TargetSavings", "Threshold", "check_threshold", "threshold_of"]


class TargetSavings:
    """Steer the threshold of ``LookBack`` so that the run saves a wanted share of FedAvg's uplink.

    After each round the server knows the LBP errors of the cohort and the bits sent so far. It works out how many full
    updates the budget allows in the next round, and takes as the threshold the error that as many exceeded in this one;
    it tells the threshold to the clients with the global parameters (a float, not counted). So the clients that have
    turned most send in full. Too much or too little so far is made up for within ``horizon`` rounds.

    The first update of each client goes in full, so a saving is reached after ``1 / (1 - savings)`` rounds at the
    earliest. Where it can only be reached by recycling updates that have no direction left in common with what was
    sent, that is what happens: put ``ErrorFeedback`` around, and watch ``lbgm/threshold``.

    Args:
        savings: Wanted ``comm/savings``, in [0, 1): one minus the uplink over what FedAvg would have sent.
        horizon: Rounds, at least 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If it is out of range.

    Examples:
        >>> from lightning_lbgm import ErrorFeedback, LookBack
        >>> uplink = [ErrorFeedback(LookBack(threshold=TargetSavings(0.9), rank=8))]
    """

    def __init__(self, savings: float, horizon: int = 5) -> None:
        if isinstance(savings, bool) or not isinstance(savings, (int, float)):
            raise TypeError(f"`TargetSavings(savings=...)` must be a number in [0, 1); got {savings!r}.")
        if not 0 <= savings < 1:
            raise ValueError(
                f"`TargetSavings(savings=...)` must be in [0, 1); got {savings!r}. Use 0.9 to send a tenth of what"
                " FedAvg would."
            )
        self.savings = float(savings)
        self.horizon = check_count("TargetSavings", "horizon", horizon)

    def init(self) -> State:
        """Make the state before the first round. Without errors to go by, the first test recycles what there is."""
        return {"threshold": 1.0 if self.savings else 0.0, "sent": 0, "dense": 0, "ratio": 1.0}

    def update(self, state: State, result: RoundResult) -> None:
        """Set the threshold of the next round."""
        round_bits = sum(result.dense_bits)
        state["sent"] += sum(result.uplink_bits)
        state["dense"] += round_bits
        share = 1 - self.savings
        allowed = share * round_bits + (share * state["dense"] - state["sent"]) / self.horizon
        # Cost of each test, were it to send in full, largest error first.
        costs = sorted(self._costs(state, result), reverse=True)
        if allowed >= sum(cost for _, cost in costs):
            state["threshold"] = 0.0
        elif allowed < 0 or not any(error < 1 for error, _ in costs):  # an error of 1 has no look-back gradient
            state["threshold"] = 1.0
        else:
            for error, cost in costs:
                allowed -= cost
                if allowed < 0:
                    state["threshold"] = error
                    break

    @staticmethod
    def _costs(state: State, result: RoundResult) -> list[tuple[float, float]]:
        """Return the LBP error of each test of the round, and the bits that sending in full costs."""
        sizes = result.layout.sizes
        tests: list[tuple[float, float]] = []
        full_bits = dense_bits = 0.0
        for sent, dense, decision in zip(result.uplink_bits, result.dense_bits, result.decisions):
            if decision is None:
                continue
            by_layer = len(decision.errors) == len(sizes) > 1
            shares = [size / result.layout.size for size in sizes] if by_layer else [1.0] * len(decision.errors)
            tests += [(error, dense * share) for error, share in zip(decision.errors, shares)]
            refreshed = sum(share for share, recycled in zip(shares, decision.recycled) if not recycled)
            if refreshed:
                full_bits += sent
                dense_bits += dense * refreshed
        if dense_bits:
            state["ratio"] = full_bits / dense_bits  # below 1 after a compressor
        return [(error, cost * state["ratio"]) for error, cost in tests]

    def __repr__(self) -> str:
        """Show the constructor call."""
        return f"TargetSavings({self.savings!r}, horizon={self.horizon})"


Threshold = float | Callable[[int], float] | TargetSavings
"""What ``LookBack`` takes: a number in [0, 1], a function of the round (from 0) that returns one, or a target."""


def check_threshold(threshold: Threshold) -> Threshold:
    """Return a threshold, numbers as floats.

    Raises:
        TypeError: If it is none.
        ValueError: If it is a number outside [0, 1].
    """
    if isinstance(threshold, TargetSavings) or callable(threshold):
        return threshold
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(
            "`LookBack(threshold=...)` must be a number in [0, 1], a function of the round, or `TargetSavings(...)`;"
            f" got {threshold!r}."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"`LookBack(threshold=...)` must be in [0, 1], because it bounds a squared sine; got {threshold!r}."
            " Use 0.2 for the paper's setting, 0 to send everything."
        )
    return float(threshold)


def threshold_of(threshold: Threshold, context: Context) -> float:
    """Return the threshold of a round.

    Raises:
        ValueError: If a function returns something else than a number in [0, 1].
    """
    if isinstance(threshold, float):
        return threshold
    if isinstance(threshold, TargetSavings):
        return float(context.shared.get("threshold", 1.0))
    value = threshold(context.round_index)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(
            f"`LookBack(threshold=...)` returned {value!r} for round {context.round_index}:"
            " it must be a number in [0, 1]."
        )
    return float(value)
