"""Scaled payload: another one times a power of two, for numbers beyond the range of its format."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.core.numerics import times_power
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer
from lightning_lbgm.payloads.wrapped import Wrapped

__all__ = ["Scaled", "exponent_range"]

_EXPONENT_BYTES = 2


def exponent_range(dtype: torch.dtype) -> tuple[int, int]:
    """Return the least and the largest e with ``2 ** e`` a normal number of a dtype.

    Examples:
        >>> exponent_range(torch.float16)
        (-14, 15)
    """
    info = torch.finfo(dtype)
    return math.frexp(info.smallest_normal)[1] - 1, math.frexp(info.max)[1] - 1


class Scaled(Wrapped):
    """Another payload, decoded times ``2 ** exponent``: two bytes of the exponent, its kind (a byte) and its body.

    Args:
        body: The payload.
        exponent: So that ``2 ** exponent`` is a normal number of the payload's dtype.
    """

    fields = ("body", "exponent")
    code = 12

    def __init__(self, body: Payload, exponent: int, layout: Layout | None = None) -> None:
        super().__init__(body, layout)
        self.exponent = exponent

    def dense(self) -> Tensor:
        return self.body.dense() * 2.0**self.exponent

    def _dot(self, other: Payload) -> float | None:
        if other is self:
            return times_power(self.body.dot(self.body), 2 * self.exponent)
        if isinstance(other, Scaled):
            return times_power(self.body.dot(other.body), self.exponent + other.exponent)
        return times_power(self.body.dot(other), self.exponent)

    def split(self) -> list[Payload]:
        return [Scaled(part, self.exponent) for part in self.body.split()]

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        return Scaled(self.body.compress(encode, factors=factors), self.exponent)

    @property
    def num_bits(self) -> int:
        return 8 * (_EXPONENT_BYTES + 1) + self.body.num_bits

    def write(self, out: Writer) -> None:
        out.raw(self.exponent.to_bytes(_EXPONENT_BYTES, "little", signed=True))
        self.body.write_inside(out)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        exponent = int.from_bytes(data.take(_EXPONENT_BYTES), "little", signed=True)
        least, largest = exponent_range(data.dtype)
        if not least <= exponent <= largest:
            raise MessageError(f"The message's values are times 2 ** {exponent}, which {data.dtype} does not hold.")
        return cls(Payload.read_inside(data, size), exponent)
