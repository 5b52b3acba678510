"""Evaluation of clients over all processes: each runs its share, and all come to the same scores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import lightning.pytorch as pl

from lightning_lbgm._compat.progress_bar import ClientProgress
from lightning_lbgm.callbacks.base import FederatedStrategy, strategy_of
from lightning_lbgm.data.feed import EvaluationData, Feed, LocalBatch
from lightning_lbgm.reports.client_scores import ClientScores

__all__ = ["EvaluatingStrategy", "evaluate_clients", "evaluating_strategy_of"]

_PROGRESS_SECONDS = 0.2


class EvaluatingStrategy(FederatedStrategy, Protocol):
    """What the evaluation of clients asks of the strategy, which documents it."""

    @property
    def feed(self) -> Feed:
        """The clients' training data."""

    def evaluation_data(self, data: Any, keys: Any) -> EvaluationData | None:
        """Return what clients are evaluated on: the given data, else what was held out, None if nothing was."""

    def gather(self, value: Any, purpose: str) -> list[Any]:
        """Return every process's value, in every process."""

    def share_of(self, client_ids: Sequence[int]) -> list[int]:
        """Return which clients this process is to look at."""

    def client_model(self, client_id: int) -> AbstractContextManager[None]:
        """Put the global model as a client uses it into the module for a while."""

    def local_model(self) -> AbstractContextManager[None]:
        """Put the local model of the client whose turn ends into the module for a while."""

    def validate_client(self, client_id: int, batches: Iterable[LocalBatch]) -> tuple[int, dict[str, float]]:
        """Run the module's validation on examples of a client."""

    def fine_tune(self, client_id: int, num_steps: int) -> None:
        """Train what the module holds further by local steps of a client."""


def evaluating_strategy_of(trainer: pl.Trainer) -> EvaluatingStrategy:
    """Return a Trainer's strategy, which ``check_federated`` has seen."""
    strategy: Any = strategy_of(trainer)
    return strategy


def evaluate_clients(
    trainer: pl.Trainer, data: EvaluationData, client_ids: Sequence[int], fine_tune_steps: int, round_index: int
) -> dict[int, ClientScores]:
    """Evaluate the global model on each client's examples, and after local steps too, with a progress bar.

    Args:
        trainer: The trainer.
        data: The clients' examples.
        client_ids: The clients, the same in every process.
        fine_tune_steps: Local steps before the second evaluation; 0: there is none.
        round_index: The round that has ended.

    Returns:
        The scores of all clients in order, the same in every process.
    """
    strategy = evaluating_strategy_of(trainer)
    share = strategy.share_of(client_ids)
    progress, shown_at = ClientProgress(trainer), time.monotonic()
    scores: dict[int, ClientScores] = {}
    for client_id, batches in data.stream(share):
        with strategy.client_model(client_id):
            num_examples, metrics = strategy.validate_client(client_id, batches)
            tuned: dict[str, float] = {}
            if fine_tune_steps:
                strategy.fine_tune(client_id, fine_tune_steps)
                _, tuned = strategy.validate_client(client_id, data.batches(client_id))
        scores[client_id] = ClientScores(num_examples, metrics, tuned)
        if progress.is_shown and time.monotonic() - shown_at >= _PROGRESS_SECONDS:
            done = len(scores) * len(client_ids) // len(share)  # estimated from this process's share
            progress.show(done, len(client_ids), "clients evaluated")
            shown_at = time.monotonic()
    progress.restore()
    parts = strategy.gather(scores, f"the evaluation after round {round_index}")
    return dict(sorted((client_id, score) for part in parts for client_id, score in part.items()))
