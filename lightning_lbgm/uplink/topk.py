"""Top-K sparsification.

Aji, Heafield: "Sparse Communication for Distributed Gradient Descent", EMNLP 2017 (arXiv 1704.05021).
"""

from __future__ import annotations

import torch

from lightning_lbgm.uplink.payload import Payload, Sparse
from lightning_lbgm.uplink.stage import Encoded, Stage, State

__all__ = ["TopK"]


class TopK(Stage):
    """Send the entries of largest magnitude, over the whole update, and where they stand.

    ``k = max(1, round(fraction * M))`` values and indices are sent: 64 bits each for ``float32``. It is biased:
    wrap it in ``ErrorFeedback`` where the fraction is small.

    Args:
        fraction: Share of the entries to send, in (0, 1].

    Raises:
        TypeError: If ``fraction`` is not a number.
        ValueError: If it is outside (0, 1].

    Examples:
        >>> from lightning_lbgm.uplink import Dense
        >>> payload, _ = TopK(0.5).encode(Dense(torch.tensor([1.0, -4.0, 3.0, 0.5])), {})
        >>> payload.dense().tolist()
        [0.0, -4.0, 3.0, 0.0]
    """

    def __init__(self, fraction: float) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise TypeError(f"`TopK(fraction=...)` must be a number in (0, 1]; got {fraction!r}.")
        if not 0 < fraction <= 1:
            raise ValueError(
                f"`TopK(fraction=...)` must be in (0, 1]; got {fraction!r}. Use 0.1 to send a tenth of the entries."
            )
        self.fraction = float(fraction)

    def encode(self, update: Payload, state: State) -> Encoded:
        values = update.dense()
        k = max(1, round(self.fraction * values.numel()))
        indices = torch.topk(values.abs(), k, sorted=False).indices.sort().values
        index_dtype = torch.int32 if values.numel() <= torch.iinfo(torch.int32).max else torch.int64
        return Encoded(Sparse(values[indices], indices.to(index_dtype), update.sizes))
