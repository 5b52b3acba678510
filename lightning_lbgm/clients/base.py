"""Client trainer protocol: what trains a round's clients, and the updates that it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.clients.objectives import ObjectiveState
from lightning_lbgm.data.rounds import Round

__all__ = ["ClientTrainer", "ClientUpdate", "LocalResult", "RoundStart", "TurnBuffers"]

_WIDE = (torch.float32, torch.float64)


@dataclass
class LocalResult:
    """What a client's local training amounts to.

    Attributes:
        num_steps: Optimizer steps made.
        num_examples: Examples seen, repeats included: the weight of the loss.
        metrics: Further numbers for the client's report, by name.
        loss_sum: Sum of each step's loss times its batch size, detached; None if no step had a loss.
    """

    num_steps: int = 0
    num_examples: int = 0
    loss_sum: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Tensor | None, size: int) -> None:
        """Count a step on ``size`` examples and its loss; of a chunk of C clients the losses, shape ``(C,)``."""
        self.num_steps += 1
        if loss is None:
            return
        loss = loss.detach()
        if loss.dtype not in _WIDE:
            loss = loss.float()  # half precision would lose small steps of a long sum
        if self.loss_sum is None:
            self.loss_sum = loss * size
        else:
            self.loss_sum.add_(loss, alpha=size)
        self.num_examples += size


@dataclass(frozen=True)
class ClientUpdate:
    """A client's part of a round, before the uplink. Its tensors are valid until the next one is drawn.

    Attributes:
        client_id: The client.
        local: What its training amounts to.
        update: ``g_k = theta - theta_k``, shape ``(M,)``.
        buffers: The buffers that its training changed, and its personal parameters, by name.
        objective: The state of its local objective after the turn, a copy; None if there is none, or if the server has
            a part in it, because then the state follows from the decoded update.
        step_sizes: For each parameter the sum of the learning rates of its local steps, if the server has a part in
            its local objective.
        missing: Why there is no update, in words; empty if there is one.
    """

    client_id: int
    local: LocalResult
    update: Tensor
    buffers: dict[str, Tensor]
    objective: ObjectiveState | None = None
    step_sizes: tuple[float, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class RoundStart:
    """What clients start a round from.

    Attributes:
        params: What clients hold of the global parameters theta, shape ``(M,)``: theta itself without a downlink chain.
        seed: The run's seed.
        own_buffers: Returns the buffers and personal parameters that a client has kept for itself, by name, or None.
        objective_state: Returns the state of a client's local objective, not to be changed, or None.
        shared_objective: The server's state of it, not to be changed; empty if there is none.
    """

    params: Tensor
    seed: int
    own_buffers: Callable[[int], dict[str, Tensor] | None]
    objective_state: Callable[[int], ObjectiveState | None] = lambda client_id: None
    shared_objective: ObjectiveState = field(default_factory=dict)


class TurnBuffers(Protocol):
    """The module's tensors besides the shared parameters, as a client's turn starts with them and changes them."""

    def load(self, own: Mapping[str, Tensor] | None = None) -> None:
        """Set the module's to the server's, or to the client's own if it has some."""

    def start(self, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """Return the buffers alone that ``load`` would set, not copied; None if a client's own go beyond them."""

    def personal(self) -> dict[str, nn.Parameter]:
        """Return the module's personal parameters that are trained, by name."""

    def start_personal(self, own: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return the values of ``personal`` that ``load`` would set, in order, not copied."""

    def changed(
        self, current: Mapping[str, Tensor] | None = None, own: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return what the client's training changed, of the module or of what is given."""

    def differs(self, frozen_only: bool = False) -> str | None:
        """Return the name of a tensor of the module that is not the server's, or None."""


class ClientTrainer(Protocol):
    """Trains a round's clients on the module, and may leave any client's parameters there.

    Attributes:
        capture: Holds what the client at hand logged, for the caller to accept or reject.
    """

    capture: RoundLog

    def run(self, round_: Round, start: RoundStart) -> Iterator[ClientUpdate]:
        """Yield each client's update, in the order of the cohort."""
