"""SCAFFOLD: control variates of clients and server against client drift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_lbgm.clients.objectives.base import ObjectiveState, SharedObjective, Totals
from lightning_lbgm.payloads.base import Payload

__all__ = ["SCAFFOLD"]


class SCAFFOLD(SharedObjective):
    """Correct each local gradient by the difference of the server's and the client's control variates.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv 1910.06378,
    with option II. A local gradient ``g`` becomes ``g - c_k + c``. After the turn ``c_k`` becomes
    ``c_k - c + update / (K eta)``, K eta being the sum of the learning rates of the client's steps, and the server adds
    the change of the cohort's ``c_k`` over the number of all clients to ``c``. ``update`` is what the server has
    decoded, so that both ends agree with a lossy uplink too, and a client sends its update alone.

    It costs a vector of shape ``(M,)`` for each client that has taken part (``client_store`` may keep them on disk),
    and on the downlink ``c`` for each client of a cohort, uncompressed: 32 bits a parameter.

    Clients need ``torch.optim.SGD`` without momentum, because the formula divides by its learning rate; rates may
    differ by parameter group and by round, and weight decay is part of the gradient. What a group with the rate 0 keeps
    stays as it is, steps that mixed precision skips do not count. If gradients are clipped, so are the corrected ones:
    a control variate is then short of the gradient, which cancels in ``c - c_k`` as far as clients are clipped alike.

    Examples:
        >>> from lightning_lbgm import LBGMFederated
        >>> strategy = LBGMFederated(num_clients=100, clients_per_round=0.1, local_steps=20, objective=SCAFFOLD())
    """

    def obstacle(self, optimizer: Optimizer) -> str | None:
        if type(optimizer) is not SGD:
            found = type(optimizer).__name__
        else:
            settings = [
                f"{name}={group[name]!r}"
                for group in optimizer.param_groups
                for name in ("momentum", "maximize")
                if group[name]
            ]
            if not settings:
                return None
            found = f"SGD({settings[0]})"
        return (
            f"`LBGMFederated(objective=SCAFFOLD())` takes a client's mean gradient from its update and the learning"
            f" rate, which needs plain SGD, but `configure_optimizers` returns `{found}`. Use"
            " `torch.optim.SGD(self.parameters(), lr=...)`, or `objective=FedDyn(alpha=0.01)` or `FedProx(mu=0.1)`,"
            " which go with any optimizer."
        )

    def init_shared(self, params: Tensor) -> ObjectiveState:
        return {"control": torch.zeros_like(params)}

    def sent_down(self, shared: ObjectiveState) -> Sequence[Tensor]:
        return (shared["control"],)

    def begin_turn(self, start: Tensor, state: ObjectiveState, shared: ObjectiveState) -> dict[str, Tensor]:
        # Combined once a turn, so that a step makes one pass.
        return {"offset": shared["control"] - state["control"] if state else shared["control"]}

    def correct(
        self, gradients: list[Tensor], parameters: list[Tensor], start: list[Tensor], state: ObjectiveState
    ) -> None:
        """Add ``c - c_k``."""
        torch._foreach_add_(gradients, state["offset"])

    def learn(
        self, state: ObjectiveState, shared: ObjectiveState, update: Payload, step_sizes: Sequence[float]
    ) -> ObjectiveState:
        if not any(step_sizes):
            return state
        control = state["control"] - shared["control"] if state else -shared["control"]
        if _is_uniform(step_sizes):
            update.add_to(control, 1 / step_sizes[0])
            return {"control": control}
        kept = state["control"] if state else torch.zeros_like(control)
        sizes = update.sizes
        parts = zip(control.split(sizes), kept.split(sizes), update.dense().split(sizes), step_sizes)
        for new, old, part, step_size in parts:
            if step_size:
                new.add_(part, alpha=1 / step_size)
            else:
                new.copy_(old)
        return {"control": control}

    def init_totals(self, shared: ObjectiveState) -> Totals:
        control = shared["control"]
        return {"gradients": torch.zeros_like(control), "count": control.new_zeros(1)}

    def receive(self, totals: Totals, shared: ObjectiveState, update: Payload, step_sizes: Sequence[float]) -> None:
        # A client changes its control variate by its mean gradient less c, of which the count is kept alone.
        if not any(step_sizes):
            return
        gradients = totals["gradients"]
        totals["count"] += 1
        if _is_uniform(step_sizes):
            update.add_to(gradients, 1 / step_sizes[0])
            return
        sizes = update.sizes
        parts = zip(gradients.split(sizes), shared["control"].split(sizes), update.dense().split(sizes), step_sizes)
        for total, control, part, step_size in parts:
            if step_size:
                total.add_(part, alpha=1 / step_size)
            else:
                total.add_(control)  # no change

    def finish(self, shared: ObjectiveState, totals: Totals, mean_update: Tensor, num_clients: int) -> ObjectiveState:
        share = float(totals["count"]) / num_clients
        return {"control": torch.add(shared["control"] * (1 - share), totals["gradients"], alpha=1 / num_clients)}


def _is_uniform(step_sizes: Sequence[float]) -> bool:
    return min(step_sizes) == max(step_sizes)
