"""Evaluation on nodes: after each round some of them score the global model on their own validation data."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
from flwr.app import Message as FlowerMessage
from typing_extensions import override

from lightning_lbgm.callbacks.run_outputs import log_round
from lightning_lbgm.core.rng import derive_seed
from lightning_lbgm.flower.answers import Answers
from lightning_lbgm.flower.nodes import Nodes
from lightning_lbgm.flower.records import Refusal, Score, Trial
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.protocol.broadcast import BROADCAST
from lightning_lbgm.protocol.message import Message, MessageError
from lightning_lbgm.reports.client_scores import ClientScores, Direction, summarize

__all__ = ["NodeEvaluation", "choose"]

Told = Callable[[int, "dict[str, float]"], None]


class NodeEvaluation(pl.Callback):
    """Asks nodes for scores of the global model after each round, and logs what they say.

    The model travels whole and apart from the downlink, whose versions are as without an evaluation.

    Args:
        nodes: The table of nodes.
        there: Returns the clients whose nodes are there now.
        num_wanted: How many of so many nodes are to evaluate.
        exchange: Sends a round's trials, by client, and returns the replies that came in time.
        told: Called with a round, from 1, and its metrics.
    """

    def __init__(
        self,
        nodes: Nodes,
        there: Callable[[], tuple[int, ...]],
        num_wanted: Callable[[int], int],
        exchange: Callable[[int, dict[int, Trial]], list[FlowerMessage]],
        told: Told,
    ) -> None:
        self._nodes, self._there, self._num_wanted = nodes, there, num_wanted
        self._exchange, self._told = exchange, told
        self._unable: set[int] = set()  # nodes that would refuse again

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Evaluate the round's result."""
        strategy: Any = trainer.strategy
        round_index = strategy.last_report.round_index
        federation, terms = strategy.session.require(), strategy.terms()
        able = [k for k in self._there() if self._nodes[k].node_id not in self._unable]
        clients = choose(able, self._num_wanted(len(able)), federation.seed, round_index)
        message = Message(
            BROADCAST, Dense(federation.server.server_params), dict(federation.buffers.downlink), round_index
        )
        model = message.to_bytes() if clients else b""
        trials = {
            k: Trial(
                terms.federation,
                terms.settings,
                federation.seed,
                terms.rounds_per_epoch,
                round_index,
                k,
                model,
                secrets.token_hex(8),
            )
            for k in clients
        }
        scores: dict[int, ClientScores] = {}
        if trials:
            tickets = {client_id: trial.ticket for client_id, trial in trials.items()}
            occasion = f"Evaluation after round {round_index}"
            answers = Answers(occasion, round_index, tickets, self._nodes, terms.refusals)
            answers.sort(self._exchange(round_index, trials))
            scores = self._scores(answers, clients)
        metrics = {
            **summarize(scores, {}, Direction()),
            "comm/evaluation_bytes": len(clients) * message.num_bits / 8,
            "fl/evaluated_clients": float(len(scores)),
        }
        log_round(trainer, pl_module, metrics, round_index)
        self._told(round_index + 1, metrics)

    def _scores(self, answers: Answers, clients: tuple[int, ...]) -> dict[int, ClientScores]:
        """Return the scores of the clients whose answers can be taken."""
        found: dict[int, Score] = {}
        for client_id in clients:
            try:
                answer: Score | Refusal = answers.read(client_id, Score)
                if isinstance(answer, Refusal):
                    if answer.lasting:
                        self._unable.add(self._nodes[client_id].node_id)
                    raise MessageError(f"{answer.reason}{' It is not asked again.' if answer.lasting else ''}")
                answers.check(client_id, answer)
                found[client_id] = answer
            except MessageError as error:
                answers.refuse(client_id, str(error))
        if not found:
            return {}
        # The server has no validation of its own to know the names from: what most nodes log counts.
        names, _ = Counter(tuple(sorted(score.metric_names)) for score in found.values()).most_common(1)[0]
        scores = {}
        for client_id, score in found.items():
            if tuple(sorted(score.metric_names)) != names:
                wrong = sorted(set(score.metric_names) ^ set(names))
                answers.refuse(
                    client_id, f"Its metrics are not those of most nodes: {wrong} are here alone, or missing."
                )
                continue
            values = dict(zip(score.metric_names, score.metric_values))
            scores[client_id] = ClientScores(score.num_examples, {name: values[name] for name in names})
        return scores


def choose(clients: list[int], size: int, seed: int, round_index: int) -> tuple[int, ...]:
    """Choose the clients that evaluate: a pure function of the arguments.

    Args:
        clients: Those that could, in increasing order.
        size: How many are wanted; all if there are fewer.
        seed: The run's.
        round_index: The round.

    Returns:
        Some of them, in increasing order.
    """
    rng = np.random.default_rng(derive_seed(seed, "evaluating nodes", round_index))
    return tuple(sorted(rng.choice(clients, min(size, len(clients)), replace=False).tolist())) if clients else ()
