"""QSGD, stochastic quantization, unbiased.

Alistarh, Grubic, Li, Tomioka, Vojnovic: "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
NeurIPS 2017 (arXiv 1610.02132), with the buckets and the maximum norm of its section on practice. The paper codes the
integers by Elias' code; here it is an entropy code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.compression.quantize import Scale, encode_levels
from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.bits import pack_integers, unpack_integers
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size
from lightning_lbgm.payloads.levels import MAX_LEVELS

__all__ = ["QSGD", "Quantized"]


class Quantized(Payload):
    """A few bits for each entry, and a scale for each bucket of entries: what ``QSGD`` sent before it sent ``Levels``.

    Messages and checkpoints of that time are still read.

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
    """Round each entry at random to one of ``2 * levels + 1`` levels, so that the mean over the rounding is the update.

    The levels are spaced evenly between minus and plus a scale, by default the largest magnitude of the whole update.
    The integers are sent near their order-0 entropy (see ``Levels``), so few bits are spent on an update of which a
    few entries are large, and there is one scale in the update's dtype for each bucket. An entry that equals a level
    is not changed. After a sparsifier it quantizes the values that are sent only.

    Args:
        levels: s, the positive levels, 1 to 127; zero and the negative ones come on top. Also a function of the round
            (from 0): coarse levels at first and finer ones at the end cost little, and leave little noise in the model.
        bucket_size: Entries that share a scale: smaller buckets are finer and cost more. None: all of the update, which
            costs least, and errs most.
        scale: ``"max"``, the bucket's largest magnitude; or ``"norm"``, its Euclidean norm, as in the paper: most
            entries of a large bucket then become zero.
        bits: Deprecated: ``QSGD(bits=b)`` was ``QSGD(2 ** (b - 1) - 1, bucket_size=512)``.

    Raises:
        TypeError: If an argument has the wrong type, or ``levels`` and ``bits`` are given.
        ValueError: If it is out of range or unknown.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = QSGD(levels=2).encode(Dense(torch.tensor([2.0, 1.0, 0.0, -2.0])), {}).payload
        >>> payload.dense().tolist()  # nothing to round: the levels are -2, -1, 0, 1 and 2
        [2.0, 1.0, 0.0, -2.0]
    """

    _shown_if_set = ("bucket_size", "scale")

    def __init__(
        self,
        levels: int | Callable[[int], int] = 7,
        bucket_size: int | None = None,
        scale: Scale = "max",
        *,
        bits: int | None = None,
    ) -> None:
        if bits is not None:
            if levels != 7:
                raise TypeError(
                    f"`QSGD(bits={bits!r}, levels={levels!r})` says twice how fine the levels are: leave `bits` out."
                )
            levels = 2 ** (check_count("QSGD", "bits", bits, 2, 8) - 1) - 1
            bucket_size = 512 if bucket_size is None else bucket_size
            warnings.warn(
                f"`QSGD(bits={bits})` goes in the next version: write `QSGD({levels}, bucket_size={bucket_size})`.",
                FutureWarning,
                stacklevel=2,
            )
        self.levels = levels if callable(levels) else check_count("QSGD", "levels", levels, 1, MAX_LEVELS)
        self.bucket_size = None if bucket_size is None else check_count("QSGD", "bucket_size", bucket_size)
        if scale not in ("max", "norm"):
            raise ValueError(
                f"`QSGD(scale=...)` must be 'max' (a bucket's largest magnitude) or 'norm' (its Euclidean norm); got"
                f" {scale!r}."
            )
        self.scale: Scale = scale

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        top = self.levels
        if callable(top):
            top = check_count("QSGD", "levels", top(context.round_index), 1, MAX_LEVELS)
        return encode_levels(update, context, top, self.bucket_size, self.scale)
