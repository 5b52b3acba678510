"""Small integers and their code: of fixed width, an entropy code, or exceptions and the gaps between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.core.blocks import CACHED
from lightning_lbgm.payloads.bits import pack_integers, unpack_integers, where_true
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size
from lightning_lbgm.payloads.entropy import Table, read_stream, stream_bytes, write_stream
from lightning_lbgm.payloads.gaps import (
    bit_lengths,
    count_bit_lengths,
    gap_bits_bytes,
    gaps_of,
    read_gap_bits,
    write_gap_bits,
)
from lightning_lbgm.payloads.sparse import index_dtype

__all__ = ["SHARE", "IntegerCode", "Integers", "choose_code", "read_integers", "write_integers"]

_FIXED, _ENTROPY, _EXCEPTIONS = range(3)
_ENTROPY_SHARE = 24  # below this share of exceptions, their gaps take fewer bits than an entropy code of all
_COMPARED = 7
_FEW = 16  # the share of integers below which the rest are counted into bins
SHARE = 8  # exceptions are kept by their indices if at most an eighth of all are


class Integers(NamedTuple):
    """Integers from -top to top.

    Attributes:
        levels: ``int8``: all of them, or the exceptions from ``base``.
        indices: Where the exceptions stand, increasing; None if all integers are given.
        base: The most frequent integer if exceptions are given; else 0.
        size: How many there are.
        top: 1 to 127.
        counts: How often each from -top to top is among ``levels``, if that is known.
    """

    levels: Tensor
    indices: Tensor | None
    base: int
    size: int
    top: int
    counts: list[int] | None = None

    @staticmethod
    def of(levels: Tensor, top: int) -> Integers:
        """Keep integers, ``int8``, as exceptions from the most frequent one if at most an eighth of them are."""
        size = levels.numel()
        counts = _count(levels, top)
        most = max(counts)
        if SHARE * (size - most) > size:
            return Integers(levels, None, 0, size, top, counts)
        base = counts.index(most) - top if most else 0
        indices = _where_not(levels, base).to(index_dtype(size))
        counts[base + top] = 0
        return Integers(levels[indices], indices, base, size, top, counts)

    @staticmethod
    def at(indices: Tensor, levels: Tensor, base: int, size: int, top: int) -> Integers:
        """Keep the exceptions at some indices, or all integers if they are more than an eighth."""
        sparse = Integers(levels, indices, base, size, top)
        return sparse if SHARE * levels.numel() <= size else Integers(sparse.everywhere(), None, 0, size, top)

    def everywhere(self) -> Tensor:
        """Return all integers, ``int8``, shape ``(size,)``."""
        if self.indices is None:
            return self.levels
        levels = torch.full((self.size,), self.base, dtype=torch.int8, device=self.levels.device)
        levels[self.indices] = self.levels
        return levels


class IntegerCode(NamedTuple):
    """How integers are coded.

    Attributes:
        mode: Fixed width, entropy coded, or exceptions.
        num_bytes: Bytes with the mode and all tables.
        levels: Table of the integers or of the exceptions, None if there is none.
        level_words: Length of their stream.
        gaps: Table of the bit lengths of the gaps between exceptions.
        gap_words: Length of their stream.
    """

    mode: int
    num_bytes: int
    levels: Table | None = None
    level_words: int = 0
    gaps: Table | None = None
    gap_words: int = 0


def choose_code(integers: Integers) -> IntegerCode:
    """Choose the smallest code. Its length follows from counts; nothing is coded yet."""
    levels, indices, base, size, top, known = integers
    fixed = IntegerCode(_FIXED, 1 + -(-size * _width(top) // 8))
    count = levels.numel()
    if not count:
        return min(fixed, IntegerCode(_EXCEPTIONS, 3), key=lambda code: code.num_bytes)
    counts = known or _count(levels, top)
    codes = [fixed]
    if _ENTROPY_SHARE * count > size:
        everywhere = list(counts)
        everywhere[base + top] += size - count
        table = Table.of(everywhere)
        words = table.words(everywhere, bounded=True)
        codes.append(IntegerCode(_ENTROPY, 1 + table.num_bytes + stream_bytes(table, words, size), table, words))
    if indices is not None:
        table = Table.of(counts)
        words = table.words(counts)
        num_bytes = 1 + table.num_bytes + stream_bytes(table, words, count)
        gap_counts = count_bit_lengths(indices, _num_lengths(size))
        gaps = Table.of(gap_counts)
        gap_words = gaps.words(gap_counts, bounded=True)
        num_bytes += varint_size(count) + 1 + gaps.num_bytes
        num_bytes += stream_bytes(gaps, gap_words, count) + gap_bits_bytes(gap_counts)
        codes.append(IntegerCode(_EXCEPTIONS, num_bytes, table, words, gaps, gap_words))
    return min(codes, key=lambda code: code.num_bytes)


def write_integers(out: Writer, integers: Integers, code: IntegerCode) -> None:
    """Write integers in a code that ``choose_code`` has chosen for them."""
    out.byte(code.mode)
    top = integers.top
    if code.mode == _FIXED:
        out.tensor(pack_integers(integers.everywhere().int() + top, _width(top)))
        return
    if code.mode == _EXCEPTIONS:
        out.varint(integers.levels.numel())
        out.byte(integers.base + top)
        if code.gaps is not None and integers.indices is not None:
            gaps = gaps_of(integers.indices.cpu().long()).numpy()
            lengths = bit_lengths(gaps)
            code.gaps.write(out)
            write_stream(out, code.gaps, lengths, code.gap_words)
            write_gap_bits(out, gaps, lengths)
    if code.levels is not None:
        code.levels.write(out)
        levels = integers.everywhere() if code.mode == _ENTROPY else integers.levels
        symbols = levels.cpu().numpy().astype(np.int16) + top
        write_stream(out, code.levels, symbols, code.level_words)


def read_integers(data: Reader, size: int, top: int) -> Integers:
    """Read what ``write_integers`` has written.

    Raises:
        MessageError: If the bytes are no code of ``size`` integers from -top to top.
    """
    mode = data.byte()
    if mode == _FIXED:
        width = _width(top)
        packed = data.tensor(-(-size * width // 8), torch.uint8)
        codes = unpack_integers(packed, size, width)
        if size and int(codes.max()) > 2 * top:
            raise MessageError(f"The message has integers beyond {top}.")
        return Integers.of((codes - top).to(torch.int8), top)
    if mode == _ENTROPY:
        return Integers.of(_read_levels(data, size, top, bounded=True), top)
    if mode != _EXCEPTIONS:
        raise MessageError(f"The message has integers in the unknown code {mode}.")
    count, base = data.varint(size), data.byte() - top
    if SHARE * count > size or base > top:
        raise MessageError(f"The message has {count} exceptions of {size} from the integer {base} of {top}.")
    if not count:
        return Integers(torch.empty(0, dtype=torch.int8), torch.empty(0, dtype=index_dtype(size)), base, size, top)
    indices = _read_indices(data, count, size)
    levels = _read_levels(data, count, top)
    if bool((levels == base).any()):
        raise MessageError("The message has exceptions that are none.")
    return Integers(levels, indices, base, size, top)


def _read_levels(data: Reader, count: int, top: int, *, bounded: bool = False) -> Tensor:
    table = Table.read(data, 2 * top + 1)
    symbols = read_stream(data, table, count, bounded=bounded)
    return torch.from_numpy(symbols.astype(np.int16) - top).to(torch.int8)


def _read_indices(data: Reader, count: int, size: int) -> Tensor:
    table = Table.read(data, _num_lengths(size))
    lengths = read_stream(data, table, count, bounded=True).astype(np.int64)
    gaps = read_gap_bits(data, lengths)
    # First in floating point: sums of absurd gaps wrap around.
    if gaps.sum(dtype=np.float64) + count > 2 * size or int(gaps.sum()) + count > size:
        raise MessageError(f"The message's indices are not {count} increasing numbers below {size}.")
    return torch.from_numpy((gaps + 1).cumsum() - 1).to(index_dtype(size))


def _count(levels: Tensor, top: int) -> list[int]:
    """Count the integers from -top to top."""
    if top <= _COMPARED and levels.device.type == "cpu":
        counts = [0] * (2 * top + 1)
        for part in levels.split(CACHED):
            _add_counts(part.numpy(), top, counts)
        return counts
    found: list[int] = torch.bincount(levels.view(torch.uint8), minlength=256).tolist()
    return [found[level & 255] for level in range(-top, top + 1)]


def _add_counts(levels: NDArray[np.int8], top: int, counts: list[int]) -> None:
    """Add how often each integer occurs.

    Comparisons are vectorised, and counting into bins is not, least of all if most go into the same one: the largest
    magnitudes are counted into bins once few are left.
    """
    left = len(levels)
    for magnitude in range(top + 1):
        if not left:
            return
        if magnitude > 1 and _FEW * left < len(levels) and magnitude < top:
            others = levels[where_true(np.abs(levels) >= magnitude)]
            for index, count in enumerate(np.bincount(others + np.int8(top), minlength=2 * top + 1).tolist()):
                counts[index] += count
            return
        for level in {-magnitude, magnitude}:
            count = int(np.count_nonzero(levels == level))
            counts[level + top] += count
            left -= count


def _where_not(levels: Tensor, base: int) -> Tensor:
    """Return where integers are not the base; NumPy is several times as fast on a CPU."""
    if levels.device.type != "cpu":
        return (levels != base).nonzero().view(-1)
    return torch.from_numpy(where_true(levels.numpy() != base))


def _width(top: int) -> int:
    """Return the bits of a number from 0 to ``2 * top``."""
    return (2 * top).bit_length()


def _num_lengths(size: int) -> int:
    """Return how many bit lengths gaps in ``size`` entries may have."""
    return size.bit_length() + 1
