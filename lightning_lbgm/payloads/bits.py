"""Bit packing of small integers into bytes.

All of it is vectorised: no loop over the entries. Bit ``i % 8`` of byte ``i // 8`` is bit ``i`` of a stream.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lbgm.core.blocks import block_size

__all__ = ["count_bits", "pack_bits", "pack_integers", "pack_signs", "unpack_bits", "unpack_integers", "where_true"]

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


def where_true(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return where a contiguous mask is true.

    Eight at a time first: NumPy's own search is as fast as memory only if few are true, for each costs a branch that
    the processor predicts wrongly.
    """
    whole = len(mask) // 8 * 8
    words = mask[:whole].view(np.uint64)
    some = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[some].view(np.bool_))
    found = some[inside >> 3]
    found <<= 3
    inside &= 7
    found += inside
    return found if whole == len(mask) else np.concatenate([found, np.flatnonzero(mask[whole:]) + whole])
