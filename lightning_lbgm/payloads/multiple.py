"""Multiple of a payload, for updates that would fall short or overshoot."""

from __future__ import annotations

import math
import struct

from torch import Tensor

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer
from lightning_lbgm.payloads.wrapped import Wrapped

__all__ = ["Multiple"]

_FACTOR = struct.Struct("<f")


class Multiple(Wrapped):
    """Another payload, decoded times a factor in ``float32``: four bytes of the factor, its kind (a byte) and its body.

    Args:
        body: The payload.
        factor: A finite number that ``float32`` holds exactly; see ``representable``.

    Examples:
        >>> import torch
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = Multiple(Dense(torch.tensor([2.0, -4.0])), 0.5)
        >>> payload.dense().tolist(), payload.num_bits
        ([1.0, -2.0], 104)
    """

    fields = ("body", "factor")
    code = 20

    def __init__(self, body: Payload, factor: float, layout: Layout | None = None) -> None:
        super().__init__(body, layout)
        self.factor = factor

    @staticmethod
    def representable(factor: float) -> float:
        """Return the nearest number of ``float32``, so that both ends have the same."""
        return float(_FACTOR.unpack(_FACTOR.pack(factor))[0])

    def dense(self) -> Tensor:
        return self.body.dense() * self.factor

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self.body.add_to(out, alpha * self.factor)

    def _dot(self, other: Payload) -> float | None:
        if isinstance(other, Multiple):
            return self.factor * other.factor * self.body.dot(other.body)
        return self.factor * self.body.dot(other)

    def split(self) -> list[Payload]:
        return [Multiple(part, self.factor) for part in self.body.split()]

    @property
    def num_bits(self) -> int:
        return 8 * (_FACTOR.size + 1) + self.body.num_bits

    def write(self, out: Writer) -> None:
        out.raw(_FACTOR.pack(self.factor))
        self.body.write_inside(out)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        factor = float(_FACTOR.unpack(data.take(_FACTOR.size))[0])
        if not math.isfinite(factor):
            raise MessageError(f"The message's values are times {factor}.")
        return cls(Payload.read_inside(data, size), factor)
