"""Nodes: which of Flower's nodes is which client, and which of them are there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from lightning_lbgm.data.evaluation import EvaluationData
from lightning_lbgm.data.feed import LocalBatch
from lightning_lbgm.flower.records import Introduction

__all__ = ["Node", "NodeFeed", "Nodes"]

log = logging.getLogger("flwr")  # whose lines Flower shows


@dataclass
class Node:
    """A node that has introduced itself.

    Attributes:
        node_id: Flower's number of it.
        client_id: The client that it is.
        num_examples: n_k.
        num_steps: Its local steps in a round.
        held: Version of the model that it holds, as it said last; 0: none.
    """

    node_id: int
    client_id: int
    num_examples: int
    num_steps: int
    held: int = 0


class Nodes:
    """The table of nodes, by client.

    Args:
        num_clients: K: clients have numbers below it.

    Attributes:
        refused: Why nodes that are there do not take part, by Flower's number.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.refused: dict[int, str] = {}
        self._by_client: dict[int, Node] = {}
        self._online: set[int] = set()

    def __getitem__(self, client_id: int) -> Node:
        return self._by_client[client_id]

    def __contains__(self, client_id: int) -> bool:
        return client_id in self._by_client

    def see(self, node_ids: Iterable[int]) -> list[int]:
        """Take note of which nodes are there; return those that nothing is known of, in increasing order."""
        self._online = set(node_ids)
        self.refused = {node_id: why for node_id, why in self.refused.items() if node_id in self._online}
        known = {node.node_id for node in self._by_client.values()} | self.refused.keys()
        return sorted(self._online - known)

    def available(self) -> tuple[int, ...]:
        """Return the clients whose nodes are there, in increasing order."""
        return tuple(sorted(k for k, node in self._by_client.items() if node.node_id in self._online))

    def admit(self, node_id: int, introduction: Introduction) -> None:
        """Give a node its client, or refuse it. A client whose node is gone may come back as another node."""
        client_id = introduction.client_id
        if client_id < 0:
            free = (k for k in range(self.num_clients) if k not in self._by_client)
            client_id = next(free, self.num_clients)
        if client_id >= self.num_clients:
            self.refuse(node_id, f"it would be client {client_id}, and `num_clients={self.num_clients}`")
            return
        holder = self._by_client.get(client_id)
        if holder is not None and holder.node_id in self._online and holder.node_id != node_id:
            self.refuse(node_id, f"client {client_id} is node {holder.node_id}, which is there")
            return
        self._by_client[client_id] = Node(node_id, client_id, introduction.num_examples, introduction.num_steps)
        log.info("Node %s is client %s, with %s examples.", node_id, client_id, introduction.num_examples)

    def refuse(self, node_id: int, why: str) -> None:
        """Leave a node out until it has been away."""
        self.refused[node_id] = why
        log.warning("Node %s takes no part: %s.", node_id, why)

    def state_dict(self) -> list[dict[str, int]]:
        """Return the table as built-ins."""
        return [asdict(node) for node in self._by_client.values()]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """Go on from ``state_dict``."""
        self._by_client = {entry["client_id"]: Node(**entry) for entry in state}


class NodeFeed:
    """What the server knows of the clients' data: how much there is. The data itself lies on the nodes.

    Args:
        nodes: The table.
        seed: The run's seed.
    """

    client_names: tuple[str, ...] | None = None
    next_cohort: Callable[[int], tuple[int, ...]] | None = None
    held_out: EvaluationData | None = None

    def __init__(self, nodes: Nodes, seed: int) -> None:
        self.seed = seed
        self._nodes = nodes

    @property
    def num_clients(self) -> int:
        """Return K."""
        return self._nodes.num_clients

    def prepare(self, world: Any) -> None:
        """Do nothing: nodes introduce themselves."""

    def num_examples(self, client_id: int) -> int:
        """Return n_k; 0 if the client has not been seen."""
        return self._nodes[client_id].num_examples if client_id in self._nodes else 0

    def num_steps(self, client_id: int) -> int:
        """Return the number of local steps of a client in a round; 1 if the client has not been seen."""
        return self._nodes[client_id].num_steps if client_id in self._nodes else 1

    def work(self, client_id: int) -> int:
        """Return the client's local work in a round, in steps."""
        return self.num_steps(client_id)

    def fingerprint(self) -> str:
        """Return the same whoever has which examples: that is the nodes' affair."""
        return "nodes"

    def stream(self, round_index: int, cohort: Sequence[int]) -> Iterator[tuple[int, Iterator[LocalBatch]]]:
        """Refuse: there is no data here."""
        self._refuse()

    def turn(self, round_index: int, client_id: int) -> Iterator[LocalBatch]:
        """Refuse: there is no data here."""
        self._refuse()

    def rest(self) -> None:
        """Do nothing."""

    @staticmethod
    def _refuse() -> NoReturn:
        raise RuntimeError(
            "The clients' examples lie on their nodes, and the server cannot read them. Callbacks that look at clients'"
            " batches, such as `ClientEvaluation`, work in a simulation with `LBGMFederated`."
        )
