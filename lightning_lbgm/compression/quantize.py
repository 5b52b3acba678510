"""Stochastic rounding to evenly spaced levels, so that the mean over the rounding is the number.

A random float an entry would take longer than all the rest on a CPU. There a random byte an entry decides, and a finer
draw refines it for the entries that the byte leaves open: a number of their own if few are left, else one from a table
of random fractions.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.compression.stage import Context, Encoded
from lightning_lbgm.core.blocks import CACHED
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.bits import where_true
from lightning_lbgm.payloads.integers import Integers
from lightning_lbgm.payloads.levels import Levels, compute_dtype, pieces
from lightning_lbgm.payloads.sparse import index_dtype

__all__ = ["Scale", "encode_levels", "quantize"]

Scale = Literal["max", "norm"]

_BYTES = 256
_SAMPLE = 4096  # entries that tell whether most will be zero
_FEW = 0.1  # share of entries that are not rounded to zero up to which they are picked out first
_SAFE_NORM = (1e-13, 1e18)  # in single precision squares of other numbers under- or overflow
_ORDINARY = (1e-30, 1e30)  # scales whose reciprocal times 2 ** 15 is finite and normal
_MARGIN = 0.25  # above all round-off of a number in units of a byte, and below 1 with it


def encode_levels(update: Payload, context: Context, top: int, bucket_size: int | None, scale: Scale) -> Encoded:
    """Encode the numbers that an update holds by ``quantize``, with the round's randomness."""
    generator = context.generator(update.device)
    quantizer = partial(quantize, top=top, bucket_size=bucket_size, scale=scale, generator=generator)
    return Encoded(update.compress(quantizer, factors=True))


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
    levels = None
    if values.dtype == torch.float32 and values.device.type == "cpu" and size:
        integers = None if bucket_size else _pick_out(values, scales, top, generator)
        if integers is not None:
            return Levels.of(integers, scales, 0, 0, numbers.layout)
        levels = _round_by_bytes(values, scales, top, bucket_size, generator)
    if levels is None:
        levels = _round(values, scales, top, bucket_size, generator)
    return Levels.of(Integers.of(levels, top), scales, bucket_size, 0, numbers.layout)


def _scales(values: Tensor, bucket_size: int, scale: Scale) -> Tensor:
    """Return the scale of each bucket, shape ``(buckets,)``."""
    if not values.numel():
        return values.new_empty(0)
    if not bucket_size:
        return _scale(values[None], scale)
    rows = values.numel() // bucket_size * bucket_size
    some = max(bucket_size, CACHED // bucket_size * bucket_size if values.device.type == "cpu" else rows)
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
    sample = np.minimum(np.abs(array[:: -(-size // _SAMPLE)]) * np.float32(top / scale), np.float32(1))
    if np.add.reduce(sample) / np.float32(len(sample)) > np.float32(_FEW):
        return None
    # An entry is not zero if a uniform number is below its magnitude in levels: then its first byte is not above that
    # of the magnitude. The factor makes up for round-off, so that none is missed.
    factor = _BYTES * top / scale * (1 + 1e-6)
    indices, parts = _not_below(torch.from_numpy(array), factor, _Bytes(size, generator))
    chosen = array[indices]
    # Given its first byte, the uniform number is below the end of the magnitude's.
    uniform = torch.rand(len(chosen), dtype=torch.float64, generator=generator).numpy()
    uniform *= (np.minimum(parts, np.float32(_BYTES - 1)).astype(np.uint8) + 1.0) / _BYTES
    magnitudes = np.abs(chosen)
    magnitudes /= np.float32(scale)
    if top > 1:
        magnitudes *= np.float32(top)
    whole = np.floor(magnitudes)
    magnitudes -= whole
    whole += magnitudes > uniform
    levels = np.copysign(whole, chosen).astype(np.int8)
    kept = np.flatnonzero(levels != 0)
    places = indices[kept].astype(np.int32 if index_dtype(size) == torch.int32 else np.int64)
    return Integers.at(torch.from_numpy(places), torch.from_numpy(levels[kept]), 0, size, top)


def _not_below(values: Tensor, factor: float, draw: _Bytes) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return where ``|values| * factor`` is not below the bytes drawn; and these products."""
    size = len(values)
    numbers, mask = torch.empty(min(size, CACHED)), np.empty(min(size, CACHED), dtype=np.bool_)
    found = []
    for begin in range(0, size, CACHED):
        count = min(size - begin, CACHED)
        number = torch.mul(values[begin : begin + count], factor, out=numbers[:count]).abs_().numpy()
        np.less_equal(draw.next(count).numpy(), number, out=mask[:count])
        indices = where_true(mask[:count])
        found.append((indices + begin if begin else indices, number[indices]))
    if len(found) == 1:
        return found[0]
    places, parts = zip(*found)
    return np.concatenate(places), np.concatenate(parts)


def _round_by_bytes(
    values: Tensor, scales: Tensor, top: int, bucket_size: int, generator: torch.Generator
) -> Tensor | None:
    """Do what ``_round`` does, to the bit, in a fraction of its time; None if scales are not finite or extreme.

    In units of a byte, a number less its random byte and fraction goes up to a multiple of 256. That is known from
    whole numbers, unless the difference to the byte is next to a multiple: one entry in a hundred, which is rounded in
    floating point.
    """
    of_buckets = scales.detach().numpy()
    divisors = np.where(of_buckets > 0, of_buckets, np.float32(1))
    if not (of_buckets.max() < _ORDINARY[1] and divisors.min() > _ORDINARY[0]):
        return None
    size, array = values.numel(), values.detach().numpy()
    factors = torch.from_numpy(np.float32(_BYTES * top) / divisors)
    draw = _Bytes(size, generator)
    shift, table = draw.fractions()
    fractions = table.numpy()
    most = min(size, CACHED)
    numbers, levels = torch.empty(most), np.empty(size, dtype=np.uint8)
    units, high, low = np.empty(most, dtype=np.uint16), np.empty(most, dtype=np.uint16), np.empty(most, dtype=np.uint8)
    is_open = np.empty(most, dtype=np.bool_)
    for piece in pieces(size, bucket_size, values.device):
        count = piece.end - piece.begin
        number, unit, draws = numbers[:count], units[:count], draw.next(count).numpy()
        torch.mul(piece.cut(values), piece.scales(factors), out=number.view(piece.rows, -1))
        number += _BYTES * (top + 1) + _MARGIN  # above zero, and never rounded below its whole part
        np.copyto(unit, number.numpy(), casting="unsafe")
        np.subtract(unit, draws, out=unit)
        np.right_shift(unit, 8, out=high[:count])
        np.copyto(levels[piece.begin : piece.end], high[:count], casting="unsafe")
        np.copyto(low[:count], unit, casting="unsafe")
        np.less(low[:count], 2, out=is_open[:count])
        at = np.flatnonzero(is_open[:count])
        rows = at // (count // piece.rows) + piece.bucket
        exact = array[at + piece.begin] / divisors[rows] * np.float32(top)
        whole = np.floor(exact)
        exact -= whole
        exact -= draws[at] * np.float32(1 / _BYTES)
        exact -= (fractions[at] + np.float32(shift)) * np.float32(1 / _BYTES**2)
        levels[at + piece.begin] = whole + np.ceil(exact) + top
    levels -= np.uint8(top)
    return torch.from_numpy(levels.view(np.int8))


def _round(values: Tensor, scales: Tensor, top: int, bucket_size: int, generator: torch.Generator) -> Tensor:
    """Round all numbers, and return their levels, ``int8``."""
    size, dtype, device = values.numel(), compute_dtype(values.dtype), values.device
    levels = torch.empty(size, dtype=torch.int8, device=device)
    if not size:
        return levels
    divisors = torch.where(scales > 0, scales, 1.0).to(dtype)
    draw = _Bytes(size, generator) if device.type == "cpu" else None
    if draw is not None:
        shift, few = draw.fractions()
        fractions = (few.float() + shift).div_(_BYTES**2)
    work = torch.empty(3, size if draw is None else min(size, CACHED), dtype=dtype, device=device)
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
            numbers.sub_(uniform.copy_(draw.next(rows.numel()).view(rows.shape)), alpha=1 / _BYTES)
            numbers.sub_(fractions[: rows.numel()].view(rows.shape))
        # Numbers that are not finite must not become levels that there are not.
        piece.cut(levels).copy_(numbers.ceil_().add_(whole)).clamp_(-top, top)
    return levels


class _Bytes:
    """Random bytes for ``size`` numbers, in portions that stay in the cache."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._generator = generator
        self._buffer = torch.empty(-(-min(size, CACHED) // 8), dtype=torch.int64)

    def next(self, count: int) -> Tensor:
        """Draw ``count`` bytes; the last ones are overwritten."""
        words = self._buffer[: -(-count // 8)].random_(-(2**63), None, generator=self._generator)
        return words.view(torch.uint8)[:count]

    def fractions(self) -> tuple[float, Tensor]:
        """Draw what lies between two bytes, for the numbers of a portion: a byte each, and a shift that all share.

        A fraction in units of a byte is their sum over 256. Numbers that have it in common hardly depend on each other,
        because the first byte decides in 255 of 256 cases.
        """
        shift = torch.rand((), generator=self._generator)
        words = torch.empty_like(self._buffer).random_(-(2**63), None, generator=self._generator)
        return float(shift), words.view(torch.uint8)
