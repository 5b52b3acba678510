"""Verification of a vectorised chunk: some of its clients are trained alone too, and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_lbgm.clients.base import ClientUpdate, RoundStart
from lightning_lbgm.clients.objective_turn import values_of
from lightning_lbgm.clients.sequential import SequentialTrainer
from lightning_lbgm.clients.vmap.chunk import ChunkTrainer
from lightning_lbgm.clients.vmap.chunk_parts import ChunkResult
from lightning_lbgm.clients.vmap.comparison import Turn, find_difference, nudge
from lightning_lbgm.clients.vmap.guards import CannotVectorize, refuse_kept_state
from lightning_lbgm.clients.vmap.reach import ReachedState
from lightning_lbgm.data.feed import LocalBatch

__all__ = ["ComesOutDifferent", "Proof"]

_Client = tuple[int, list[LocalBatch]]


class ComesOutDifferent(CannotVectorize):
    """A client trained at once differs from the same client trained alone; the message says in what."""


class Proof:
    """Compare clients of a chunk with the same clients trained alone.

    Args:
        sequential: Trains a client alone.
        chunks: Has trained the chunk.
        start: What the clients started from.
        round_index: The round.
        reached: The state of the module and what it reaches, which training alone may not change either.
    """

    def __init__(
        self,
        sequential: SequentialTrainer,
        chunks: ChunkTrainer,
        start: RoundStart,
        round_index: int,
        reached: ReachedState,
    ) -> None:
        self._sequential = sequential
        self._chunks = chunks
        self._start = start
        self._round_index = round_index
        self._reached = reached

    def compare(self, result: ChunkResult, chunk: Sequence[_Client], num_clients: int, seed: int | None = None) -> None:
        """Compare some clients of the chunk, the last one among them.

        Args:
            result: What the chunk came to.
            chunk: Its clients and their batches.
            num_clients: How many are compared, spread over the chunk.
            seed: Seed of what each client draws alone. None: its own.

        Raises:
            ComesOutDifferent: If one differs by more than rounding.
            CannotVectorize: If one changes state that lasts.
        """
        flat, capture = self._sequential.flat, self._sequential.capture
        count = min(num_clients, len(chunk))
        for number in range(1, count + 1):
            position = number * len(chunk) // count - 1
            client_id, batches = chunk[position]
            personal, start = self._personal_start(client_id)
            capture.replay(result.log, position)
            at_once = self._turn(self._chunks.update_of(result, position, client_id, self._start.params))
            alone = self._alone(client_id, batches, self._start, seed)
            difference = find_difference(
                at_once,
                alone,
                (*flat.names, *personal),
                (*flat.views(self._start.params), *start),
                lambda k=client_id, drawn=batches: self._alone(k, drawn, self._nudged(), seed, check=False),  # type: ignore[misc]
            )
            if difference is not None:
                raise ComesOutDifferent(
                    f"trained at once and alone, client {client_id} comes out different: {difference}"
                )

    def _nudged(self) -> RoundStart:
        """Return a start whose parameters differ in their last bit, also the frozen ones, which round sums as well."""
        start, parameters = self._start, self._chunks.module.named_parameters()
        frozen = {
            name: nudge(parameter.detach().reshape(-1)).view_as(parameter)
            for name, parameter in parameters
            if not parameter.requires_grad and parameter.is_floating_point()
        }
        return replace(
            start,
            params=nudge(start.params),
            own_buffers=lambda client_id: {**frozen, **(start.own_buffers(client_id) or {})} or None,
        )

    def _alone(
        self, client_id: int, batches: Sequence[LocalBatch], start: RoundStart, seed: int | None, check: bool = True
    ) -> Turn:
        # Copies: a step may write to its batch.
        copies = [LocalBatch(tree_map(_copy, data), size) for data, size in batches]
        try:
            turn = self._turn(self._sequential.train_client(self._round_index, client_id, copies, start, seed))
            alone_changes = self._sequential.changed_in_module(frozen_only=True) if check else None
        finally:
            kept = self._reached.restore()
            self._sequential.load(self._start)
        refuse_kept_state(kept or alone_changes)
        return turn

    def _personal_start(self, client_id: int) -> tuple[list[str], list[Tensor]]:
        """Return the names and values of the personal parameters that a client starts from."""
        buffers = self._sequential.buffers
        return list(buffers.personal()), buffers.start_personal(self._start.own_buffers(client_id))

    def _turn(self, update: ClientUpdate) -> Turn:
        """Copy what a client came to, and what it logged."""
        logged: dict[str, tuple[Any, float]] = {}
        for name, entry in self._sequential.capture.take().items():
            reduced = entry.reduced()
            value = entry.last if reduced is None else reduced
            logged[name] = (math.nan if value is None else value, float(entry.weight))
        names, start = self._personal_start(update.client_id)
        personal = [value - update.buffers[name] for name, value in zip(names, start)]
        local = update.local
        loss = float(local.loss_sum) / local.num_examples if local.loss_sum is not None else math.nan
        return Turn(
            update=[*[view.clone() for view in self._sequential.flat.views(update.update)], *personal],
            buffers={name: buffer.clone() for name, buffer in update.buffers.items() if name not in names},
            logged=logged,
            loss=loss,
            counts=(local.num_steps, local.num_examples),
            objective=dict(values_of(update.objective or {})),
        )


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
