"""Comparison of vectorised with sequential training of the same clients, up to rounding.

What rounding amounts to is not the same for every module: a step may amplify it. So if a difference is larger than
the last digits, the client is trained alone once more, from parameters that differ in their last bit: a difference of
that size is rounding, a much larger one is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Turn", "find_difference", "nudge"]

_RELATIVE = 1e-5  # what another order of summation makes of float32 steps; less is not looked into
_ROUNDINGS = 8  # of the global parameters: an update is a difference to them
_AMPLIFIED = 30  # times what the last bit of the parameters makes


@dataclass
class Turn:
    """What a client's local training came to.

    Attributes:
        update: Its update, cut into the parameters' shapes.
        buffers: What it holds besides its parameters, by name.
        logged: What it logged, reduced, with its weight, by name.
        loss: Mean loss; NaN if there is none.
        counts: Steps and examples.
        objective: What its local objective keeps, by the way to it.
    """

    update: Sequence[Tensor]
    buffers: Mapping[str, Tensor]
    logged: Mapping[str, tuple[Any, float]]
    loss: float
    counts: tuple[int, int]
    objective: Mapping[str, Any] = field(default_factory=dict)


def find_difference(
    at_once: Turn, alone: Turn, names: Sequence[str], server: Sequence[Tensor], nudged: Callable[[], Turn]
) -> str | None:
    """Return what differs beyond rounding, in words; None if nothing does.

    Args:
        at_once: The client as one of several that were trained at once.
        alone: The same client trained alone.
        names: The parameters' names.
        server: The global parameters, in their shapes.
        nudged: Trains the client alone from ``nudge``d parameters; called only if it is needed.
    """
    if at_once.counts != alone.counts:
        return f"steps and examples are {at_once.counts}, not {alone.counts}"
    known: list[Turn] = []

    def rounding() -> Turn:
        if not known:
            known.append(nudged())
        return known[0]

    for position, name in enumerate(names):
        floor = _ROUNDINGS * _eps(server[position]) * _norm(server[position])
        pair = at_once.update[position], alone.update[position]
        told = _compare(*pair, floor, partial(lambda p: rounding().update[p], position))
        if told is not None:
            return f"the update of {name!r} differs by {told}"
    for name in sorted(at_once.buffers.keys() | alone.buffers.keys()):
        if name not in at_once.buffers or name not in alone.buffers:
            return f"only one of them has the buffer {name!r}"
        pair = at_once.buffers[name], alone.buffers[name]
        told = _compare(*pair, 0.0, partial(lambda n: rounding().buffers.get(n), name))
        if told is not None:
            return f"the buffer {name!r} differs by {told}"
    if at_once.logged.keys() != alone.logged.keys():
        return f"they log {sorted(at_once.logged)}, not {sorted(alone.logged)}"
    for name, (value, weight) in alone.logged.items():
        other, other_weight = at_once.logged[name]
        if not math.isclose(weight, other_weight, rel_tol=1e-9):
            return f"the weight of the logged value {name!r} is {other_weight:g}, not {weight:g}"
        told = _compare_numbers(other, value, partial(lambda n: rounding().logged.get(n, (math.nan, 0.0))[0], name))
        if told is not None:
            return f"the logged value {name!r} is {told}"
    told = _compare_numbers(at_once.loss, alone.loss, lambda: rounding().loss)
    return _find_in_objective(at_once, alone, rounding) if told is None else f"the loss is {told}"


def _find_in_objective(at_once: Turn, alone: Turn, nudged: Callable[[], Turn]) -> str | None:
    one, two = at_once.objective, alone.objective
    if one.keys() != two.keys():
        return f"the local objective keeps {sorted(one)}, not {sorted(two)}"
    for name, value in two.items():
        if isinstance(value, Tensor) and isinstance(one[name], Tensor):
            told = _compare(one[name], value, 0.0, partial(lambda n: nudged().objective.get(n), name))
            if told is not None:
                return f"the local objective's {name!r} differs by {told}"
        elif type(one[name]) is not type(value) or one[name] != value:
            return f"the local objective's {name!r} is {one[name]!r}, not {value!r}"
    return None


@torch.no_grad()
def nudge(parameters: Tensor) -> Tensor:
    """Return parameters, shape ``(M,)``, each with its last bit changed, up or down by turns."""
    signs = torch.ones_like(parameters)
    signs[::2] = -1
    return torch.addcmul(parameters, parameters, signs, value=torch.finfo(parameters.dtype).eps)


def _compare(one: Tensor, two: Tensor, floor: float, nudged: Callable[[], Tensor | None]) -> str | None:
    if one.shape != two.shape or one.dtype != two.dtype:
        return f"its shape or dtype: {tuple(one.shape)} {one.dtype}, not {tuple(two.shape)} {two.dtype}"
    if torch.equal(one, two):
        return None
    finite, finite_too = one.isfinite(), two.isfinite()
    if not torch.equal(finite, finite_too):
        # Overflow may come a step earlier or later; such a client is left out in either case.
        return None if not bool(finite.all()) and not bool(finite_too.all()) else "numbers that are not finite"
    if not one.is_floating_point():
        return "values of a kind that has no rounding"
    difference, scale = _distance(one, two), _norm(two)
    if difference <= _RELATIVE * scale + floor:
        return None
    again = nudged()
    if again is not None and again.shape == two.shape and difference <= _AMPLIFIED * _distance(again, two):
        return None
    return f"{difference / scale:.2g} of its norm" if scale else f"{difference:.2g}, where it should be zero"


def _compare_numbers(one: Any, two: Any, nudged: Callable[[], Any]) -> str | None:
    one, two = float(one), float(two)
    if one == two or (math.isnan(one) and math.isnan(two)):
        return None
    difference = abs(one - two)
    if difference <= _RELATIVE * abs(two) or difference <= _AMPLIFIED * abs(float(nudged()) - two):
        return None
    return f"{one:g}, not {two:g}"


def _distance(one: Tensor, two: Tensor) -> float:
    both = one.isfinite() & two.isfinite()
    return _norm(torch.where(both, one.double() - two.double(), 0.0))


def _norm(tensor: Tensor) -> float:
    finite = tensor.detach().nan_to_num(0.0, 0.0, 0.0)
    return float(torch.linalg.vector_norm(finite, dtype=torch.float64)) if tensor.numel() else 0.0


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
