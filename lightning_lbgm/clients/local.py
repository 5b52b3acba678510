"""Local steps of one client after the other, each client with a fresh optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients.base import LocalResult
from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.clients.objective_turn import ObjectiveTurn
from lightning_lbgm.clients.optimizer_start import OptimizerStart
from lightning_lbgm.clients.personal import Alternation
from lightning_lbgm.data.feed import LocalBatch

__all__ = ["LocalLoop", "LocalStep", "copy_hyperparameter"]

LocalStep = Callable[[Any, int], "Tensor | None"]
"""Makes one optimizer step on ``(batch, local step index)`` and returns the loss, or None if it was skipped."""


class LocalLoop:
    """Run the local steps of one round's clients, each client with a fresh optimizer.

    Args:
        optimizer: The client optimizer. Before each client it gets its starting state again, and its hyperparameters
            are set to what they are now, at the start of the round, so that nothing leaks from one client to the next
            while learning rate schedules over rounds stay in force.
        step: Makes one local step.
        capture: Told the size of each batch.
        start: The optimizer's starting state. None: it is as good as new now.
        objective: Applies the local objective in ``step``, if there is one.
        alternation: Tells which parameters ``step`` changes, if not all.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        step: LocalStep,
        capture: RoundLog,
        start: OptimizerStart | None = None,
        objective: ObjectiveTurn | None = None,
        alternation: Alternation | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.capture = capture
        self.start = start or OptimizerStart(optimizer)
        self.objective = objective
        self.alternation = alternation
        self.step_index = 0  # of the client at hand
        self._step = step
        self._hyperparameters = [
            {name: copy_hyperparameter(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def reset_optimizer(self) -> None:
        """Make the optimizer fresh."""
        self.start.restore(self.optimizer)
        for group, hyperparameters in zip(self.optimizer.param_groups, self._hyperparameters):
            group.update({name: copy_hyperparameter(value) for name, value in hyperparameters.items()})

    def train(self, batches: Iterable[LocalBatch]) -> LocalResult:
        """Make one local step on each batch."""
        self.reset_optimizer()
        result = LocalResult()
        self.step_index = 0
        for index, (data, size) in enumerate(batches):
            self.step_index, self.capture.batch_size = index, size
            result.add(self._step(data, index), size)
        return result


def copy_hyperparameter(hyperparameter: Any) -> Any:
    """Copy a hyperparameter that a step may change in place: a tensor."""
    return hyperparameter.clone() if isinstance(hyperparameter, Tensor) else hyperparameter
