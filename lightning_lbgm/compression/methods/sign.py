"""Sign compression (signSGD): one bit an entry and a scale.

Bernstein, Wang, Azizzadenesheli, Anandkumar: "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018
(arXiv 1802.04434); the scale is that of Karimireddy, Rebjock, Stich, Jaggi: "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", ICML 2019 (arXiv 1901.09847). After ``TopK`` it is the sparse ternary compression of
Sattler, Wiedemann, Mueller, Samek, IEEE Trans. Neural Networks and Learning Systems 2020 (arXiv 1903.02891).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.blocks import block_size
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.bits import count_bits, pack_bits, pack_signs, unpack_bits
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer

__all__ = ["SignSGD", "Signs"]

_BYTES = torch.arange(256, dtype=torch.uint8)
_SIGNS = unpack_bits(_BYTES, 8 * 256).view(256, 8).to(torch.int8) * 2 - 1


class Signs(Payload):
    """One sign bit for each entry, eight to a byte, and one scale: ``8 * ceil(size / 8)`` bits and the scale's.

    Args:
        bits: Shape ``(ceil(size / 8),)``, ``uint8``; bit ``i % 8`` of byte ``i // 8`` is set where entry ``i >= 0``.
        scale: Shape ``()``, the magnitude that every entry decodes to.
        layout: The parameter tensors.
    """

    fields = ("bits", "scale")
    code = 6

    def __init__(self, bits: Tensor, scale: Tensor, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.bits = bits
        self.scale = scale

    @staticmethod
    def pack(values: Tensor, scale: Tensor, layout: LayoutLike) -> Signs:
        """Keep the signs of ``values``, shape ``(size,)``; zero counts as positive."""
        return Signs(pack_signs(values), scale, layout)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dense(self) -> Tensor:
        return self._table().index_select(0, self.bits.int()).view(-1)[: self.size]

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        table, block = self._table(), block_size(out)
        rows = table.new_empty(min(block // 8, self.bits.numel()), 8)
        for part, packed in zip(out.split(block), self.bits.split(block // 8)):
            decoded = torch.index_select(table, 0, packed.int(), out=rows[: packed.numel()])
            part.add_(decoded.view(-1)[: part.numel()], alpha=alpha)

    def _table(self) -> Tensor:
        """Return what the eight entries of each byte decode to, shape ``(256, 8)``."""
        return _SIGNS.to(self.scale.device, self.dtype) * self.scale

    def _dot(self, other: Payload) -> float | None:
        if not isinstance(other, Signs):
            return None
        # Equal signs less unequal ones.
        agreement = self.size if other is self else self.size - 2 * count_bits(self.bits ^ other.bits)
        return float(self.scale) * float(other.scale) * agreement

    def split(self) -> list[Payload]:
        parts = unpack_bits(self.bits, self.size).split(self.sizes)
        return [Signs(pack_bits(part), self.scale, Layout([s])) for part, s in zip(parts, self.layout.shapes)]

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        return self  # there is nothing left to take away

    def write(self, out: Writer) -> None:
        out.tensor(self.bits)
        out.tensor(self.scale)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        bits = data.tensor(-(-size // 8), torch.uint8)
        if size % 8 and int(bits[-1]) >> size % 8:
            raise MessageError("The message has signs of more entries than the update has.")
        return cls(bits, data.tensor(1).reshape(()), (size,))


class SignSGD(Stage):
    """Send one bit for each entry, its sign, and one scale: the mean magnitude.

    The update decodes to ``(|g|_1 / M) * sign(g)``, with zero counted as positive; so the server needs no step size of
    its own. ``8 * ceil(M / 8)`` bits and the scale's 32 are sent. After a sparsifier it signs the values that are sent
    only: ``[TopK(0.01), SignSGD()]`` is sparse ternary compression. It is biased: wrap it in ``ErrorFeedback``.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = SignSGD().encode(Dense(torch.tensor([1.0, -2.0, 6.0])), {}).payload
        >>> payload.dense().tolist(), payload.num_bits
        ([3.0, -3.0, 3.0], 40)
    """

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        return Encoded(update.compress(_sign))


def _sign(numbers: Dense) -> Payload:
    return Signs.pack(numbers.values, _mean_magnitude(numbers.values), numbers.layout)


def _mean_magnitude(values: Tensor) -> Tensor:
    """Return the mean of ``|values|``, shape ``()``, in their dtype."""
    if values.device.type == "cuda":
        # In float64, in which no sum overflows, so that nothing waits for the device.
        return values.abs().sum(dtype=torch.float64).div_(values.numel()).to(values.dtype)
    block = block_size(values)
    if values.numel() <= block:
        scale = values.abs().mean()
    else:
        magnitudes = values.new_empty(block)
        sums = [torch.abs(part, out=magnitudes[: part.numel()]).sum() for part in values.split(block)]
        scale = torch.stack(sums).sum().div_(values.numel())
    if not math.isfinite(scale):  # the sum has overflowed
        scale = values.abs().double().mean().to(values.dtype)
    return scale
