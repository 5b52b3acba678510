"""Vectorised local training: clients in chunks that take their steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from lightning_lbgm.clients.base import ClientUpdate, RoundStart
from lightning_lbgm.clients.objective_turn import kind_of, turn_of
from lightning_lbgm.clients.objectives import ObjectiveState, SharedObjective
from lightning_lbgm.clients.sequential import SequentialTrainer
from lightning_lbgm.clients.vmap.batching import shapes_of, stack
from lightning_lbgm.clients.vmap.chunk import ChunkTrainer
from lightning_lbgm.clients.vmap.chunk_parts import ChunkResult, ChunkStep
from lightning_lbgm.clients.vmap.guards import CannotVectorize, GlobalGenerators, none_escapes, refuse_kept_state
from lightning_lbgm.clients.vmap.proof import Proof
from lightning_lbgm.clients.vmap.reach import ReachedState
from lightning_lbgm.clients.vmap.remembered import CannotRestore
from lightning_lbgm.core.rng import derive_seed, seed_global_rng
from lightning_lbgm.data.feed import LocalBatch
from lightning_lbgm.data.rounds import Round

__all__ = ["VectorizedTrainer", "Wary"]

_Client = tuple[int, list[LocalBatch]]


@dataclass(frozen=True)
class Wary:
    """What is looked at while clients are trained at once.

    Attributes:
        compare: How many clients of the round's first chunk are trained alone too, and compared.
        may_draw: Whether the step may draw random numbers from torch's generators.
        on_proved: Called once a comparison has found no difference.
        on_error: Called with the error of a chunk that could not be trained at once. If it returns, that chunk and the
            rest of the round are trained one client after the other; it may raise.
        on_no_chunk: Called at the end of a round of several clients in which no two could be trained at once.
    """

    compare: int
    may_draw: bool
    on_proved: Callable[[], None]
    on_error: Callable[[Exception], None]
    on_no_chunk: Callable[[], None]


class VectorizedTrainer:
    """Train a round's clients in chunks; a chunk's parameters, gradients and batches are in memory at a time.

    Consecutive clients of the cohort whose local batches agree in number and shapes, and whose local objectives' states
    agree in theirs, form a chunk; one that is alone
    is trained as ``SequentialTrainer`` would. Updates come in the order of the cohort, and differ from those of the
    sequential trainer by rounding alone, except if the step draws random numbers: those of a chunk are drawn
    together, from a seed that is a pure function of the run's seed, the round and the chunk's clients.

    Args:
        sequential: Trains what is not vectorised, and has the log capture and the round's optimizer.
        chunks: Trains a chunk.
        step: The local step of this round.
        chunk_size: The most clients in a chunk.
        wary: What is looked at.
    """

    def __init__(
        self, sequential: SequentialTrainer, chunks: ChunkTrainer, step: ChunkStep, chunk_size: int, wary: Wary
    ) -> None:
        self.capture = sequential.capture
        self._sequential = sequential
        self._chunks = chunks
        self._step = step
        self._chunk_size = chunk_size
        self._wary = wary
        self._watched = False  # whether a chunk of this round has been watched for state that a step keeps
        self._gave_up = False

    def run(self, round_: Round, start: RoundStart) -> Iterator[ClientUpdate]:
        """Yield each client's update, in the order of the cohort."""
        chunk: list[_Client] = []
        shapes: tuple[object, ...] | None = None
        try:
            for client_id, batches in round_.clients():
                if self._gave_up:
                    yield self._sequential.train_client(round_.index, client_id, batches, start)
                    continue
                drawn = list(batches)
                new_shapes = self._shapes_of(client_id, drawn, start)
                if chunk and (new_shapes != shapes or len(chunk) == self._chunk_size):
                    yield from self._train(round_.index, chunk, start)
                    chunk = []
                if self._gave_up:
                    yield self._sequential.train_client(round_.index, client_id, drawn, start)
                    continue
                chunk.append((client_id, drawn))
                shapes = new_shapes
            yield from self._train(round_.index, chunk, start)
            if not self._watched and not self._gave_up and len(round_.cohort) > 1:
                self._wary.on_no_chunk()
        finally:
            self._sequential.finish()

    def _train(self, round_index: int, chunk: list[_Client], start: RoundStart) -> Iterator[ClientUpdate]:
        result = self._train_at_once(round_index, chunk, start) if len(chunk) > 1 and not self._gave_up else None
        if result is None:
            for client_id, batches in chunk:
                yield self._sequential.train_client(round_index, client_id, batches, start)
            return
        for position, (client_id, _) in enumerate(chunk):
            self.capture.replay(result.log, position)
            yield self._chunks.update_of(result, position, client_id, start.params)

    def _train_at_once(self, round_index: int, chunk: list[_Client], start: RoundStart) -> ChunkResult | None:
        """Return the chunk's result, or None if the chunk cannot be trained at once."""
        watch, self._watched = not self._watched, True
        try:
            if not watch:
                return self._attempt(round_index, chunk, start)
            return self._watched_attempt(round_index, chunk, start)
        except CannotRestore:
            raise
        except Exception as error:  # an error that is the step's own comes again when the step is run for one client
            self._fall_back(error)
            return None

    def _watched_attempt(self, round_index: int, chunk: list[_Client], start: RoundStart) -> ChunkResult:
        module, compare = self._chunks.module, self._wary.compare
        self._sequential.load(start)  # frozen parameters and buffers too are those of the round's start
        reached = ReachedState(module)
        if reached.obstacle is not None:
            raise CannotVectorize(reached.obstacle)
        with none_escapes() if compare else nullcontext():
            try:
                result = self._attempt(round_index, chunk, start, watch=True)
            except BaseException:
                reached.restore()
                raise
            refuse_kept_state(reached.restore())
            refuse_kept_state(self._sequential.changed_in_module())
        if compare:
            proof = Proof(self._sequential, self._chunks, start, round_index, reached)
            if self._drew:
                seed = derive_seed(start.seed, "proof", round_index)
                seed_global_rng(seed, start.params.device)
                alike = self._run_chunk(chunk, start, check=False, draw_alike=True)
                proof.compare(alike, chunk, compare, seed)
                result = self._attempt(round_index, chunk, start)
            else:
                proof.compare(result, chunk, compare)
            self._wary.on_proved()
        return result

    def _attempt(self, round_index: int, chunk: list[_Client], start: RoundStart, watch: bool = False) -> ChunkResult:
        device = start.params.device
        seed_global_rng(derive_seed(start.seed, "chunk", round_index, *[client_id for client_id, _ in chunk]), device)
        generators = GlobalGenerators(device, torch_alone=not watch)
        result = self._run_chunk(chunk, start, check=watch)
        moved = generators.others_moved
        if moved is not None:
            raise CannotVectorize(f"`training_step` draws from {moved} generator, once for all clients of a chunk")
        self._drew = generators.torch_moved
        if self._drew and not self._wary.may_draw:
            raise CannotVectorize("`training_step` draws random numbers, which would depend on the clients of a chunk")
        return result

    def _run_chunk(self, chunk: list[_Client], start: RoundStart, check: bool, draw_alike: bool = False) -> ChunkResult:
        own: list[dict[str, Tensor] | None] = [start.own_buffers(client_id) for client_id, _ in chunk]
        batches = (stack(step) for step in zip(*[drawn for _, drawn in chunk]))
        names = self.capture.argument_names
        states = [self._state_of(client_id, start) for client_id, _ in chunk]
        return self._chunks.train(self._step, batches, own, start.params, names, check, draw_alike, states)

    def _state_of(self, client_id: int, start: RoundStart) -> ObjectiveState:
        objective = self._step.objective
        return {} if objective is None else turn_of(objective, self._sequential.flat, start, client_id)[1]

    def _shapes_of(self, client_id: int, batches: list[LocalBatch], start: RoundStart) -> tuple[object, ...] | None:
        try:
            if isinstance(self._step.objective, SharedObjective):
                return shapes_of(batches)  # what `correct` works with has the same shapes for all
            return (*shapes_of(batches), kind_of(self._state_of(client_id, start)))
        except CannotVectorize as error:
            self._fall_back(error)
            return None

    def _fall_back(self, error: Exception) -> None:
        self._wary.on_error(error)
        self._gave_up = True
