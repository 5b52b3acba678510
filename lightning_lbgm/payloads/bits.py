"""Bit packing of small integers into bytes, and the Golomb-Rice code of sparse indices.

All of it is vectorised: no loop over the entries. Bit ``i % 8`` of byte ``i // 8`` is bit ``i`` of a stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_lbgm.core.blocks import block_size

__all__ = [
    "GapCode",
    "choose_gap_code",
    "count_bits",
    "decode_gaps",
    "encode_gaps",
    "pack_bits",
    "pack_integers",
    "pack_signs",
    "unpack_bits",
    "unpack_integers",
]

_WEIGHTS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_SHIFTS = torch.arange(8, dtype=torch.uint8)
_POPULATION = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans, shape ``(n,)``, into ``uint8``, shape ``(ceil(n / 8),)``; zeros fill the last byte."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (padded * _WEIGHTS.to(bits.device)).sum(1, dtype=torch.uint8)


def pack_signs(values: Tensor) -> Tensor:
    """Pack ``values >= 0``, shape ``(n,)``, as ``pack_bits`` does."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return pack_bits(values >= 0)
    numbers, block = values.detach().numpy(), block_size(values)
    if numbers.size <= block:
        return torch.from_numpy(np.packbits(numbers >= 0, bitorder="little"))
    packed, mask = np.empty(-(-numbers.size // 8), np.uint8), np.empty(block, np.bool_)
    for begin in range(0, numbers.size, block):
        part = numbers[begin : begin + block]
        positive = np.greater_equal(part, 0, out=mask[: part.size])
        packed[begin // 8 : -(-(begin + part.size) // 8)] = np.packbits(positive, bitorder="little")
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` bits as ``uint8`` of shape ``(count,)``."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little"))[:count]
    return ((packed[:, None] >> _SHIFTS.to(packed.device)) & 1).view(-1)[:count]


def count_bits(packed: Tensor) -> int:
    """Return the number of bits that are set."""
    if packed.device.type == "cpu":
        return int(np.count_nonzero(np.unpackbits(packed.numpy())))
    return int(_POPULATION.to(packed.device)[packed.int()].sum(dtype=torch.int64))


def pack_integers(values: Tensor, width: int) -> Tensor:
    """Pack the lowest ``width`` bits of integers, shape ``(n,)``, into ``ceil(n * width / 8)`` bytes."""
    if width in (2, 4, 8):  # whole numbers to a byte
        lanes = 8 // width
        low = (values & (2**width - 1)).to(torch.uint8)
        padded = torch.nn.functional.pad(low, (0, -values.numel() % lanes)).view(-1, lanes)
        packed = padded[:, 0].clone()
        for lane in range(1, lanes):
            packed |= padded[:, lane] << (lane * width)
        return packed
    bits = torch.empty(values.numel(), width, dtype=torch.uint8, device=values.device)
    for position in range(width):
        bits[:, position] = (values >> position) & 1
    return pack_bits(bits.view(-1))


def unpack_integers(packed: Tensor, count: int, width: int) -> Tensor:
    """Return ``count`` integers of ``width`` bits as ``int64``."""
    if width == 0:
        return torch.zeros(count, dtype=torch.int64, device=packed.device)
    if width in (2, 4, 8):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & (2**width - 1)).view(-1)[:count].long()
    bits = unpack_bits(packed, count * width).view(count, width)
    out = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for position in range(width):  # not a product with weights: it would take eight bytes a bit
        out += bits[:, position].long() << position
    return out


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
    gaps = _gaps(indices)
    best = GapCode(-1, 0, -(-size // 8))
    typical = max(1, size // k).bit_length() - 1
    for width in sorted({0, *range(max(0, typical - 4), typical + 2)}):  # 0: many in a row
        unary = k + int((gaps >> width).sum())
        code = GapCode(width, -(-k * width // 8), -(-unary // 8))
        if code.low_bytes + code.high_bytes < best.low_bytes + best.high_bytes:
            best = code
    return best


def encode_gaps(indices: Tensor, size: int, code: GapCode) -> tuple[Tensor, Tensor]:
    """Return the bytes of the low bits and of the rest, both ``uint8``."""
    if code.width < 0:
        bitmap = torch.zeros(size, dtype=torch.bool, device=indices.device)
        bitmap[indices.long()] = True
        return pack_bits(bitmap[:0]), pack_bits(bitmap)
    gaps = _gaps(indices)
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


def _gaps(indices: Tensor) -> Tensor:
    wide = indices.long()
    return torch.diff(wide, prepend=wide.new_tensor([-1])) - 1
