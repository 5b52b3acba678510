"""Sparse payload: some of an update's entries and their indices."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.numerics import inner
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size
from lightning_lbgm.payloads.gaps import GapCode, choose_gap_code, decode_gaps, encode_gaps

__all__ = ["Sparse", "index_dtype"]

_BITMAP = 255


def index_dtype(size: int) -> torch.dtype:
    """Return the smallest dtype of indices into ``size`` entries that torch indexes with."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


class Sparse(Payload):
    """Some values and where they stand.

    The body has the number of values, the indices (a Golomb-Rice code of the gaps between them or a bitmap, whichever
    is smaller; about ``log2(M / k) + 1.5`` bits each if k of M are spread at random), and the values.

    Args:
        values: Shape ``(k,)``; or a payload of k entries, such as signs.
        indices: Shape ``(k,)``, ``int32`` and increasing (``int64`` for 2^31 parameters or more).
        layout: The parameter tensors.

    Examples:
        >>> payload = Sparse(torch.tensor([5.0, -7.0]), torch.tensor([1, 3], dtype=torch.int32), (4,))
        >>> payload.dense().tolist(), payload.num_bits  # 2 floats; a byte of bitmap; 4 bytes say how many, how, what
        ([0.0, 5.0, 0.0, -7.0], 104)
    """

    fields = ("body", "indices")
    code = 4

    def __init__(self, values: Tensor | Payload, indices: Tensor, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.body = values if isinstance(values, Payload) else Dense(values)
        self.indices = indices
        self._gap_code: GapCode | None = None

    @property
    def values(self) -> Tensor:
        """The values, decoded, shape ``(k,)``."""
        return self.body.dense()

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def dense(self) -> Tensor:
        values = self.values
        out = values.new_zeros(self.size)
        out[self.indices] = values
        return out

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        out.index_add_(0, self.indices, self.values.to(out.dtype), alpha=alpha)

    def _dot(self, other: Payload) -> float | None:
        if other is self:
            return self.body.dot(self.body)
        if isinstance(other, Sparse):
            few, many = sorted((self, other), key=lambda payload: payload.indices.numel())
            if not few.indices.numel():
                return 0.0
            at = torch.searchsorted(many.indices, few.indices).clamp_(max=many.indices.numel() - 1)
            common = many.indices[at] == few.indices
            return inner(few.values[common], many.values[at[common]])
        if isinstance(other, Dense):
            return inner(self.values, other.values[self.indices])
        return None

    def split(self) -> list[Payload]:
        ends = torch.tensor(self.sizes).cumsum(0)
        cuts = [0, *torch.searchsorted(self.indices.cpu().long(), ends).tolist()]
        body = copy.copy(self.body)
        body.layout = Layout(end - begin for begin, end in itertools.pairwise(cuts))
        parts: list[Payload] = []
        offset = 0
        for piece, begin, end, shape, size in zip(body.split(), cuts, cuts[1:], self.layout.shapes, self.sizes):
            parts.append(Sparse(piece, self.indices[begin:end] - offset, Layout([shape])))
            offset += size
        return parts

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        if not self.indices.numel():
            return self
        return Sparse(self.body.compress(encode, factors=factors), self.indices, self.layout)

    @property
    def gap_code(self) -> GapCode:
        """How the indices are coded, chosen once."""
        if self._gap_code is None:
            self._gap_code = choose_gap_code(self.indices, self.size)
        return self._gap_code

    @property
    def num_bits(self) -> int:
        _, low, high = self.gap_code
        framing = varint_size(self.indices.numel()) + 1 + varint_size(high) + 1
        return 8 * (framing + low + high) + self.body.num_bits

    def write(self, out: Writer) -> None:
        code = self.gap_code
        low, high = encode_gaps(self.indices, self.size, code)
        out.varint(self.indices.numel())
        out.byte(_BITMAP if code.width < 0 else code.width)
        out.varint(code.high_bytes)
        out.tensor(low)
        out.tensor(high)
        self.body.write_inside(out)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        count, width, high_bytes = data.varint(size), data.byte(), data.varint()
        if width == _BITMAP:
            width = -1
        elif width > 40:
            raise MessageError(f"The message's indices have a Rice parameter of {width}.")
        low = data.tensor(-(-count * max(0, width) // 8), torch.uint8)
        high = data.tensor(high_bytes, torch.uint8)
        indices = decode_gaps(low, high, count, size, width)
        if indices is None:
            raise MessageError(f"The message's indices are not {count} increasing numbers below {size}.")
        body = Payload.read_inside(data, count)
        return cls(body, indices.to(index_dtype(size)), (size,))
