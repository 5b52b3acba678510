"""FedDyn: dynamic regularisation, which makes the clients' optima agree with the global one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lbgm.clients.objectives.base import ObjectiveState, SharedObjective, Totals
from lightning_lbgm.payloads.base import Payload

__all__ = ["FedDyn"]


class FedDyn(SharedObjective):
    """A linear and a proximal term of each client, and their counterpart on the server.

    Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv 2111.04263. A local gradient
    ``g`` becomes ``g - h_k + alpha * (w - w_global)``. After the turn ``h_k`` becomes ``h_k + alpha * update``, and
    the server adds ``alpha * update / N`` of each client of the cohort to its ``h``, N being the number of all clients.
    The server optimizer gets the mean update plus ``h / alpha``; ``SGD(lr=1)``, the default, is the paper's.
    ``update`` is what the server has decoded, so that both ends agree with a lossy uplink too. The states hold
    ``h_k / alpha`` and ``h / alpha``, sums of updates.

    Nothing more is sent, in either direction. It costs a vector of shape ``(M,)`` for each client that has taken part;
    ``client_store`` may keep them on disk. Any client optimizer goes with it.

    Args:
        alpha: Weight of the terms, above 0. The paper tries 0.001, 0.01 and 0.1. A small one trusts what clients have
            learnt far from the global model, and may diverge with small cohorts.

    Raises:
        TypeError: If ``alpha`` is not a number.
        ValueError: If ``alpha`` is not positive or not finite.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=100, clients_per_round=0.1, objective=FedDyn(alpha=0.1))
    """

    def __init__(self, alpha: float) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"`FedDyn(alpha=...)` must be a number; got {alpha!r}.")
        if not 0 < alpha < math.inf:
            raise ValueError(f"`FedDyn(alpha=...)` must be a finite number above 0, such as 0.1; got {alpha!r}.")
        self.alpha = float(alpha)

    def init_shared(self, params: Tensor) -> ObjectiveState:
        return {"sum": torch.zeros_like(params)}

    def begin_turn(self, start: Tensor, state: ObjectiveState, shared: ObjectiveState) -> dict[str, Tensor]:
        # Both terms are one proximal term around a shifted start.
        return {"anchor": start + state["sum"] if state else start}

    def correct(
        self, gradients: list[Tensor], parameters: list[Tensor], start: list[Tensor], state: ObjectiveState
    ) -> None:
        """Add ``alpha * (w - w_global) - h_k``."""
        torch._foreach_add_(gradients, torch._foreach_sub(parameters, state["anchor"]), alpha=self.alpha)

    def learn(
        self, state: ObjectiveState, shared: ObjectiveState, update: Payload, step_sizes: Sequence[float]
    ) -> ObjectiveState:
        total = state["sum"].clone() if state else torch.zeros_like(shared["sum"])
        update.add_to(total)
        return {"sum": total}

    def init_totals(self, shared: ObjectiveState) -> Totals:
        return {"updates": torch.zeros_like(shared["sum"])}

    def receive(self, totals: Totals, shared: ObjectiveState, update: Payload, step_sizes: Sequence[float]) -> None:
        update.add_to(totals["updates"])

    def finish(self, shared: ObjectiveState, totals: Totals, mean_update: Tensor, num_clients: int) -> ObjectiveState:
        total = torch.add(shared["sum"], totals["updates"], alpha=1 / num_clients)
        mean_update.add_(total)
        return {"sum": total}
