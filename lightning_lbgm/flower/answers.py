"""Answers of nodes: one for each client that was asked, read and checked, or refused, counted and named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message as FlowerMessage

from lightning_lbgm.flower.nodes import Nodes
from lightning_lbgm.flower.records import RecordError, Refusal, Score, Work, read
from lightning_lbgm.protocol.message import MessageError

__all__ = ["Answers"]

log = logging.getLogger("flwr")  # whose lines Flower shows

_LONGEST_REASON = 500


class Answers:
    """What came back for what some clients' nodes were asked.

    Args:
        occasion: What it was about, for the log, such as ``"Round 3"``.
        round_index: The round.
        tickets: Of what was asked, by client.
        nodes: The table of nodes.
        refusals: Answers that were not taken so far, by client; those of now are added.
    """

    def __init__(
        self, occasion: str, round_index: int, tickets: Mapping[int, str], nodes: Nodes, refusals: dict[int, int]
    ) -> None:
        self._occasion, self._round_index = occasion, round_index
        self._tickets, self._nodes, self._refusals = tickets, nodes, refusals
        self._replies: dict[int, FlowerMessage] = {}

    def sort(self, replies: Sequence[FlowerMessage]) -> None:
        """Keep one reply for each client that was asked; refuse others."""
        clients = {self._nodes[client_id].node_id: client_id for client_id in self._tickets}
        for reply in replies:
            node_id = reply.metadata.src_node_id
            client_id = clients.get(node_id)
            if client_id is None:
                log.warning("%s: node %s was not asked and is not heard.", self._occasion, node_id)
            elif client_id in self._replies:
                self.refuse(client_id, "it answered more than once; the first answer counts")
            else:
                self._replies[client_id] = reply

    def read(self, client_id: int, kind: type[Work] | type[Score]) -> Any:
        """Read a client's answer.

        Args:
            client_id: The client.
            kind: The class that is expected.

        Returns:
            An object of it, of this client and round; or a ``Refusal``.

        Raises:
            MessageError: If there is none.
        """
        reply = self._replies.get(client_id)
        if reply is None or reply.has_error():
            raise MessageError("No answer came." if reply is None else f"It failed: {reply.error.reason}")
        try:
            answer = read(reply.content, kind, Refusal)
        except RecordError as error:
            raise MessageError(str(error)) from error
        if answer.ticket != self._tickets[client_id]:
            raise MessageError(
                "The answer has another ticket than the task: it is of an earlier one, or of another node."
            )
        return answer

    def check(self, client_id: int, answer: Work | Score) -> None:
        """Check whose answer it is.

        Raises:
            MessageError: If it is of another client or round.
        """
        if (answer.client_id, answer.round_index) != (client_id, self._round_index):
            raise MessageError(f"The answer is of client {answer.client_id} and round {answer.round_index}.")

    def refuse(self, client_id: int, reason: str) -> str:
        """Count an answer that is not taken, and name it in the log; return the reason in a line."""
        self._refusals[client_id] = self._refusals.get(client_id, 0) + 1
        node_id, short = self._nodes[client_id].node_id, " ".join(reason.split())[:_LONGEST_REASON]
        log.warning("%s: client %s (node %s) is left out: %s", self._occasion, client_id, node_id, short)
        return short
