"""Rounded payload: values in a smaller floating-point format."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.numerics import binary_exponent, is_safe
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import DTYPES, MessageError, Reader, Writer, dtype_code, dtype_name, dtype_named
from lightning_lbgm.payloads.scaled import Scaled, exponent_range

__all__ = ["Rounded", "rounded"]


_CHUNK = 2**15  # entries converted at a time: they stay in the processor's cache
_ACCELERATOR_CHUNK = 2**22


def rounded(numbers: Dense, dtype: torch.dtype) -> Payload:
    """Round numbers to a smaller dtype; others stay as they are.

    They are divided by a power of two before if the largest is beyond the range of the dtype, or below its normal
    numbers, which loses digits.
    """
    values, layout = numbers.values, numbers.layout
    if dtype.itemsize >= values.dtype.itemsize:
        return numbers
    decoded, largest = dtype_name(values.dtype), torch.finfo(dtype).max
    low, high = exponent_range(dtype)
    least, most = exponent_range(values.dtype)
    power = high if low <= least and most <= high else binary_exponent(values)  # bfloat16 has the range of float32
    if power is None or low <= power < high:
        return Rounded(values.to(dtype), decoded, layout)
    if power == high:
        # Half a step beyond the largest number is rounded to it, not to infinity.
        return Rounded(values.clamp(-largest, largest).to(dtype), decoded, layout)
    exponent = max(power - high, least)
    values = (values * 2.0**-exponent).clamp_(-largest, largest)
    return Scaled(Rounded(values.to(dtype), decoded, layout), exponent)


class Rounded(Payload):
    """All values in a smaller dtype than they decode to: a byte that names it, and the values.

    Args:
        values: Shape ``(size,)``.
        decoded: Name of the dtype that they decode to, such as ``"float32"``.
        layout: The parameter tensors.
    """

    fields = ("values", "decoded")
    code = 8

    def __init__(self, values: Tensor, decoded: str, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.values = values
        self.decoded = decoded

    @property
    def dtype(self) -> torch.dtype:
        return dtype_named(self.decoded)

    def dense(self) -> Tensor:
        return self.values.to(self.dtype)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        chunk = self._chunk
        for part, values in zip(out.split(chunk), self.values.split(chunk)):
            part.add_(values.to(self.dtype), alpha=alpha)

    def _dot(self, other: Payload) -> float | None:
        # A chunk at a time, so that no decoded copy of the whole is made.
        if not isinstance(other, (Rounded, Dense)):
            return None
        result = self._sum_of_products(other.values, torch.promote_types(self.dtype, other.dtype))
        if self.dtype != torch.float64 and not is_safe(abs(result)):
            result = self._sum_of_products(other.values, torch.float64)
        return result

    def _sum_of_products(self, values: Tensor, dtype: torch.dtype) -> float:
        chunks = zip(self.values.split(self._chunk), values.split(self._chunk))
        return sum(float(torch.dot(one.to(dtype), two.to(dtype))) for one, two in chunks)

    @property
    def _chunk(self) -> int:
        return _CHUNK if self.values.device.type == "cpu" else _ACCELERATOR_CHUNK

    def split(self) -> list[Payload]:
        parts = self.values.split(self.sizes)
        return [Rounded(part, self.decoded, Layout([shape])) for part, shape in zip(parts, self.layout.shapes)]

    @property
    def num_bits(self) -> int:
        return 8 * (1 + self.values.nbytes)

    def write(self, out: Writer) -> None:
        out.byte(dtype_code(self.values.dtype))
        out.tensor(self.values)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        stored = DTYPES.get(data.byte())
        if stored is None or stored.itemsize >= data.dtype.itemsize:
            raise MessageError(f"The message's values are in no format smaller than {data.dtype}.")
        return cls(data.tensor(size, stored), dtype_name(data.dtype), (size,))
