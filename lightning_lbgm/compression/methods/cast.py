"""Cast to a smaller floating-point format, such as ``bfloat16``."""

from __future__ import annotations

import torch

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.rounded import rounded

__all__ = ["Cast", "check_format"]

_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def check_format(owner: str, dtype: torch.dtype | str) -> torch.dtype:
    """Return a smaller floating-point format, given by itself or by its name.

    Raises:
        ValueError: If it is none; the error names the owner.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named not in _FORMATS:
        raise ValueError(f"`{owner}(dtype=...)` must be one of {', '.join(map(str, _FORMATS))}; got {dtype!r}.")
    return named


class Cast(Stage):
    """Send values in a smaller floating-point format, 16 bits instead of 32; the server gets the update's own again.

    After a sparsifier or a factorization it rounds the values that are sent. If the largest of them is beyond the
    format's range, or below its normal numbers (6e-5 for ``float16``), all are divided by a power of two, which three
    bytes more tell, so that updates of any scale keep the format's precision.

    Args:
        dtype: ``torch.bfloat16`` (the range of ``float32``, 8 bits of precision), ``torch.float16`` or
            ``torch.float32`` (for updates in ``float64``), or its name.

    Raises:
        ValueError: If it is none of them.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = Cast(torch.bfloat16).encode(Dense(torch.tensor([1.0, 1.001])), {}).payload
        >>> payload.dense().tolist(), payload.num_bits
        ([1.0, 1.0], 40)
    """

    def __init__(self, dtype: torch.dtype | str = torch.bfloat16) -> None:
        self.dtype = check_format("Cast", dtype)

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        return Encoded(update.compress(lambda numbers: rounded(numbers, self.dtype), factors=True))
