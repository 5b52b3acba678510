"""Seams of local objectives: what a client minimises besides its loss, alone and together with the server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.core.describe import describe_call
from lightning_lbgm.payloads.base import Payload

__all__ = ["LocalObjective", "ObjectiveState", "SharedObjective", "Totals"]

ObjectiveState = dict[str, Any]
"""What a client keeps from one of its rounds to the next: tensors, numbers, strings, and dicts and lists of these."""

Totals = dict[str, Tensor]
"""What the server sums up over a round's clients, by name."""


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
        >>> import torch
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

    def obstacle(self, optimizer: Optimizer) -> str | None:
        """Return why clients cannot use an optimizer with this objective, and what to do; None if they can.

        Args:
            optimizer: The clients', with the hyperparameters of the round.
        """
        return None

    def __repr__(self) -> str:
        """Show the constructor call, as far as arguments are attributes."""
        return describe_call(self)


class SharedObjective(LocalObjective):
    """A local objective with a part on the server, such as SCAFFOLD's control variates.

    A round goes: ``begin_turn`` says for each client what its ``correct`` works with; both ends learn from the update
    that the server has decoded, the client in ``learn`` and the server in ``receive``; ``finish`` makes the server's
    next state of it, and may change the mean update. ``init`` and ``end_turn`` are not called. An update that was
    rejected or lost is learnt from by neither.

    All vectors have shape ``(M,)``, in the order of the global parameters. States are replaced and never changed in
    place, so that a round can be taken back. The server's is saved in checkpoints, and the same in every process.

    Examples:
        >>> import torch
        >>> class Pull(SharedObjective):
        ...     def init_shared(self, params):
        ...         return {"first": params.clone()}
        ...
        ...     def begin_turn(self, start, state, shared):
        ...         return {"first": shared["first"]}
        ...
        ...     def correct(self, gradients, parameters, start, state):
        ...         torch._foreach_add_(gradients, torch._foreach_sub(parameters, state["first"]), alpha=0.1)
        >>> objective = Pull()
        >>> turn = objective.begin_turn(torch.ones(2), {}, objective.init_shared(torch.zeros(2)))
        >>> gradients = [torch.zeros(2)]
        >>> objective.correct(gradients, [torch.ones(2)], [torch.ones(2)], {"first": [turn["first"]]})
        >>> gradients
        [tensor([0.1000, 0.1000])]
    """

    @abstractmethod
    def init_shared(self, params: Tensor) -> ObjectiveState:
        """Return the server's state before the first round, from the global parameters."""

    def sent_down(self, shared: ObjectiveState) -> Sequence[Tensor]:
        """Return what of the server's state each client of a cohort is sent; it counts as downlink, uncompressed."""
        return ()

    @abstractmethod
    def begin_turn(self, start: Tensor, state: ObjectiveState, shared: ObjectiveState) -> dict[str, Tensor]:
        """Return what ``correct`` works with in a client's turn, by name, the same names for all clients.

        ``correct`` gets each vector as a list of tensors in the parameters' shapes, stacked for a chunk of clients.

        Args:
            start: The global parameters that the client starts from.
            state: What the client keeps; empty if nothing yet.
            shared: The server's state.
        """

    def learn(
        self, state: ObjectiveState, shared: ObjectiveState, update: Payload, step_sizes: Sequence[float]
    ) -> ObjectiveState:
        """Return what a client keeps after its turn; both ends could say so, because they know all of this.

        Args:
            state: What it kept before; empty if nothing yet.
            shared: The server's state, as it was in the turn.
            update: Its decoded update, ``start - local``.
            step_sizes: For each parameter the sum of the learning rates of the client's local steps.
        """
        return state

    def init_totals(self, shared: ObjectiveState) -> Totals:
        """Return zeros for what ``receive`` sums up in a round."""
        return {}

    def receive(self, totals: Totals, shared: ObjectiveState, update: Payload, step_sizes: Sequence[float]) -> None:
        """Add a client's decoded update to the round's totals, in place. Those of several processes are summed up.

        Args:
            totals: The sums.
            shared: The server's state, as it was in the turn.
            update: Its numbers are valid during the call alone.
            step_sizes: As in ``learn``.
        """

    def finish(self, shared: ObjectiveState, totals: Totals, mean_update: Tensor, num_clients: int) -> ObjectiveState:
        """Return the server's state for the next round; ``mean_update`` may be changed in place before its step.

        It is not called in a round in which nothing was received.

        Args:
            shared: The state of this round.
            totals: What was received.
            mean_update: The aggregated update.
            num_clients: All clients of the federation, not those of the cohort.
        """
        return shared
