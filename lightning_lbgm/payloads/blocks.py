"""Block payload: one payload for each parameter tensor, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size

__all__ = ["Blocks"]


class Blocks(Payload):
    """Payloads side by side, such as one for each parameter tensor.

    The body has for each its kind (a byte), its size and its length in bytes (seven bits a byte), and its own body.

    Args:
        parts: The payloads, in order.
        layout: The parameter tensors of all; those of the parts if left out.
    """

    fields = ("parts",)
    code = 3

    def __init__(self, parts: Sequence[Payload], layout: LayoutLike | None = None) -> None:
        super().__init__([shape for part in parts for shape in part.layout.shapes] if layout is None else layout)
        self.parts = list(parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts])

    def _cut(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([part.size for part in self.parts])

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        for part, view in zip(self.parts, self._cut(out)):
            part.add_to(view, alpha)

    def _dot(self, other: Payload) -> float | None:
        if isinstance(other, Blocks) and [p.size for p in self.parts] == [p.size for p in other.parts]:
            return sum(one.dot(two) for one, two in zip(self.parts, other.parts))
        if isinstance(other, Dense):
            return sum(part.dot(Dense(view)) for part, view in zip(self.parts, self._cut(other.values)))
        return None

    def relabel(self, layout: Layout) -> None:
        super().relabel(layout)
        if tuple(part.size for part in self.parts) == layout.sizes:  # the usual case, also with tensors without entries
            for part, shape in zip(self.parts, layout.shapes):
                part.relabel(Layout([shape]))
            return
        shapes = iter(layout.shapes)
        for part in self.parts:
            taken: list[tuple[int, ...]] = []
            while sum(map(math.prod, taken)) < part.size:
                taken.append(next(shapes))
            part.relabel(Layout(taken or [0]))

    def split(self) -> list[Payload]:
        return [part for block in self.parts for part in (block.split() if len(block.sizes) > 1 else [block])]

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        return Blocks([part.compress(encode, factors=factors) for part in self.parts], self.layout)

    @property
    def num_bits(self) -> int:
        bits = 0
        for part in self.parts:
            body = part.num_bits
            bits += body + 8 * (1 + varint_size(part.size) + varint_size(body // 8))
        return bits

    def write(self, out: Writer) -> None:
        for part in self.parts:
            body = part.to_bytes()
            out.byte(part.wire_code())
            out.varint(part.size)
            out.varint(len(body))
            out.raw(body)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        parts: list[Payload] = []
        while data.remaining:
            code, part_size, length = data.byte(), data.varint(), data.varint()
            parts.append(Payload.read_from(data.sub(length), code, part_size))
        if not parts or sum(part.size for part in parts) != size:
            raise MessageError(f"The message's parts have {[part.size for part in parts]} entries, not {size} in all.")
        return cls(parts)
