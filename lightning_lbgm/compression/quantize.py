"""Stochastic rounding to evenly spaced levels, so that the mean over the rounding is the number.

A random float an entry would take longer than all the rest on a CPU. There a random byte an entry decides. What is
finer than a byte comes from a draw of their own for the few entries that the byte leaves open, or, if there is one
level, from random fractions that entries far apart share.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.compression.stage import Context, Encoded
from lightning_lbgm.core.blocks import CACHED, block_size, scratch
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.bits import where_true
from lightning_lbgm.payloads.integers import SHARE, Integers
from lightning_lbgm.payloads.levels import Levels, compute_dtype, pieces
from lightning_lbgm.payloads.sparse import index_dtype

__all__ = ["Scale", "encode_levels", "quantize"]

Scale = Literal["max", "norm"]

_BYTES = 256
_SAFE_NORM = (1e-13, 1e18)  # in single precision squares of other numbers under- or overflow
_ORDINARY = (1e-30, 1e30)  # scales whose reciprocal times 2 ** 15 is finite and normal
_FRACTIONS = 2048  # random fractions of a byte, shared by entries so far apart: at most 64 have one in common
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
    ordinary = None
    if values.dtype == torch.float32 and values.device.type == "cpu" and size:
        ordinary = _with_ordinary_scales(values, scales, bucket_size)
    if ordinary is None:
        integers = _round(values, scales, top, bucket_size, generator)
    elif top == 1 and not bucket_size:
        integers = _round_to_signs(*ordinary, generator)
    else:
        integers = _round_by_bytes(*ordinary, top, bucket_size, generator)
    return Levels.of(integers, scales, bucket_size, 0, numbers.layout)


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
        if rows.device.type == "cpu":
            largest = rows.new_tensor([abs(max(-least.item(), most.item()))])
        else:
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


def _with_ordinary_scales(values: Tensor, scales: Tensor, bucket_size: int) -> tuple[Tensor, Tensor] | None:
    """Multiply buckets by powers of two if some scale is extreme; None if one is not finite."""
    of_buckets = scales.detach().numpy()
    if len(of_buckets) == 1:  # NumPy's reductions take longer than all else here
        least = most = float(of_buckets[0]) or 1.0
    else:
        least, most = np.where(of_buckets > 0, of_buckets, np.float32(1)).min(), of_buckets.max()
    if least > _ORDINARY[0] and most < _ORDINARY[1]:
        return values, scales
    if not np.isfinite(of_buckets).all():
        return None
    _, powers = np.frexp(of_buckets)
    of_entries = np.repeat(powers, bucket_size)[: values.numel()] if bucket_size else powers
    array = np.ldexp(values.detach().numpy(), -of_entries)
    return torch.from_numpy(array), torch.from_numpy(np.ldexp(of_buckets, -powers))


def _round_to_signs(values: Tensor, scales: Tensor, generator: torch.Generator) -> Integers:
    """Round numbers to -1, 0 or 1 times the scale of all.

    An entry is not zero if its random byte is below 256 times its share of the scale, which is rounded at random to a
    whole number first.
    """
    scale, size = float(scales) or 1.0, values.numel()
    array, draw = values.detach().numpy(), _Draws(size, generator)
    # The largest has no less than 256, whatever the round-off: it is always sent.
    factor = np.float32(_BYTES * (1 + 2.0**-22) / scale)
    most = min(size, CACHED)
    rows = scratch("numbers", -(-most // _FRACTIONS) * _FRACTIONS, np.float32).reshape(-1, _FRACTIONS)
    numbers, units = rows.reshape(-1), scratch("units", most, np.uint16)
    is_sent = scratch("is_sent", size, np.bool_) if size <= CACHED else np.empty(size, dtype=np.bool_)
    fractions = draw.fractions()
    for begin in range(0, size, CACHED):
        end = min(size, begin + CACHED)
        number, unit = numbers[: end - begin], units[: end - begin]
        np.multiply(array[begin:end], factor, out=number)
        np.absolute(number, out=number)
        padded = rows[: -(-(end - begin) // _FRACTIONS)]
        numbers[end - begin : padded.size] = 0  # what memory held before may be no number
        padded += fractions
        np.copyto(unit, number, casting="unsafe")
        np.less(draw.bytes(end - begin), unit, out=is_sent[begin:end])
    num_sent = int(np.count_nonzero(is_sent))
    if SHARE * num_sent > size:
        is_negative = np.signbit(array).view(np.uint8)
        is_negative &= is_sent.view(np.uint8)
        is_negative <<= 1
        return Integers.of(torch.from_numpy((is_sent.view(np.uint8) - is_negative).view(np.int8)), 1)
    indices = where_true(is_sent)
    signs = np.signbit(array.take(indices)).view(np.int8)
    negative = int(np.count_nonzero(signs))
    signs *= -2
    signs += 1
    places = torch.from_numpy(indices.astype(np.int32 if index_dtype(size) == torch.int32 else np.int64))
    return Integers(torch.from_numpy(signs), places, 0, size, 1, [negative, 0, num_sent - negative])


def _round_by_bytes(values: Tensor, scales: Tensor, top: int, bucket_size: int, generator: torch.Generator) -> Integers:
    """Do what ``_round`` does, from other draws, in a fraction of its time.

    In units of a byte, a number less its random byte and fraction goes up to a multiple of 256. That is known from
    whole numbers, unless the difference to the byte is next to a multiple: one entry in a hundred, which is rounded in
    floating point.
    """
    of_buckets = scales.detach().numpy()
    divisors = np.where(of_buckets > 0, of_buckets, np.float32(1))
    size, array = values.numel(), values.detach().numpy()
    factors = torch.from_numpy(np.float32(_BYTES * top) / divisors)
    draw = _Draws(size, generator)
    most = min(size, CACHED)
    numbers, levels = scratch("numbers", most, np.float32), np.empty(size, dtype=np.uint8)
    units, lows, flags = (scratch("units", most, dtype) for dtype in (np.uint16, np.uint8, np.bool_))
    for piece in pieces(size, bucket_size, values.device):
        count = piece.end - piece.begin
        number, unit, low, flag = numbers[:count], units[:count], lows[:count], flags[:count]
        level, draws = levels[piece.begin : piece.end], draw.bytes(count)
        torch.mul(piece.cut(values), piece.scales(factors), out=torch.from_numpy(number).view(piece.rows, -1))
        number += _BYTES * (top + 1) + _MARGIN  # above zero, and never rounded below its whole part
        np.copyto(unit, number, casting="unsafe")
        np.copyto(low, unit, casting="unsafe")
        np.copyto(level, np.right_shift(unit, 8, out=unit), casting="unsafe")
        level -= np.greater(draws, low, out=flag).view(np.uint8)
        at = np.flatnonzero(np.less(np.subtract(low, draws, out=low), 2, out=flag))
        rows = at // (count // piece.rows) + piece.bucket
        exact = (array[at + piece.begin] / divisors[rows] * np.float32(top)).astype(np.float64)
        whole = np.floor(exact)
        exact -= whole
        level[at] = whole + (draw.uniform(draws[at]) < exact) + top
    levels -= np.uint8(top)
    return Integers.of(torch.from_numpy(levels.view(np.int8)), top)


def _round(values: Tensor, scales: Tensor, top: int, bucket_size: int, generator: torch.Generator) -> Integers:
    """Round all numbers, of any dtype and on any device."""
    size, dtype, device = values.numel(), compute_dtype(values.dtype), values.device
    levels = torch.empty(size, dtype=torch.int8, device=device)
    divisors = torch.where(scales > 0, scales, 1.0).to(dtype)
    work = torch.empty(3, min(size, block_size(values)), dtype=dtype, device=device)
    for piece in pieces(size, bucket_size, device):
        rows = piece.cut(values)
        numbers, whole, uniform = work[:, : rows.numel()].view(3, *rows.shape)
        # Divided first: a scale may be tiny, and the largest magnitude is the highest level to the bit.
        torch.div(rows, piece.scales(divisors), out=numbers)
        if top > 1:
            numbers.mul_(top)
        torch.floor(numbers, out=whole)
        # A number goes up if its fraction is above a uniform number: if the difference, above -1, is positive.
        numbers.sub_(whole).sub_(uniform.uniform_(generator=generator))
        # Numbers that are not finite must not become levels that there are not.
        piece.cut(levels).copy_(numbers.ceil_().add_(whole)).clamp_(-top, top)
    return Integers.of(levels, top)


class _Draws:
    """Random bytes, and numbers that begin with one of them."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._generator = generator
        self._buffer = torch.from_numpy(scratch("random bytes", -(-min(size, CACHED) // 8), np.int64))

    def bytes(self, count: int) -> NDArray[np.uint8]:
        """Draw ``count`` bytes; the last ones are overwritten."""
        return self._words(self._buffer[: -(-count // 8)]).view(np.uint8)[:count]

    def uniform(self, first: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Draw uniform numbers from 0 to 1 whose first byte is known."""
        words = self._words(torch.empty(len(first), dtype=torch.int64))
        numbers = (words >> 11).astype(np.float64) * 2.0**-53
        numbers += first
        numbers /= _BYTES
        return numbers

    def fractions(self) -> NDArray[np.float32]:
        """Draw numbers from 0 to below 1: 16 bits each, and what lies between these alike for all."""
        words = self._words(torch.empty(_FRACTIONS // 4 + 1, dtype=torch.int64))
        numbers: NDArray[np.float32] = words[1:].view(np.uint16).astype(np.float32)
        numbers += (int(words[0]) >> 56) * 2.0**-8  # exact, so that they stay below one
        numbers *= np.float32(2.0**-16)
        return numbers

    def _words(self, out: Tensor) -> NDArray[np.uint64]:
        """Fill with random bits."""
        return out.random_(-(2**63), None, generator=self._generator).numpy().view(np.uint64)
