"""Top-K sparsification: the entries of the largest magnitude.

Aji, Heafield: "Sparse Communication for Distributed Gradient Descent", EMNLP 2017 (arXiv 1704.05021).
"""

from __future__ import annotations

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.selection import largest
from lightning_lbgm.core.validation import check_fraction
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.sparse import Sparse, index_dtype

__all__ = ["TopK"]


class TopK(Stage):
    """Send the entries of largest magnitude, over the whole update, and where they stand.

    ``k = max(1, round(fraction * M))`` values are sent, 32 bits each for ``float32``, and their indices in a compact
    code (see ``Sparse``): about 7 bits each at 0.03. Of equal magnitudes the first are sent. It is biased: wrap it in
    ``ErrorFeedback`` if the fraction is small.

    Args:
        fraction: Share of the entries to send, in (0, 1].

    Raises:
        TypeError: If ``fraction`` is not a number.
        ValueError: If it is outside (0, 1].

    Examples:
        >>> import torch
        >>> from lightning_lbgm.payloads import Dense
        >>> payload = TopK(0.5).encode(Dense(torch.tensor([1.0, -4.0, 3.0, 0.5])), {}).payload
        >>> payload.dense().tolist()
        [0.0, -4.0, 3.0, 0.0]
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = check_fraction("TopK", "fraction", fraction)

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        values = update.dense()
        k = max(1, round(self.fraction * values.numel()))
        indices = largest(values, k)
        kept = values.index_select(0, indices)
        return Encoded(Sparse(kept, indices.to(index_dtype(values.numel())), update.layout))
