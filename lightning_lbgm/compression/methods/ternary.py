"""TernGrad: entries are rounded at random to minus the largest magnitude, zero or plus it, unbiased.

Wen, Xu, Yan, Wu, Wang, Chen, Li: "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning",
NeurIPS 2017 (arXiv 1705.07878).
"""

from __future__ import annotations

from lightning_lbgm.compression.quantize import encode_levels
from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Payload

__all__ = ["Ternary"]


class Ternary(Stage):
    """Send each entry as -1, 0 or 1 times a scale, at random, so that the mean over the choice is the update.

    The scale is the largest magnitude of the whole update, and an entry is sent with a probability of its share of it.
    So few are sent: their places and signs take about the entropy of the choice (see ``Levels``), 0.15 bits an entry if
    the scale is a hundred times the mean magnitude. It needs no memory of the client, and holds if clients take part
    rarely. It is ``QSGD(1)``.

    Args:
        bucket_size: Entries that share a scale: smaller buckets are finer and cost more. None: all of the update.

    Raises:
        TypeError: If ``bucket_size`` is not a whole number.
        ValueError: If it is not positive.

    Examples:
        >>> import torch
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = Ternary().encode(Dense(torch.tensor([2.0, 0.0, -2.0])), {}).payload
        >>> payload.dense().tolist()  # nothing is left to chance
        [2.0, 0.0, -2.0]
    """

    def __init__(self, bucket_size: int | None = None) -> None:
        self.bucket_size = None if bucket_size is None else check_count("Ternary", "bucket_size", bucket_size)

    _shown_if_set = ("bucket_size",)

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        return encode_levels(update, context, 1, self.bucket_size, "max")
