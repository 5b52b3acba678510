"""Local training, one client after the other, on the module itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients.capture import LogCapture
from lightning_lbgm.data.feed import LocalBatch

__all__ = ["LocalResult", "LocalTrainer"]

LocalStep = Callable[[Any, int], "Tensor | None"]
"""Makes one optimizer step on ``(batch, local step index)`` and returns the loss, or None where it was skipped."""


@dataclass
class LocalResult:
    """What a client's local training amounts to.

    Attributes:
        num_steps: Optimizer steps made.
        num_examples: Examples seen, repeats included: the weight of the loss.
        loss_sum: Sum of each step's loss times its batch size, detached; None where no step had a loss.
    """

    num_steps: int = 0
    num_examples: int = 0
    loss_sum: Tensor | None = None


class LocalTrainer:
    """Run the local steps of one round's clients, each client with a fresh optimizer.

    Args:
        optimizer: The client optimizer. Its state is cleared before each client, and its hyperparameters are set to
            what they are now, at the start of the round, so that nothing leaks from one client to the next while
            learning rate schedules over rounds stay in force.
        step: Makes one local step.
        capture: Told the size of each batch.
    """

    def __init__(self, optimizer: Optimizer, step: LocalStep, capture: LogCapture) -> None:
        self.optimizer = optimizer
        self.capture = capture
        self._step = step
        self._hyperparameters = [
            {name: _copy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def reset_optimizer(self) -> None:
        """Make the optimizer fresh."""
        self.optimizer.state.clear()
        for group, hyperparameters in zip(self.optimizer.param_groups, self._hyperparameters):
            group.update({name: _copy(value) for name, value in hyperparameters.items()})

    def train(self, batches: Iterable[LocalBatch]) -> LocalResult:
        """Make one local step on each batch."""
        self.reset_optimizer()
        result = LocalResult()
        for index, (data, size) in enumerate(batches):
            self.capture.batch_size = size
            loss = self._step(data, index)
            result.num_steps += 1
            if loss is not None:
                loss = loss.detach()
                if loss.dtype is not torch.float64:
                    loss = loss.float()  # half precision would lose small steps of a long sum
                if result.loss_sum is None:
                    result.loss_sum = loss * size
                else:
                    result.loss_sum.add_(loss, alpha=size)
                result.num_examples += size
        return result


def _copy(hyperparameter: Any) -> Any:
    """Copy a hyperparameter that a step may change in place: a tensor."""
    return hyperparameter.clone() if isinstance(hyperparameter, Tensor) else hyperparameter
