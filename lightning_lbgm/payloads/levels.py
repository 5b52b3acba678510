"""Level payload: small integers times a scale, coded near the entropy of the integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lbgm.core.blocks import ACCELERATOR, CACHED
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.numerics import is_safe
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size
from lightning_lbgm.payloads.integers import IntegerCode, Integers, choose_code, read_integers, write_integers
from lightning_lbgm.payloads.sparse import Sparse

__all__ = ["MAX_LEVELS", "Levels", "Piece", "compute_dtype", "pieces"]

MAX_LEVELS = 127


class Piece(NamedTuple):
    """Entries that are handled at a time: rows of equal length, each in one bucket.

    Attributes:
        begin: The first entry.
        end: The one after the last.
        bucket: Bucket of the first row.
        rows: Number of rows.
    """

    begin: int
    end: int
    bucket: int
    rows: int

    def cut(self, values: Tensor) -> Tensor:
        """Return the entries as rows, shape ``(rows, n)``."""
        return values[self.begin : self.end].view(self.rows, -1)

    def scales(self, scales: Tensor) -> Tensor:
        """Return the scales of the rows, shape ``(rows, 1)``."""
        return scales[self.bucket : self.bucket + self.rows, None]


def pieces(size: int, bucket_size: int, device: torch.device, phase: int = 0) -> Iterator[Piece]:
    """Cut ``size`` entries into pieces that stay in the cache.

    Args:
        size: How many.
        bucket_size: Entries that have a scale in common; 0: all.
        device: Where they are.
        phase: Entries of the first bucket that come before the first one here.
    """
    chunk = CACHED if device.type == "cpu" else ACCELERATOR
    bucket_size, begin = bucket_size or phase + size, 0
    while begin < size:
        bucket, inside = divmod(phase + begin, bucket_size)
        rows = min(chunk, size - begin) // bucket_size if inside == 0 else 0
        end = begin + rows * bucket_size if rows else min(size, begin + bucket_size - inside, begin + chunk)
        yield Piece(begin, end, bucket, max(1, rows))
        begin = end


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are quantized and decoded: at least single precision."""
    return torch.promote_types(dtype, torch.float32)


class Levels(Payload):
    """Integers from -s to s, of which s decodes to a scale: one for all entries, or one for each bucket of them.

    The integers are kept as exceptions from the most frequent one if at most an eighth of them are, else all. The body
    has s (a byte), the bucket size and phase (seven bits a byte), the scales, and the integers in the smallest of three
    codes: of fixed width, an entropy code (rANS) of all, or one of the exceptions and of the gaps between them. That
    takes about 1 % more than the integers' order-0 entropy and some bytes for tables; less if exceptions cluster.

    Args:
        levels: The integers, ``int8``: all, or the exceptions.
        indices: Where the exceptions stand, increasing; None if all integers are given.
        base: The integer of all other entries.
        scales: What s decodes to: one, or one for each bucket.
        top: s, 1 to 127.
        bucket_size: Entries in a bucket; 0: one scale for all.
        phase: Entries of the first bucket that come before the first one here (if an update was cut).
        layout: The parameter tensors.

    Examples:
        >>> levels = torch.tensor([0, 3, -3, 1], dtype=torch.int8)
        >>> Levels.of(Integers.of(levels, top=3), torch.tensor([6.0]), 0, 0, (4,)).dense().tolist()
        [0.0, 6.0, -6.0, 2.0]
    """

    fields = ("levels", "indices", "base", "scales", "top", "bucket_size", "phase")
    code = 14

    def __init__(
        self,
        levels: Tensor,
        indices: Tensor | None,
        base: int,
        scales: Tensor,
        top: int,
        bucket_size: int,
        phase: int,
        layout: LayoutLike,
    ) -> None:
        super().__init__(layout)
        self.levels = levels
        self.indices = indices
        self.base = base
        self.scales = scales
        self.top = top
        self.bucket_size = bucket_size
        self.phase = phase
        self._counts: list[int] | None = None
        self._code: IntegerCode | None = None
        self._sparse: Sparse | None = None

    @staticmethod
    def of(integers: Integers, scales: Tensor, bucket_size: int, phase: int, layout: LayoutLike) -> Levels:
        """Make one of integers of all entries."""
        levels, indices, base, _, top, counts = integers
        payload = Levels(levels, indices, base, scales, top, bucket_size, phase, layout)
        payload._counts = counts
        return payload

    @property
    def integers(self) -> Integers:
        """The integers of all entries."""
        return Integers(self.levels, self.indices, self.base, self.size, self.top, self._counts)

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    # What it decodes to

    @property
    def sparse(self) -> Sparse | None:
        """The exceptions as a sparse payload, decoded once, if the other entries are zero; else None."""
        if self._sparse is None:
            if self.indices is None or self.base or not self.is_finite():
                return None  # zero times a scale that is not finite is no zero
            scales = self.scales
            if self.bucket_size and scales.numel() > 1:
                scales = scales[(self.indices.long() + self.phase) // self.bucket_size]
            self._sparse = Sparse(self._decode(self.levels, scales), self.indices, self.layout)
        return self._sparse

    def _decode(self, levels: Tensor, scales: Tensor) -> Tensor:
        # Divided first: the largest level is the scale itself, however large.
        wide = compute_dtype(self.dtype)
        numbers = levels.to(wide)
        if self.top > 1:
            numbers.div_(self.top)
        return numbers.mul_(scales.to(wide)).to(self.dtype)

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield where a piece begins and ends, and its values."""
        levels = self.integers.everywhere()
        for piece in pieces(self.size, self.bucket_size, levels.device, self.phase):
            yield piece.begin, piece.end, self._decode(piece.cut(levels), piece.scales(self.scales)).view(-1)

    def dense(self) -> Tensor:
        if self.sparse is not None:
            return self.sparse.dense()
        out = self.scales.new_empty(self.size)
        for begin, end, values in self._pieces():
            out[begin:end] = values
        return out

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        if self.sparse is not None:
            self.sparse.add_to(out, alpha)
            return
        for begin, end, values in self._pieces():
            out[begin:end].add_(values, alpha=alpha)

    def is_finite(self) -> bool:
        if self.scales.numel() == 1:
            return math.isfinite(self.scales)
        return bool(torch.isfinite(self.scales).all())

    def _dot(self, other: Payload) -> float | None:
        if self.sparse is not None:
            if other is self:
                return self.sparse.dot(self.sparse)
            return self.sparse.dot((other.sparse if isinstance(other, Levels) else None) or other)
        if other is not self and not isinstance(other, Dense):
            return None
        result = self._sum_of_products(other, torch.promote_types(self.dtype, other.dtype))
        if self.dtype != torch.float64 and not is_safe(abs(result)):
            result = self._sum_of_products(other, torch.float64)
        return result

    def _sum_of_products(self, other: Payload, dtype: torch.dtype) -> float:
        total = 0.0
        for begin, end, values in self._pieces():
            one = values.to(dtype)
            total += float(torch.dot(one, other.values[begin:end].to(dtype) if isinstance(other, Dense) else one))
        return total

    def split(self) -> list[Payload]:
        parts: list[Payload] = []
        begins = [0, *itertools.accumulate(self.sizes)]
        cuts = list(begins)
        if self.indices is not None:
            cuts = torch.searchsorted(self.indices.cpu().long(), torch.tensor(begins)).tolist()
        for shape, size, begin, first, last in zip(self.layout.shapes, self.sizes, begins, cuts, cuts[1:]):
            levels, bucket, phase = self.levels[first:last], 0, 0
            if self.indices is None:
                integers = Integers.of(levels, self.top)
            else:
                integers = Integers.at(self.indices[first:last] - begin, levels, self.base, size, self.top)
            if self.bucket_size:
                bucket, phase = divmod(self.phase + begin, self.bucket_size)
            scales = self.scales[bucket : bucket + number_of_scales(size, self.bucket_size, phase)]
            parts.append(Levels.of(integers, scales, self.bucket_size, phase, Layout([shape])))
        return parts

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        return self  # there is nothing left to take away

    # What is sent

    @property
    def integer_code(self) -> IntegerCode:
        """How the integers are coded, chosen once."""
        if self._code is None:
            self._code = choose_code(self.integers)
        return self._code

    @property
    def num_bits(self) -> int:
        framing = 1 + varint_size(self.bucket_size) + (varint_size(self.phase) if self.bucket_size else 0)
        return 8 * (framing + self.scales.nbytes + self.integer_code.num_bytes)

    def write(self, out: Writer) -> None:
        out.byte(self.top)
        out.varint(self.bucket_size)
        if self.bucket_size:
            out.varint(self.phase)
        out.tensor(self.scales)
        write_integers(out, self.integers, self.integer_code)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        top, bucket_size = data.byte(), data.varint()
        phase = data.varint() if bucket_size else 0
        if not 1 <= top <= MAX_LEVELS or (bucket_size and phase >= bucket_size):
            raise MessageError(f"The message has {top} levels, from entry {phase} of a bucket of {bucket_size}.")
        scales = data.tensor(number_of_scales(size, bucket_size, phase))
        if bool((scales.signbit() & ~scales.isnan()).any()):
            raise MessageError("The message has a negative scale.")
        return cls.of(read_integers(data, size, top), scales, bucket_size, phase, (size,))


def number_of_scales(size: int, bucket_size: int, phase: int = 0) -> int:
    """Return how many buckets ``size`` entries touch from ``phase`` entries into the first one on."""
    return -(-(phase + size) // (bucket_size or max(1, size))) if size else 0
