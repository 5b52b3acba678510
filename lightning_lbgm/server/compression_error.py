"""Compression error of a round: how far the update that the server used is from the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.payloads.base import Payload, inner
from lightning_lbgm.reports.reports import AggregateError

__all__ = ["CompressionError"]


class CompressionError:
    """Compare what the server decodes with the clients' exact updates, as they stream by.

    It is made for one round. Of client k with update ``g_k`` and decoded ``g~_k``, both of shape ``(M,)``, it sums
    ``omega_k (g_k - g~_k)`` with the weights of the server's own sum. So the exact mean is the server's plus this sum,
    and neither the updates nor a second mean are kept. It holds two vectors of shape ``(M,)``.

    Args:
        like: A vector of the updates' shape, dtype and device.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> errors = CompressionError(torch.zeros(2))
        >>> errors.receive(torch.tensor([3.0, 4.0]), Dense(torch.tensor([3.0, 0.0])), weight=1.0)
        16.0
        >>> errors.finish(mean_update=torch.tensor([3.0, 0.0]), total_weight=1.0)
        AggregateError(norm=4.0, exact_norm=5.0, cosine=0.6)
    """

    def __init__(self, like: Tensor) -> None:
        self._sum = torch.zeros_like(like)
        self._scratch = torch.empty_like(like)

    @torch.no_grad()
    def receive(self, update: Tensor, decoded: Payload, weight: float) -> float:
        """Add a client's error with its weight omega_k, and return ``|g_k - g~_k|^2``."""
        difference = self._scratch.copy_(update)
        decoded.add_to(difference, -1.0)
        self._sum.add_(difference, alpha=weight)
        return inner(difference, difference)

    def combine(self, all_reduce_sum: Callable[[Tensor], None]) -> None:
        """Add up what several processes have received."""
        all_reduce_sum(self._sum)

    @torch.no_grad()
    def finish(self, mean_update: Tensor | None, total_weight: float) -> AggregateError | None:
        """Compare the server's mean update with the exact one.

        Args:
            mean_update: The weighted mean of the decoded updates, shape ``(M,)``; None if none was received.
            total_weight: Weight of the updates received, 1 if no client was left out.

        Returns:
            The error; None if no update was received.
        """
        if mean_update is None:
            return None
        gap = self._sum.div_(total_weight)
        exact = torch.add(mean_update, gap, out=self._scratch)
        exact_norm, used_norm = (math.sqrt(inner(vector, vector)) for vector in (exact, mean_update))
        cosine = math.nan
        if exact_norm > 0 and used_norm > 0:
            cosine = min(1.0, max(-1.0, inner(exact, mean_update) / exact_norm / used_norm))
        return AggregateError(math.sqrt(inner(gap, gap)), exact_norm, cosine)
