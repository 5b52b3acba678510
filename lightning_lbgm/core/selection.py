"""Selection of k of n entries: those of the largest magnitude (top-k), or a random subset."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lbgm.core.blocks import block_size

__all__ = ["largest", "random_subset"]

Numbers = npt.NDArray[np.floating]
Positions = npt.NDArray[np.int64]

_SMALL = 2**12  # entries: of fewer all are compared, or permuted
_SAMPLED = 64  # one entry of so many is in the sample
_DEVIATIONS = 4  # what is random is expected to be off by at most so many standard deviations


def largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k entries of largest magnitude; of equal ones the first.

    On a CPU a sample tells a magnitude that a few more than k entries reach; those alone are compared with each other.
    The result is exact: if fewer than k reach it, all entries are compared.

    Args:
        values: Shape ``(n,)``, finite.
        k: From 0 to n.

    Returns:
        Shape ``(k,)``, ``int64``, increasing.

    Examples:
        >>> largest(torch.tensor([1.0, -4.0, 3.0, 1.0]), 3).tolist()
        [0, 1, 2]
    """
    if k >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        order = torch.sort(values.abs(), descending=True, stable=True).indices  # waits for nothing
        return order[:k].sort().values
    numbers = values.detach().numpy()
    positions, magnitudes = _reaching(numbers, _lower_bound(numbers, k), block_size(values))
    if positions.size < k:
        positions, magnitudes = np.arange(numbers.size), np.abs(numbers)
    return torch.from_numpy(positions[_top(magnitudes, k)])


def _lower_bound(numbers: Numbers, k: int) -> float:
    """Guess from a sample a magnitude that k entries reach, and not many more."""
    size = numbers.size
    if size < _SMALL:
        return 0.0
    stride = max(1, min(_SAMPLED, size // _SMALL))
    while math.gcd(stride, 210) > 1:  # rows of a matrix have like lengths: do not sample one column
        stride += 1
    sample = np.abs(numbers[::stride])
    expected = sample.size * k / size
    rank = int(expected + _DEVIATIONS * (math.sqrt(expected) + 1))
    return float(np.partition(sample, -rank)[-rank]) if rank < sample.size else 0.0


def _reaching(numbers: Numbers, least: float, block: int) -> tuple[Positions, Numbers]:
    """Return where the entries are whose magnitude is at least ``least``, and their magnitudes."""
    positions, magnitudes = [], []
    block = min(block, max(_SMALL, numbers.size // 4))  # of a small vector too not all: new memory costs more
    buffer, mask = np.empty(block, numbers.dtype), np.empty(block, np.bool_)
    for begin in range(0, numbers.size, block):
        part = numbers[begin : begin + block]
        sizes = np.abs(part, out=buffer[: part.size])
        found = np.flatnonzero(np.greater_equal(sizes, numbers.dtype.type(least), out=mask[: part.size]))
        positions.append(found + begin)
        magnitudes.append(sizes[found])
    if len(positions) == 1:
        return positions[0], magnitudes[0]
    return np.concatenate(positions), np.concatenate(magnitudes)


def _top(magnitudes: Numbers, k: int) -> Positions:
    """Return the positions of the k largest, increasing; of equal ones the first."""
    surplus = magnitudes.size - k
    if not surplus or not k:
        return np.arange(k)
    least = np.partition(magnitudes, surplus)[surplus]
    kept = np.flatnonzero(magnitudes >= least)
    if kept.size > k:
        equal = np.flatnonzero(magnitudes[kept] == least)
        kept = np.delete(kept, equal[k - kept.size :])
    return kept


def random_subset(size: int, k: int, generator: torch.Generator) -> Tensor:
    """Return k of ``size`` indices, each set of k with the same probability.

    Of a small size it is the start of a permutation. Otherwise numbers are drawn with repetition, a few more than are
    needed for k different ones, and a random subset of those that are too many is left out, which takes a byte an
    entry.

    Args:
        size: Number of entries.
        k: From 0 to ``size``.
        generator: A CPU generator. Only whole numbers are computed, so that every machine draws alike.

    Returns:
        Shape ``(k,)``, ``int64``, increasing.

    Examples:
        >>> random_subset(3, 3, torch.Generator().manual_seed(0)).tolist()
        [0, 1, 2]
    """
    return torch.from_numpy(_subset(size, k, generator))


def _subset(size: int, k: int, generator: torch.Generator) -> Positions:
    if size < _SMALL:
        return np.sort(torch.randperm(size, generator=generator)[:k].numpy())
    if 2 * k > size:
        left = np.ones(size, np.bool_)
        left[_subset(size, size - k, generator)] = False
        return np.flatnonzero(left)
    if not k:
        return np.arange(0)
    space = 1 << (size - 1).bit_length()  # modulo a power of two, random bits are uniform; what is too large is unused
    drawn, count = np.zeros(space, np.bool_), 0
    while count < k:
        missing = k - count
        # So many draws have `missing` different results in the mean, by the series of -log(1 - missing / size), and a
        # few deviations more.
        draws = missing + sum(missing**power // (power * size ** (power - 1)) for power in range(2, 6))
        draws += _DEVIATIONS * (math.isqrt(missing) + 1)
        drawn[torch.randint(space, (draws * space // size,), generator=generator).numpy()] = True
        count = int(np.count_nonzero(drawn[:size]))
    found = np.flatnonzero(drawn[:size])
    return np.delete(found, _subset(count, count - k, generator))
