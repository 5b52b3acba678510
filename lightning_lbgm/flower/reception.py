"""Reception: waiting for nodes, and asking those that are new who they are."""

from __future__ import annotations

import logging
import math
import secrets
import time
from dataclasses import replace

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from lightning_lbgm.flower.nodes import Nodes
from lightning_lbgm.flower.records import Greeting, Introduction, RecordError, Refusal, read, write

__all__ = ["Reception"]

log = logging.getLogger("flwr")  # whose lines Flower shows

_POLL_SECONDS = 1.0
_TELL_SECONDS = 30.0


class Reception:
    """Keeps the table of nodes up to date.

    Args:
        grid: Flower's.
        nodes: The table.
        min_available: Nodes that must be there for a round to begin.
        timeout: Seconds to wait for new nodes' answers.
    """

    def __init__(self, grid: Grid, nodes: Nodes, min_available: int, timeout: float) -> None:
        self._grid, self._nodes = grid, nodes
        self._min_available, self._timeout = min_available, timeout

    def wait(self, greeting: Greeting) -> tuple[int, ...]:
        """Wait until enough nodes are there; return their clients.

        Args:
            greeting: What nodes are asked that nothing is known of.
        """
        nodes, told_at = self._nodes, -math.inf
        while True:
            fresh = nodes.see(self._grid.get_node_ids())
            if fresh:
                self._greet(greeting, fresh)
            there = nodes.available()
            if len(there) >= self._min_available:
                return there
            if time.monotonic() - told_at > _TELL_SECONDS:
                told_at = time.monotonic()
                log.info("Waiting for nodes: %s of %s are there.", len(there), self._min_available)
            time.sleep(_POLL_SECONDS)

    def look(self) -> tuple[int, ...]:
        """Return the clients whose nodes are there now, without waiting and without greeting new ones."""
        self._nodes.see(self._grid.get_node_ids())
        return self._nodes.available()

    def _greet(self, greeting: Greeting, node_ids: list[int]) -> None:
        tickets = {node_id: secrets.token_hex(8) for node_id in node_ids}
        messages = [
            Message(write(replace(greeting, ticket=ticket)), node_id, MessageType.QUERY)
            for node_id, ticket in tickets.items()
        ]
        silent = set(node_ids)
        replies = self._grid.send_and_receive(messages, timeout=self._timeout)
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            node_id = reply.metadata.src_node_id
            if node_id not in silent:
                continue
            silent.remove(node_id)
            if reply.has_error():
                self._nodes.refuse(node_id, f"it failed when it was asked for its data: {reply.error.reason}")
                continue
            try:
                answer = read(reply.content, Introduction, Refusal)
            except RecordError as error:
                self._nodes.refuse(node_id, str(error))
                continue
            if answer.ticket != tickets[node_id]:
                self._nodes.refuse(node_id, "the answer has another ticket than the greeting")
            elif isinstance(answer, Refusal):
                self._nodes.refuse(node_id, answer.reason)
            else:
                self._nodes.admit(node_id, answer)
