"""QSGD, stochastic quantization, unbiased.

Alistarh, Grubic, Li, Tomioka, Vojnovic: "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
NeurIPS 2017 (arXiv 1610.02132), with the buckets and the maximum norm of its section on practice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.bits import pack_integers, unpack_integers
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size

__all__ = ["QSGD", "Quantized"]


class Quantized(Payload):
    """A few bits for each entry, and a scale for each bucket of entries.

    The body has the bits an entry (a byte), bucket size and phase (seven bits a byte), the scales and the codes.

    Args:
        codes: Levels from -s to s plus s, packed, ``uint8``, with ``s = 2 ** (bits - 1) - 1``.
        scales: What level s decodes to, one for each bucket.
        bits: Bits an entry, 2 to 8.
        bucket_size: Entries in a bucket.
        phase: Entries of the first bucket that come before the first one here (if an update was cut).
        layout: The parameter tensors.
    """

    fields = ("codes", "scales", "bits", "bucket_size", "phase")
    code = 7

    def __init__(
        self, codes: Tensor, scales: Tensor, bits: int, bucket_size: int, phase: int, layout: LayoutLike
    ) -> None:
        super().__init__(layout)
        self.codes = codes
        self.scales = scales
        self.bits = bits
        self.bucket_size = bucket_size
        self.phase = phase
        self._values: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def dense(self) -> Tensor:
        if self._values is None:
            top = 2 ** (self.bits - 1) - 1
            levels = unpack_integers(self.codes, self.size, self.bits).to(self.dtype).sub_(top)
            # Divided first: the largest level is the scale itself, however large.
            self._values = levels.div_(top).mul_(self._entry_scales())
        return self._values

    def _entry_scales(self) -> Tensor:
        """Return the scale of each entry, in memory of their number whatever bucket size a message claims."""
        if self.scales.numel() < 2:
            return self.scales
        if self.phase:
            entries = torch.arange(self.phase, self.phase + self.size, device=self.scales.device)
            return self.scales[entries // self.bucket_size]
        return self.scales.repeat_interleave(self.bucket_size)[: self.size]

    def split(self) -> list[Payload]:
        parts: list[Payload] = []
        begin = self.phase
        codes = unpack_integers(self.codes, self.size, self.bits).to(torch.uint8).split(self.sizes)
        for shape, part in zip(self.layout.shapes, codes):
            first, phase = divmod(begin, self.bucket_size)
            begin += part.numel()
            scales = self.scales[first : -(-begin // self.bucket_size)]
            packed = pack_integers(part, self.bits)
            parts.append(Quantized(packed, scales, self.bits, self.bucket_size, phase, Layout([shape])))
        return parts

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        return self  # there is nothing left to take away

    @property
    def num_bits(self) -> int:
        framing = 1 + varint_size(self.bucket_size) + varint_size(self.phase)
        return 8 * (framing + self.scales.nbytes + self.codes.nbytes)

    def write(self, out: Writer) -> None:
        out.byte(self.bits)
        out.varint(self.bucket_size)
        out.varint(self.phase)
        out.tensor(self.scales)
        out.tensor(self.codes)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        bits, bucket_size, phase = data.byte(), data.varint(), data.varint()
        if not 2 <= bits <= 8 or phase >= bucket_size:
            raise MessageError(f"The message is quantized to {bits} bits, from entry {phase} of {bucket_size}.")
        scales = data.tensor(-(-(phase + size) // bucket_size))
        codes = data.tensor(-(-size * bits // 8), torch.uint8)
        return cls(codes, scales, bits, bucket_size, phase, (size,))


class QSGD(Stage):
    """Round each entry at random to one of ``2 ** bits - 1`` levels, so that the mean over the rounding is the update.

    In each bucket of entries the levels are spaced evenly between minus and plus its largest magnitude. ``bits * M``
    bits and a scale of 32 for each bucket are sent. After a sparsifier it quantizes the values that are sent only.

    Args:
        bits: Bits an entry, sign included, 2 to 8.
        bucket_size: Entries that share a scale: smaller buckets are finer and cost more.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If it is out of range.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = QSGD(bits=2).encode(Dense(torch.tensor([2.0, 0.0, -2.0])), {}).payload
        >>> payload.dense().tolist()  # nothing to round: the levels are -2, 0 and 2
        [2.0, 0.0, -2.0]
    """

    def __init__(self, bits: int = 4, bucket_size: int = 512) -> None:
        self.bits = check_count("QSGD", "bits", bits, 2, 8)
        self.bucket_size = check_count("QSGD", "bucket_size", bucket_size)

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        generator = context.generator(update.device)

        def quantize(numbers: Dense) -> Payload:
            values, top = numbers.values, 2 ** (self.bits - 1) - 1
            size, bucket_size = values.numel(), min(self.bucket_size, max(1, values.numel()))
            buckets = torch.nn.functional.pad(values, (0, -size % bucket_size)).view(-1, bucket_size)
            scales = buckets.abs().amax(1)
            # The floor of x + u, u uniform in [0, 1), is x in the mean. Divided first: a scale may be tiny.
            levels = (buckets / scales[:, None]).nan_to_num_(0.0).mul_(top)
            levels = (
                levels.add_(torch.empty_like(levels).uniform_(generator=generator)).floor_().clamp_(-top, top).add_(top)
            )
            codes = pack_integers(levels.view(-1)[:size].to(torch.uint8), self.bits)
            return Quantized(codes, scales, self.bits, bucket_size, 0, numbers.layout)

        return Encoded(update.compress(quantize, factors=True))
