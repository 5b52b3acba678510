"""FedProx: a proximal term that keeps clients near the global model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lbgm.clients.objectives.base import LocalObjective, ObjectiveState

__all__ = ["FedProx"]


class FedProx(LocalObjective):
    """The proximal term ``mu / 2 * ||w - w_global||^2`` of FedProx, which keeps clients near the global model.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127. It adds
    ``mu * (w - w_global)`` to each gradient.

    Args:
        mu: Weight of the term, at least 0. The paper tries 0.001, 0.01, 0.1 and 1; 0 is FedAvg.

    Raises:
        TypeError: If ``mu`` is not a number.
        ValueError: If ``mu`` is negative or not finite.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=20, local_epochs=5, objective=FedProx(mu=0.1))
    """

    def __init__(self, mu: float) -> None:
        if isinstance(mu, bool) or not isinstance(mu, (int, float)):
            raise TypeError(f"`FedProx(mu=...)` must be a number; got {mu!r}.")
        if not 0 <= mu < math.inf:
            raise ValueError(f"`FedProx(mu=...)` must be a finite number of at least 0, such as 0.1; got {mu!r}.")
        self.mu = float(mu)

    def correct(
        self, gradients: list[Tensor], parameters: list[Tensor], start: list[Tensor], state: ObjectiveState
    ) -> None:
        """Add ``mu * (w - w_global)``."""
        # The difference first: it is exactly zero if a parameter has not moved, and Adam would blow up its rounding.
        torch._foreach_add_(gradients, torch._foreach_sub(parameters, start), alpha=self.mu)
