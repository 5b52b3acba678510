"""Relax: apply a multiple of what was sent, for a downlink that lags behind.

It is this package's own, named after the successive over-relaxation of linear solvers (Young, 1950), which takes longer
steps than the best single one in order to be there sooner.
"""

from __future__ import annotations

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.multiple import Multiple

__all__ = ["Relax"]


class Relax(Stage):
    """Multiply what the stages before it send, at both ends; nothing more is sent.

    A sparse downlink lags behind the server's model, because it sends a part of the difference in each round.
    ``downlink=[TopK(0.05), SignSGD(), Relax(1.5)]`` steps 1.5 times as far. If a step of 1 leaves a share e of the
    squared difference, a step of a leaves ``1 - (2 a - a^2)(1 - e)``: less than all of it for every a below 2.

    Args:
        factor: a, above 0 and below 2. Above 1 is over-relaxation, below 1 is damping.

    Raises:
        TypeError: If ``factor`` is not a number.
        ValueError: If it is out of range.

    Examples:
        >>> import torch
        >>> from lightning_lbgm import TopK
        >>> from lightning_lbgm.compression import Chain
        >>> from lightning_lbgm.payloads import Dense
        >>> chain = Chain([TopK(0.5), Relax(1.5)])
        >>> chain.encode(Dense(torch.tensor([4.0, 1.0])), chain.init()).decoded.dense().tolist()
        [6.0, 0.0]
    """

    def __init__(self, factor: float = 1.5) -> None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"`Relax(factor=...)` must be a number above 0 and below 2; got {factor!r}.")
        if not 0 < factor < 2:
            raise ValueError(
                f"`Relax(factor=...)` must be above 0 and below 2, from which on the difference grows; got {factor!r}."
                " Use 1.5 to step half as far again."
            )
        self.factor = float(factor)

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        return Encoded(update)

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        return Multiple(payload, self.factor)
