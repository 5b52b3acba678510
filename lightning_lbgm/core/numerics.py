"""Scale-safe inner products and powers of two: in float32 a square overflows from 2e19 on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["binary_exponent", "inner", "inners", "is_safe", "times_power"]

# Outside this range a float32 sum of squares has lost digits to underflow, or overflows.
_SAFE_SQUARES = (1e-26, 1e36)
_BLOCK = 2**19  # entries, 2 MB in float32: smaller ones take more calls, and are slower


def inner(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors of shape ``(n,)``.

    It runs in the vectors' dtype, at memory bandwidth, and again in ``float64`` if the first result shows that
    ``float32`` may have under- or overflowed, so that tests on it stay true for updates of any scale.
    """
    result = float(torch.dot(a, b))
    if a.dtype != torch.float64 and not is_safe(abs(result)):
        result = float(torch.dot(a.double(), b.double()))
    return result


def inners(a: Tensor, others: Sequence[Tensor]) -> list[float]:
    """Return the inner products of a vector of shape ``(n,)`` with several others.

    A vector that the cache does not hold is read block by block, so that it comes from memory once for all of them.
    """
    if len(others) < 2 or (a.numel() <= 2 * _BLOCK and a.device.type == "cpu"):
        return [inner(a, other) for other in others]
    totals = [0.0] * len(others)
    if a.device.type != "cpu":  # wait for an accelerator once
        totals = torch.stack([torch.dot(a, other) for other in others]).tolist()
    else:
        for block, *parts in zip(a.split(_BLOCK), *(other.split(_BLOCK) for other in others)):
            for index, part in enumerate(parts):
                totals[index] += float(torch.dot(block, part))
    return [
        total if a.dtype == torch.float64 or is_safe(abs(total)) else inner(a, other)
        for total, other in zip(totals, others)
    ]


def is_safe(magnitude: float) -> bool:
    """Whether a sum of products in ``float32`` is so large that it cannot have lost digits, and not too large."""
    low, high = _SAFE_SQUARES
    return low < magnitude < high


def binary_exponent(values: Tensor) -> int | None:
    """Return e with ``2 ** e <= max |values| < 2 ** (e + 1)``; None if all are zero, or one is not finite.

    Examples:
        >>> binary_exponent(torch.tensor([0.5, -6.0])), binary_exponent(torch.zeros(2))
        (2, None)
    """
    if not values.numel():
        return None
    least, most = torch.aminmax(values)  # as fast as memory, unlike the norm of infinite order
    if values.device.type != "cpu":  # wait for an accelerator once
        least, most = torch.stack([least, most]).cpu()
    largest = max(-float(least), float(most))
    return math.frexp(largest)[1] - 1 if 0 < largest < math.inf else None


def times_power(value: float, exponent: int) -> float:
    """Return ``value * 2 ** exponent``, infinite if a float cannot hold it."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)
