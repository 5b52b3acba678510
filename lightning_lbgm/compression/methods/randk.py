"""Rand-K, random sparsification, unbiased.

Stich, Cordonnier, Jaggi: "Sparsified SGD with Memory", NeurIPS 2018 (arXiv 1809.07599); the indices follow from a seed,
as the random masks of Konecny et al.: "Federated Learning: Strategies for Improving Communication Efficiency", 2016
(arXiv 1610.05492).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.layout import LayoutLike
from lightning_lbgm.core.selection import random_subset
from lightning_lbgm.core.validation import check_fraction
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size
from lightning_lbgm.payloads.sparse import Sparse, index_dtype

__all__ = ["RandK", "RandomSparse"]

_MAX_SEED = 2**63 - 1


class RandomSparse(Payload):
    """Some values at places that follow from a seed.

    The body has the seed (64 bits), the number of values and the values. Both ends draw alike, by ``random_subset``
    and torch's generator of the CPU.

    Args:
        values: Shape ``(k,)``, or a payload of k entries.
        seed: In ``[0, 2**63)``.
        unbiased: Whether values decode times M / k.
        layout: The parameter tensors.
    """

    fields = ("body", "seed", "unbiased")
    code = 5

    def __init__(self, values: Tensor | Payload, seed: int, unbiased: bool, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.body = values if isinstance(values, Payload) else Dense(values)
        self.seed = seed
        self.unbiased = unbiased
        self._indices: Tensor | None = None  # drawn once
        self._sparse: Sparse | None = None

    @staticmethod
    def draw(values: Tensor, k: int, seed: int, unbiased: bool, layout: LayoutLike) -> RandomSparse:
        """Keep k of ``values``, shape ``(size,)``, chosen by the seed."""
        indices = _draw(seed, values.numel(), k).to(values.device, index_dtype(values.numel()))
        payload = RandomSparse(values.index_select(0, indices), seed, unbiased, layout)
        payload._indices = indices
        return payload

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    @property
    def sparse(self) -> Sparse:
        """The same with its indices, made once."""
        if self._sparse is None:
            values = self.body.dense()
            if self.unbiased:
                values = values * (self.size / values.numel())
            if self._indices is None:
                self._indices = _draw(self.seed, self.size, values.numel()).to(values.device, index_dtype(self.size))
            self._sparse = Sparse(values, self._indices, self.layout)
        return self._sparse

    def dense(self) -> Tensor:
        return self.sparse.dense()

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self.sparse.add_to(out, alpha)

    def _dot(self, other: Payload) -> float | None:
        if other is self:
            return self.sparse.dot(self.sparse)
        return self.sparse.dot(other.sparse if isinstance(other, RandomSparse) else other)

    def split(self) -> list[Payload]:
        return self.sparse.split()

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        payload = RandomSparse(self.body.compress(encode, factors=factors), self.seed, self.unbiased, self.layout)
        payload._indices = self._indices
        return payload

    @property
    def num_bits(self) -> int:
        return 8 * (8 + 1 + varint_size(self.body.size) + 1) + self.body.num_bits

    def write(self, out: Writer) -> None:
        out.u64(self.seed)
        out.byte(self.unbiased)
        out.varint(self.body.size)
        self.body.write_inside(out)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        seed, unbiased, count = data.u64() & _MAX_SEED, bool(data.byte()), data.varint(size)
        if not count:
            raise MessageError("The message holds no value.")
        return cls(Payload.read_inside(data, count), seed, unbiased, (size,))


class RandK(Stage):
    """Send entries chosen at random, and the seed that they follow from.

    ``k = max(1, round(fraction * M))`` values and 64 bits of seed are sent: no indices.

    Args:
        fraction: Share of the entries to send, in (0, 1].
        unbiased: Whether the server scales the values by M / k, so that the mean over the choice is the update (but at
            most to the largest number of the dtype). Set it to False inside ``ErrorFeedback``, which would add up what
            the scaling overshoots.

    Raises:
        TypeError: If ``fraction`` is not a number.
        ValueError: If it is outside (0, 1].

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = RandK(0.5).encode(Dense(torch.ones(4)), {}).payload
        >>> sorted(payload.dense().tolist())
        [0.0, 0.0, 2.0, 2.0]
    """

    def __init__(self, fraction: float, unbiased: bool = True) -> None:
        self.fraction = check_fraction("RandK", "fraction", fraction)
        self.unbiased = bool(unbiased)

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        values = update.dense()
        k = max(1, round(self.fraction * values.numel()))
        payload = RandomSparse.draw(values, k, context.draw_seed(), self.unbiased, update.layout)
        if self.unbiased:
            # Less a few roundings, so that what the server scales stays finite.
            largest = torch.finfo(values.dtype).max * (k / max(1, values.numel())) * (1 - 1e-6)
            payload.body.dense().clamp_(-largest, largest)
        return Encoded(payload)


def _draw(seed: int, size: int, k: int) -> Tensor:
    """Return k of ``size`` indices, increasing."""
    return random_subset(size, k, torch.Generator().manual_seed(seed))
