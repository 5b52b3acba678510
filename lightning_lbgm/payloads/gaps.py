"""Codes of sparse indices by the gaps between them: Golomb-Rice or a bitmap, and bit lengths with the bits below.

All of it is vectorised: no loop over the entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.payloads.bits import pack_bits, pack_integers, unpack_bits, unpack_integers
from lightning_lbgm.payloads.codec import Reader, Writer

__all__ = [
    "GapCode",
    "bit_lengths",
    "choose_gap_code",
    "count_bit_lengths",
    "decode_gaps",
    "encode_gaps",
    "gap_bits_bytes",
    "gaps_of",
    "read_gap_bits",
    "write_gap_bits",
]

_BIAS = 1022  # of the exponent of a float: what it is above is the bit length; of zero it is 0


class GapCode(NamedTuple):
    """How a set of indices is coded.

    Attributes:
        width: Rice parameter b, in bits; -1 means a bitmap.
        low_bytes: Bytes of the low b bits of every gap.
        high_bytes: Bytes of the rest of every gap in unary, or of the bitmap.
    """

    width: int
    low_bytes: int
    high_bytes: int


def choose_gap_code(indices: Tensor, size: int) -> GapCode:
    """Choose the smaller of a Golomb-Rice code of the gaps and a bitmap.

    A gap is the number of entries left out before an index. Its low b bits are stored as they are, the rest in unary
    (Golomb, "Run-length encodings", IEEE Trans. Inf. Theory 1966): ``1 + b + (gap >> b)`` bits, near the entropy for
    indices spread at random.

    Args:
        indices: Increasing, in ``[0, size)``, shape ``(k,)``.
        size: Number of entries that they point into.
    """
    k = indices.numel()
    if k == 0:
        return GapCode(0, 0, 0)
    gaps, width = gaps_of(indices), max(1, size // k).bit_length() - 1
    on_cpu = gaps.device.type == "cpu"
    # An accelerator is waited for once, not for each width.
    codes = _rice(gaps, [width] if on_cpu else range(max(0, width - 2), width + 3))
    code = codes[width]
    # A gap's high part shrinks by less with every bit of the width, so the size is convex: downhill is the way.
    for step in (-1, 1):
        start = code
        while (width := code.width + step) >= 0:
            if width not in codes:
                codes |= _rice(gaps, [width])
            if _bytes(codes[width]) >= _bytes(code):
                break
            code = codes[width]
        if code != start:
            break
    bitmap = GapCode(-1, 0, -(-size // 8))
    return code if _bytes(code) < _bytes(bitmap) else bitmap


def _rice(gaps: Tensor, widths: Sequence[int]) -> dict[int, GapCode]:
    """Return the codes of gaps with some Rice parameters."""
    k = gaps.numel()
    sums = [(gaps >> width).sum(dtype=torch.int64) for width in widths]
    totals = [int(sums[0])] if len(sums) == 1 else torch.stack(sums).tolist()
    return {width: GapCode(width, -(-k * width // 8), -(-(k + total) // 8)) for width, total in zip(widths, totals)}


def _bytes(code: GapCode) -> int:
    return code.low_bytes + code.high_bytes


def encode_gaps(indices: Tensor, size: int, code: GapCode) -> tuple[Tensor, Tensor]:
    """Return the bytes of the low bits and of the rest, both ``uint8``."""
    if code.width < 0:
        bitmap = torch.zeros(size, dtype=torch.bool, device=indices.device)
        bitmap[indices.long()] = True
        return pack_bits(bitmap[:0]), pack_bits(bitmap)
    gaps = gaps_of(indices)
    # Gap i in unary: as many zeros as its high part says, then a one.
    ends = (gaps >> code.width).cumsum(0) + torch.arange(gaps.numel(), device=gaps.device)
    unary = torch.zeros(int(ends[-1]) + 1 if gaps.numel() else 0, dtype=torch.bool, device=indices.device)
    unary[ends] = True
    return pack_integers(gaps, code.width), pack_bits(unary)


def decode_gaps(low: Tensor, high: Tensor, count: int, size: int, width: int) -> Tensor | None:
    """Undo ``encode_gaps``; None if the bytes are no code of ``count`` indices below ``size``."""
    ones = unpack_bits(high, 8 * high.numel()).nonzero().view(-1)
    if ones.numel() != count:
        return None
    if width < 0:
        indices = ones
    else:
        quotients = torch.diff(ones, prepend=ones.new_tensor([-1])) - 1
        if count and width and int(quotients.max()) >= max(1, size >> width) + 1:
            return None  # before the shift can overflow
        gaps = (quotients << width) + unpack_integers(low, count, width)
        indices = (gaps + 1).cumsum(0) - 1
    # Not the last one only: sums of absurd gaps pass the size before they wrap around.
    return None if count and int(indices.max()) >= size else indices


def gaps_of(indices: Tensor) -> Tensor:
    """Return how many entries are left out before each index, in its dtype."""
    return torch.diff(indices, prepend=indices.new_tensor([-1])) - 1


def bit_lengths(gaps: NDArray[Any]) -> NDArray[np.int64]:
    """Return the bit lengths of numbers below 2^52: the exponents of floats, which ``frexp`` takes longer to find."""
    return np.maximum((gaps.astype(np.float64, copy=False).view(np.int64) >> 52) - _BIAS, 0)


def count_bit_lengths(indices: Tensor, lengths: int) -> list[int]:
    """Count the bit lengths below ``lengths`` of the gaps between indices."""
    ordered = indices.cpu().numpy()
    gaps = np.empty(len(ordered))  # as floats, for the exponents
    gaps[:1] = ordered[:1]
    np.subtract(ordered[1:], ordered[:-1], out=gaps[1:])
    gaps[1:] -= 1
    exponents = gaps.view(np.int64)
    exponents >>= 52
    counted = np.bincount(exponents, minlength=_BIAS + lengths)
    return [int(counted[0]), *counted[_BIAS + 1 :].tolist()]


def write_gap_bits(out: Writer, gaps: NDArray[Any], lengths: NDArray[Any]) -> None:
    """Write what the bit lengths of gaps leave open, the bits below the highest, for one length after the other."""
    bits = [
        (gaps[lengths == length][:, None] >> np.arange(length - 1) & 1).astype(np.uint8).reshape(-1)
        for length in range(2, int(lengths.max(initial=0)) + 1)
    ]
    out.raw(np.packbits(np.concatenate(bits), bitorder="little").tobytes() if bits else b"")


def read_gap_bits(data: Reader, lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Read the gaps of given bit lengths that ``write_gap_bits`` has written."""
    counts = np.bincount(lengths, minlength=2)
    packed = np.frombuffer(data.take(gap_bits_bytes(counts.tolist())), dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")
    gaps = (lengths > 0).astype(np.int64)
    position = 0
    for length in range(2, len(counts)):
        count = int(counts[length])
        low = bits[position : position + count * (length - 1)].reshape(count, length - 1)
        gaps[lengths == length] = (low.astype(np.int64) << np.arange(length - 1)).sum(1) + (1 << length - 1)
        position += low.size
    return gaps


def gap_bits_bytes(counts: Sequence[int]) -> int:
    """Return the bytes that ``write_gap_bits`` writes for so many gaps of each bit length."""
    return -(-sum(count * max(0, length - 1) for length, count in enumerate(counts)) // 8)
