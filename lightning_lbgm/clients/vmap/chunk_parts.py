"""A chunk's local step, as settings of one round, and what a chunk amounts to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients.base import LocalResult
from lightning_lbgm.clients.log import ChunkLog
from lightning_lbgm.clients.objectives import LocalObjective, ObjectiveState
from lightning_lbgm.clients.optimizer_start import OptimizerStart

__all__ = ["ChunkResult", "ChunkStep"]


@dataclass(frozen=True)
class ChunkStep:
    """What a local step does, of one round.

    Attributes:
        loss: Called as ``loss(batch, local step index)`` with one client's batch; returns a loss of one element, or
            None to skip the step.
        optimizer: The client optimizer: its class and its hyperparameters as they are now are used.
        start: Its starting state.
        transfer: Applied to a stacked batch, if given.
        clip_value: Bound of the gradients of a client, if given.
        clip_algorithm: Whether their joint L2 norm or each value is bounded.
        objective: Corrects the gradients, if given.
        personal_steps: Steps of a turn that change personal parameters alone. None: all change all.
    """

    loss: Callable[[Any, int], Tensor | None]
    optimizer: Optimizer
    start: OptimizerStart
    transfer: Callable[[Any], Any] | None = None
    clip_value: float | None = None
    clip_algorithm: Literal["norm", "value"] = "norm"
    objective: LocalObjective | None = None
    personal_steps: int | None = None


@dataclass
class ChunkResult:
    """What a chunk of C clients amounts to; valid until the next chunk is trained.

    Attributes:
        local: Steps and examples of each client; ``loss_sum`` has shape ``(C,)``.
        params: The clients' shared parameters in the layout's order, each of shape ``(C, *shape)``.
        personal: Their personal parameters by name, each of shape ``(C, *shape)``.
        buffers: The clients' buffers by name, each of shape ``(C, ...)``.
        log: What they logged.
        objective: The stacked state of their local objective after the turn; None if there is none.
        step_sizes: Sums of the learning rates, as in ``ClientUpdate``.
    """

    params: list[Tensor]
    personal: dict[str, Tensor]
    buffers: dict[str, Tensor]
    log: ChunkLog
    local: LocalResult = field(default_factory=LocalResult)
    objective: ObjectiveState | None = None
    step_sizes: tuple[float, ...] = ()
