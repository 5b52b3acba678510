"""Sequential local training: one client after the other, on the module itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from lightning_lbgm.clients.base import ClientUpdate, RoundStart, TurnBuffers
from lightning_lbgm.clients.errors import add_client
from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.clients.objective_turn import copy_state, turn_of
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.core.rng import derive_seed, seed_global_rng
from lightning_lbgm.data.feed import LocalBatch
from lightning_lbgm.data.rounds import Round

__all__ = ["SequentialTrainer"]


class SequentialTrainer:
    """Train a round's clients one after the other; one update, in one reused vector, is in memory at a time.

    Args:
        local_loop: Makes the local steps.
        flat: The shared parameters.
        buffers: The module's other tensors.
        update: The vector, shape ``(M,)``.
    """

    def __init__(self, local_loop: LocalLoop, flat: FlatParameters, buffers: TurnBuffers, update: Tensor) -> None:
        self.capture = local_loop.capture
        self._loop = local_loop
        self.flat = flat
        self.buffers = buffers
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
        self.flat.write(start.params)
        self.buffers.load(own)
        seed = derive_seed(start.seed, "client", round_index, client_id) if seed is None else seed
        seed_global_rng(seed, self.flat.device)
        objective, state = self._loop.objective, None
        step_sizes: tuple[float, ...] = ()
        try:
            if objective is not None:
                objective.begin(*turn_of(objective.objective, self.flat, start, client_id))
            local = self._loop.train(batches)
            if objective is not None:
                alternation = self._loop.alternation
                shared = local.num_steps if alternation is None else alternation.num_shared(local.num_steps)
                state, step_sizes = copy_state(objective.end(shared)), objective.step_sizes
        except Exception as error:
            add_client(error, round_index, client_id, self._loop.step_index, self.capture.batch_size)
            raise
        update = self.flat.update_from(start.params, self._update)
        return ClientUpdate(client_id, local, update, self.buffers.changed(own=own), state, step_sizes)

    def load(self, start: RoundStart) -> None:
        """Put what the round starts from into the module."""
        self.flat.write(start.params)
        self.buffers.load()

    def changed_in_module(self, frozen_only: bool = False) -> str | None:
        """Return the name of a buffer or frozen parameter of the module that is not the round's start's, or None."""
        return self.buffers.differs(frozen_only)

    def finish(self) -> None:
        """Leave a fresh optimizer behind."""
        self._loop.reset_optimizer()
