"""Stochastic rounding to evenly spaced levels, so that the mean over the rounding is the number.

A random float an entry would take longer than all the rest on a CPU. There a random byte an entry decides, and a finer
draw refines it: for the entries that the byte leaves open if few are left, else one from a table of random fractions.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.integers import Integers
from lightning_lbgm.payloads.levels import CHUNK, Levels, compute_dtype, pieces
from lightning_lbgm.payloads.sparse import index_dtype

__all__ = ["Scale", "quantize"]

Scale = Literal["max", "norm"]

_BYTES = 256
_SAMPLE = 4096  # entries that tell whether most will be zero
_FEW = 0.1  # share of entries that are not rounded to zero up to which they are picked out first
_SAFE_NORM = (1e-13, 1e18)  # in single precision squares of other numbers under- or overflow
_ORDINARY = (1e-30, 1e30)  # scales whose reciprocal times 2 ** 15 is finite and normal


def quantize(numbers: Dense, top: int, bucket_size: int | None, scale: Scale, generator: torch.Generator) -> Levels:
    """Round each number at random to one of the two levels next to it.

    Args:
        numbers: What to quantize.
        top: Positive levels, 1 to 127.
        bucket_size: Entries that have a scale in common; None: all.
        scale: What the highest level is: the largest magnitude or the Euclidean norm.
        generator: On the numbers' device.
    """
    values = numbers.values
    size = values.numel()
    bucket_size = bucket_size if bucket_size is not None and bucket_size < size else 0
    scales = _scales(values, bucket_size, scale)
    if not bucket_size and values.dtype == torch.float32 and values.device.type == "cpu" and size:
        integers = _pick_out(values, scales, top, generator)
        if integers is not None:
            return Levels.of(integers, scales, 0, 0, numbers.layout)
    levels = _round(values, scales, top, bucket_size, generator)
    return Levels.of(Integers.of(levels, top), scales, bucket_size, 0, numbers.layout)


def _scales(values: Tensor, bucket_size: int, scale: Scale) -> Tensor:
    """Return the scale of each bucket, shape ``(buckets,)``."""
    if not values.numel():
        return values.new_empty(0)
    if not bucket_size:
        return _scale(values[None], scale)
    rows = values.numel() // bucket_size * bucket_size
    some = max(bucket_size, CHUNK // bucket_size * bucket_size if values.device.type == "cpu" else rows)
    parts = [_scale(part.view(-1, bucket_size), scale) for part in values[:rows].split(some)]
    if rows < values.numel():
        parts.append(_scale(values[None, rows:], scale))
    return torch.cat(parts)


def _scale(rows: Tensor, scale: Scale) -> Tensor:
    """Return the scale of each row."""
    if len(rows) == 1:
        least, most = torch.aminmax(rows)  # as fast as memory, unlike the largest magnitude
        largest = torch.maximum(-least, most).abs()[None]  # of zeros the sign may be negative
    else:
        largest = torch.maximum(-rows.amin(1), rows.amax(1)).abs_()
    if scale == "max":
        return largest
    norm = torch.linalg.vector_norm(rows, dim=1) if rows.device.type == "cpu" else None
    if norm is None or not bool(((norm > _SAFE_NORM[0]) & (norm < _SAFE_NORM[1])).all()):
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    # No less than the largest, which a norm rounded down could be, and no more than the dtype holds.
    return norm.clamp_(max=torch.finfo(rows.dtype).max).to(rows.dtype).maximum(largest)


def _pick_out(values: Tensor, scales: Tensor, top: int, generator: torch.Generator) -> Integers | None:
    """Round numbers most of which become zero; None if they do not."""
    scale, size = float(scales), values.numel()
    if not 0 < scale < math.inf:
        return None
    array = values.detach().numpy()  # its calls on few numbers take a fraction of torch's
    if not _ORDINARY[0] < scale < _ORDINARY[1]:
        scale, power = math.frexp(scale)
        array = np.ldexp(array, -power)
    sample = np.abs(array[:: -(-size // _SAMPLE)]) * np.float32(top / scale)
    if np.minimum(sample, 1.0).mean() > _FEW:
        return None
    # An entry is not zero if a uniform number is below its magnitude in levels: then its first byte is not above that
    # of the magnitude. The factor makes up for round-off, so that none is missed.
    factor = _BYTES * top / scale * (1 + 1e-6)
    draw, work = _Bytes(size, generator), _Work(min(size, CHUNK))
    found = [
        work.not_below(part, factor, draw.next(len(part)).numpy()) + CHUNK * index
        for index, part in enumerate(torch.from_numpy(array).split(CHUNK))
    ]
    indices = np.concatenate(found)
    chosen = array[indices]
    # Given its first byte, the uniform number is below the end of the magnitude's.
    uniform = torch.rand(len(chosen), dtype=torch.float64, generator=generator).numpy()
    uniform *= (np.floor(np.minimum(np.abs(chosen * np.float32(factor)), _BYTES - 1)) + 1) / _BYTES
    magnitudes = np.abs(chosen) / np.float32(scale) * np.float32(top)
    whole = np.floor(magnitudes)
    levels = ((whole + (magnitudes - whole > uniform)) * np.sign(chosen)).astype(np.int8)
    kept = np.flatnonzero(levels)
    places = torch.from_numpy(indices[kept]).to(index_dtype(size))
    return Integers.at(places, torch.from_numpy(levels[kept]), 0, size, top)


class _Work:
    """Memory for a portion of the numbers; NumPy where it is faster than torch."""

    def __init__(self, size: int) -> None:
        self._numbers = torch.empty(size)
        self._bytes = np.empty(size, dtype=np.uint8)
        self._mask = np.empty(size, dtype=np.bool_)

    def not_below(self, values: Tensor, factor: float, draws: NDArray[Any]) -> NDArray[np.int64]:
        """Return where the whole part of ``|values| * factor``, at most 255, is not below the bytes drawn."""
        numbers, bytes_, mask = self._numbers[: len(values)], self._bytes[: len(values)], self._mask[: len(values)]
        torch.mul(values, factor, out=numbers).abs_().clamp_(max=_BYTES - 1)
        np.copyto(bytes_, numbers.numpy(), casting="unsafe")
        np.less_equal(draws, bytes_, out=mask)
        return np.flatnonzero(mask)


def _round(values: Tensor, scales: Tensor, top: int, bucket_size: int, generator: torch.Generator) -> Tensor:
    """Round all numbers, and return their levels, ``int8``."""
    size, dtype, device = values.numel(), compute_dtype(values.dtype), values.device
    levels = torch.empty(size, dtype=torch.int8, device=device)
    divisors = torch.where(scales > 0, scales, 1.0).to(dtype)
    draw = _Bytes(size, generator) if device.type == "cpu" else None
    work = torch.empty(3, size if draw is None else min(size, CHUNK), dtype=dtype, device=device)
    for piece in pieces(size, bucket_size, device):
        rows = piece.cut(values)
        numbers, whole, uniform = work[:, : rows.numel()].view(3, *rows.shape)
        # Divided first: a scale may be tiny, and the largest magnitude is the highest level to the bit.
        torch.div(rows, piece.scales(divisors), out=numbers)
        if top > 1:
            numbers.mul_(top)
        torch.floor(numbers, out=whole)
        # A number goes up if its fraction is above a uniform number: if the difference, above -1, is positive.
        numbers.sub_(whole)
        if draw is None:
            numbers.sub_(uniform.uniform_(generator=generator))
        else:
            fractions = draw.fractions[: rows.numel()].view(rows.shape)
            numbers.sub_(uniform.copy_(draw.next(rows.numel()).view(rows.shape)), alpha=1 / _BYTES).sub_(fractions)
        # Numbers that are not finite must not become levels that there are not.
        piece.cut(levels).copy_(numbers.ceil_().add_(whole)).clamp_(-top, top)
    return levels


class _Bytes:
    """Random bytes for ``size`` numbers, in portions that stay in the cache.

    Attributes:
        fractions: What lies between two bytes, in units of a byte, for the numbers of a portion: 256 values that are
            shifted by one that is drawn once. Numbers that have it in common hardly depend on each other, because the
            byte decides in 255 of 256 cases.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._generator = generator
        self._buffer = torch.empty(-(-min(size, CHUNK) // 8), dtype=torch.int64)

    def next(self, count: int) -> Tensor:
        """Draw ``count`` bytes; the last ones are overwritten."""
        words = self._buffer[: -(-count // 8)].random_(-(2**63), None, generator=self._generator)
        return words.view(torch.uint8)[:count]

    @cached_property
    def fractions(self) -> Tensor:
        shift = torch.rand((), generator=self._generator)
        return (self.next(8 * len(self._buffer)).float() + shift).div_(_BYTES**2)
