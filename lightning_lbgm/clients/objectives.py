"""Local objectives: what a client minimises besides the loss of its training step, such as FedProx's proximal term."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.core.describe import describe_call

__all__ = ["FedProx", "LocalObjective", "ObjectiveState"]

ObjectiveState = dict[str, Any]
"""What a client keeps from one of its rounds to the next: tensors, numbers, strings, and dicts and lists of these."""


class LocalObjective(ABC):
    """Corrects a client's gradients at each local step, as if the loss had another term.

    ``correct`` is called after each backward pass, once the gradients are free of mixed precision's loss scale, and
    before they are clipped: what it adds is clipped with the rest, as the gradient of a term of the loss would be. The
    loss that is reported is that of ``training_step`` alone. An objective concerns what clients share: personal
    parameters are not shown to it, and it is not asked in steps that change these alone.

    The same code serves a client that is trained alone and a chunk of C clients that are trained at once: then the
    tensors of ``gradients``, ``parameters`` and ``state`` have a leading dimension C, those of ``start`` have not and
    broadcast. Reductions must keep that dimension. (Vectorised training compares some clients with the same ones
    trained alone, and falls back if they differ.)

    An objective that keeps nothing between steps implements ``correct`` alone. What a client keeps belongs in its
    ``state``, not in attributes: it is saved in checkpoints, moves between processes with the client, and is put back
    if a round breaks off or the client's update is rejected.

    Examples:
        >>> class Shrink(LocalObjective):
        ...     def correct(self, gradients, parameters, start, state):
        ...         torch._foreach_add_(gradients, parameters, alpha=0.01)
        >>> gradients = [torch.zeros(2)]
        >>> Shrink().correct(gradients, [torch.ones(2)], [torch.ones(2)], {})
        >>> gradients
        [tensor([0.0100, 0.0100])]
    """

    def init(self, start: list[Tensor]) -> ObjectiveState:
        """Return the state of a client that has none yet; empty if there is nothing to keep.

        Args:
            start: The trainable parameters that it starts from, each of shape ``(*shape)``.
        """
        return {}

    @abstractmethod
    def correct(
        self, gradients: list[Tensor], parameters: list[Tensor], start: list[Tensor], state: ObjectiveState
    ) -> None:
        """Change the gradients of one local step, in place.

        An optimizer that evaluates its closure several times a step, such as LBFGS, calls it each time.

        Args:
            gradients: One for each trainable parameter, in the module's order; zeros if the loss does not reach it.
                Each of shape ``(*shape)``, or ``(C, *shape)`` for a chunk.
            parameters: The local parameters, in the same shapes. Not to be changed.
            start: The global parameters that the clients started from, each of shape ``(*shape)``. Not to be changed.
            state: What the client keeps, changed in place. Of a chunk the tensors are stacked; clients whose numbers or
                strings differ are not in one chunk, so a count is better kept as a tensor.
        """

    def end_turn(  # noqa: B027 (most objectives have nothing to do here)
        self, parameters: list[Tensor], start: list[Tensor], state: ObjectiveState, num_steps: int
    ) -> None:
        """Bring the state up to date after a client's last local step of a round, in place.

        Args:
            parameters: The local parameters, as in ``correct``.
            start: The global parameters that the clients started from.
            state: What the client keeps, changed in place.
            num_steps: Local steps made, at least 1; with ``personal_steps`` those that have changed these parameters.
        """

    def __repr__(self) -> str:
        """Show the constructor call, as far as arguments are attributes."""
        return describe_call(self)


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
