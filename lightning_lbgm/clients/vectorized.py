"""Local training of a cohort in chunks of clients that take their steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from lightning_lbgm.clients.batching import shapes_of, stack
from lightning_lbgm.clients.chunk import ChunkResult, ChunkStep, ChunkTrainer
from lightning_lbgm.clients.sequential import SequentialTrainer
from lightning_lbgm.clients.trainer import ClientUpdate, RoundStart
from lightning_lbgm.clients.watch import CannotVectorize
from lightning_lbgm.data import LocalBatch, Round
from lightning_lbgm.rng import derive_seed, seed_global_rng

__all__ = ["VectorizedTrainer"]

_Client = tuple[int, list[LocalBatch]]


class VectorizedTrainer:
    """Train a round's clients in chunks; a chunk's parameters, gradients and batches are in memory at a time.

    Consecutive clients of the cohort whose local batches agree in number and shapes form a chunk; one that is alone
    is trained as ``SequentialTrainer`` would. Updates come in the order of the cohort, and differ from those of the
    sequential trainer by rounding alone, except where the step draws random numbers: those of a chunk are drawn
    together, from a seed that is a pure function of the run's seed, the round and the chunk's clients.

    Args:
        sequential: Trains what is not vectorised, and has the log capture and the round's optimizer.
        chunks: Trains a chunk.
        step: The local step of this round.
        chunk_size: The most clients in a chunk.
        give_up: Called with the error of a chunk that could not be trained at once. Where it returns, that chunk and
            the rest of the round are trained one client after the other; it may raise.
    """

    def __init__(
        self,
        sequential: SequentialTrainer,
        chunks: ChunkTrainer,
        step: ChunkStep,
        chunk_size: int,
        give_up: Callable[[Exception], None],
    ) -> None:
        self.capture = sequential.capture
        self._sequential = sequential
        self._chunks = chunks
        self._step = step
        self._chunk_size = chunk_size
        self._give_up = give_up
        self._watched = False  # whether a chunk of this round has been watched for state in attributes
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
                new_shapes = self._shapes_of(drawn)
                if chunk and (new_shapes != shapes or len(chunk) == self._chunk_size):
                    yield from self._train(round_.index, chunk, start)
                    chunk = []
                if self._gave_up:
                    yield self._sequential.train_client(round_.index, client_id, drawn, start)
                    continue
                chunk.append((client_id, drawn))
                shapes = new_shapes
            yield from self._train(round_.index, chunk, start)
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
            yield self._chunks.update_of(result, position, client_id, start.server_params)

    def _train_at_once(self, round_index: int, chunk: list[_Client], start: RoundStart) -> ChunkResult | None:
        """Return the chunk's result, or None where the chunk cannot be trained at once."""
        ids = [client_id for client_id, _ in chunk]
        own: list[dict[str, Tensor] | None] = [start.own_buffers(client_id) for client_id in ids]
        device = start.server_params.device
        seed_global_rng(derive_seed(start.seed, "chunk", round_index, *ids), device)
        try:
            batches = (stack(step) for step in zip(*[drawn for _, drawn in chunk]))
            names, watch = self.capture.argument_names, not self._watched
            result = self._chunks.train(self._step, batches, own, start.server_params, names, watch)
        except Exception as error:  # an error that is the step's own comes again where the step is run for one client
            self._fall_back(error)
            return None
        self._watched = True
        return result

    def _shapes_of(self, batches: list[LocalBatch]) -> tuple[object, ...] | None:
        try:
            return shapes_of(batches)
        except CannotVectorize as error:
            self._fall_back(error)
            return None

    def _fall_back(self, error: Exception) -> None:
        self._give_up(error)
        self._gave_up = True
