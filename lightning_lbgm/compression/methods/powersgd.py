"""PowerSGD: low-rank factors by power iteration with a warm start.

Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS
2019 (arXiv 1905.13727), Algorithm 1, for one client.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.spectra import times_few
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.low_rank import factorize

__all__ = ["PowerSGD"]


class PowerSGD(Stage):
    """Send two thin factors of each parameter matrix, from one step of power iteration; vectors go whole.

    ``rank * (n + m)`` numbers for a matrix of shape (n, m), as ``ATOMO``, without a decomposition: the iteration goes
    on from the client's right factor of its last round, so it converges over rounds if updates resemble each other.
    It is biased: wrap it in ``ErrorFeedback``.

    Args:
        rank: Columns of the factors.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is not positive.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> update = Dense(torch.outer(torch.arange(1.0, 7.0), torch.ones(5)).reshape(-1), [(6, 5)])
        >>> stage = PowerSGD(rank=1)
        >>> torch.allclose(stage.encode(update, stage.init()).payload.dense(), update.dense(), atol=1e-5)
        True
    """

    def __init__(self, rank: int) -> None:
        self.rank = check_count("PowerSGD", "rank", rank)

    def init(self) -> State:
        """Make the state of a client that starts from a random right factor for each matrix."""
        return {"right": {}}

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        known: dict[int, Tensor] = state["right"]

        generator: torch.Generator | None = None

        def factor(index: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal generator
            start = known.get(index)
            if start is None or start.shape != (matrix.shape[1], self.rank) or not bool(start.any()):
                generator = generator or context.generator(matrix.device)
                start = matrix.new_empty(matrix.shape[1], self.rank).normal_(generator=generator)
            left = torch.linalg.qr(times_few(matrix, start)).Q
            right = (left.T @ matrix).T
            known[index] = right.contiguous().clone()
            return left, right

        return Encoded(factorize(update, self.rank, factor))
