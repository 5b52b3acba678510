"""Sequential local training: one client after the other, on the module itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients.base import ClientUpdate, LocalResult, RoundStart, TurnBuffers
from lightning_lbgm.clients.errors import add_client
from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.clients.optimizer_start import OptimizerStart
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.core.rng import derive_seed, seed_global_rng
from lightning_lbgm.data.feed import LocalBatch
from lightning_lbgm.data.rounds import Round

__all__ = ["LocalTrainer", "SequentialTrainer", "copy_hyperparameter"]

LocalStep = Callable[[Any, int], "Tensor | None"]
"""Makes one optimizer step on ``(batch, local step index)`` and returns the loss, or None where it was skipped."""


class LocalTrainer:
    """Run the local steps of one round's clients, each client with a fresh optimizer.

    Args:
        optimizer: The client optimizer. Before each client it gets its starting state again, and its hyperparameters
            are set to what they are now, at the start of the round, so that nothing leaks from one client to the next
            while learning rate schedules over rounds stay in force.
        step: Makes one local step.
        capture: Told the size of each batch.
        start: The optimizer's starting state. None: it is as good as new now.
    """

    def __init__(
        self, optimizer: Optimizer, step: LocalStep, capture: RoundLog, start: OptimizerStart | None = None
    ) -> None:
        self.optimizer = optimizer
        self.capture = capture
        self.start = start or OptimizerStart(optimizer)
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


class SequentialTrainer:
    """Train a round's clients one after the other; one update, in one reused vector, is in memory at a time.

    Args:
        trainer: Makes the local steps.
        flat: The trainable parameters.
        buffers: The module's buffers.
        update: The vector, shape ``(M,)``.
    """

    def __init__(self, trainer: LocalTrainer, flat: FlatParameters, buffers: TurnBuffers, update: Tensor) -> None:
        self.capture = trainer.capture
        self._trainer = trainer
        self.flat = flat
        self._buffers = buffers
        self._update = update

    def run(self, round_: Round, start: RoundStart) -> Iterator[ClientUpdate]:
        """Yield each client's update, in the order of the cohort."""
        try:
            for client_id, batches in round_.clients():
                yield self.train_client(round_.index, client_id, batches, start)
        finally:
            self.finish()

    def train_client(
        self,
        round_index: int,
        client_id: int,
        batches: Iterable[LocalBatch],
        start: RoundStart,
        seed: int | None = None,
    ) -> ClientUpdate:
        """Train one client.

        Args:
            round_index: The round.
            client_id: The client.
            batches: Its local batches.
            start: What it starts from.
            seed: Seed of what its steps draw. None: a function of the run's seed, the round and the client.
        """
        own = start.own_buffers(client_id)
        self.flat.write(start.server_params)
        self._buffers.load(own)
        seed = derive_seed(start.seed, "client", round_index, client_id) if seed is None else seed
        seed_global_rng(seed, self.flat.device)
        try:
            local = self._trainer.train(batches)
        except Exception as error:
            add_client(error, round_index, client_id, self._trainer.step_index, self.capture.batch_size)
            raise
        update = self.flat.update_from(start.server_params, self._update)
        return ClientUpdate(client_id, local, update, self._buffers.changed(own=own))

    def load(self, start: RoundStart) -> None:
        """Put what the round starts from into the module."""
        self.flat.write(start.server_params)
        self._buffers.load()

    def changed_in_module(self, frozen_only: bool = False) -> str | None:
        """Return the name of a buffer or frozen parameter of the module that is not the round's start's, or None."""
        return self._buffers.differs(frozen_only)

    def finish(self) -> None:
        """Leave a fresh optimizer behind."""
        self._trainer.reset_optimizer()


def copy_hyperparameter(hyperparameter: Any) -> Any:
    """Copy a hyperparameter that a step may change in place: a tensor."""
    return hyperparameter.clone() if isinstance(hyperparameter, Tensor) else hyperparameter
