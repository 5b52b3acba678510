"""Remote clients: nodes that train a round's clients, in the simulation's place of a client trainer."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message as FlowerMessage
from torch import nn

from lightning_lbgm.clients.base import ClientUpdate, LocalResult, RoundStart
from lightning_lbgm.clients.log import RoundLog
from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context, Decision, State
from lightning_lbgm.data.rounds import Round
from lightning_lbgm.flower.answers import Answers
from lightning_lbgm.flower.logged import unpack
from lightning_lbgm.flower.nodes import Nodes
from lightning_lbgm.flower.records import Refusal, Task, Work
from lightning_lbgm.flower.remote_ends import RemoteChannel, RemoteDownlink, RemoteWholeModel
from lightning_lbgm.payloads.codec import Writer
from lightning_lbgm.payloads.states import write_state
from lightning_lbgm.protocol.message import MessageError
from lightning_lbgm.simulation.federation import Federation

__all__ = ["Exchange", "RemoteTrainer", "Terms"]

Exchange = Callable[[int, "dict[int, Task]"], "list[FlowerMessage]"]
"""Sends a round's tasks, by client, and returns the replies that came in time."""


@dataclass
class Terms:
    """What all tasks of a run have in common.

    Attributes:
        federation: Names the federation.
        settings: Digest of what both ends must agree on.
        local_epochs: Passes over a node's examples in a round; 0: steps are counted.
        local_steps: Optimizer steps in a round; 0: passes are counted.
        rounds_per_epoch: Rounds in an epoch.
        refusals: Replies that were not taken so far, by client.
    """

    federation: str
    settings: str
    local_epochs: int
    local_steps: int
    rounds_per_epoch: int
    refusals: dict[int, int] = field(default_factory=dict)


class RemoteTrainer:
    """Let nodes train a round's clients; yield what the server has of their updates, in the order of the cohort.

    A client whose reply did not come, or was refused, yields an update of zeros that the channel does not take, so that
    it counts as rejected.

    Args:
        federation: The server's federation, with a remote channel and downlink.
        module: The module, for the names of what is logged.
        capture: Takes what the clients have logged.
        nodes: The table of nodes.
        exchange: Sends tasks and returns the replies.
        terms: What all tasks have in common.
    """

    def __init__(
        self,
        federation: Federation,
        module: nn.Module,
        capture: RoundLog,
        nodes: Nodes,
        exchange: Exchange,
        terms: Terms,
    ) -> None:
        self.capture = capture
        self._federation, self._module, self._nodes = federation, module, nodes
        self._exchange, self._terms = exchange, terms
        self._zeros = torch.zeros(0)

    def run(self, round_: Round, start: RoundStart) -> Iterator[ClientUpdate]:
        """Yield the clients' updates."""
        federation = self._federation
        self._zeros = torch.zeros_like(start.params)
        shared = _shared_bytes(federation.uplink, federation.shared)
        tasks = {client_id: self._task(client_id, round_.index, start.seed, shared) for client_id in round_.cohort}
        tickets = {client_id: task.ticket for client_id, task in tasks.items()}
        answers = Answers(f"Round {round_.index}", round_.index, tickets, self._nodes, self._terms.refusals)
        answers.sort(self._exchange(round_.index, tasks))
        logged = []
        for client_id in round_.cohort:
            update, entries = self._take(client_id, round_.index, answers)
            yield update
            logged.append(entries)
        # Nothing else was logged in this round, so that this is the whole of it.
        self.capture.combine(logged, self._module, federation.flat.device)

    def _task(self, client_id: int, round_index: int, seed: int, shared: bytes) -> Task:
        federation, terms = self._federation, self._terms
        assert isinstance(federation.downlink, (RemoteDownlink, RemoteWholeModel))
        known: State = federation.clients.get(client_id, {}).get("uplink") or federation.channel.init()
        return Task(
            federation=terms.federation,
            settings=terms.settings,
            seed=seed,
            local_epochs=terms.local_epochs,
            local_steps=terms.local_steps,
            rounds_per_epoch=terms.rounds_per_epoch,
            round_index=round_index,
            client_id=client_id,
            sequence=known["server"]["sequence"],
            state_version=known["server"]["memory"],
            shared=shared,
            model=federation.downlink.outbox[client_id],
            ticket=secrets.token_hex(8),
        )

    def _take(self, client_id: int, round_index: int, answers: Answers) -> tuple[ClientUpdate, list[dict[str, Any]]]:
        """Return a client's update, and what it logged; zeros and nothing if there is none that can be taken."""
        federation, channel = self._federation, self._federation.channel
        assert isinstance(channel, RemoteChannel)
        try:
            work = self._read(client_id, answers)
            context = Context(round_index, federation.shared, federation.seed, (client_id,))
            state = federation.clients.get(client_id, {}).get("uplink")
            decision = _decision(work)
            received = channel.take(work.message, client_id, state, context, decision, federation.flat.device)
            if not federation.buffers.is_sound(received.buffers):
                channel.drop(client_id)
                raise MessageError("A buffer is not finite.")
        except MessageError as error:
            reason = answers.refuse(client_id, str(error))
            return ClientUpdate(client_id, LocalResult(), self._zeros, {}, missing=reason), []
        loss = torch.tensor(work.loss * work.examples, device=federation.flat.device)
        metrics = dict(zip(work.metric_names, work.metric_values))
        local = LocalResult(work.local_steps, work.examples, loss if math.isfinite(work.loss) else None, metrics)
        update = received.dense().to(federation.flat.dtype)
        return ClientUpdate(client_id, local, update, received.buffers), unpack(work.logged)

    def _read(self, client_id: int, answers: Answers) -> Work:
        """Read an answer, and note what the node says that it holds.

        Raises:
            MessageError: If there is none, or it has no update of this client and round.
        """
        node = self._nodes[client_id]
        node.held = 0  # without an answer it may hold this round's model or not: it gets the whole one
        answer: Work | Refusal = answers.read(client_id, Work)
        node.held = answer.held
        if isinstance(answer, Refusal):
            raise MessageError(answer.reason)
        answers.check(client_id, answer)
        return answer


def _decision(work: Work) -> Decision | None:
    """Return the look-back tests that a node says that it made."""
    if not work.tested:
        return None
    if not all(0 <= error <= 1 for error in work.errors):
        raise MessageError("The errors of the look-back tests are not in [0, 1].")
    threshold = None if math.isnan(work.threshold) else work.threshold
    return Decision(tuple(work.recycled), tuple(work.errors), tuple(work.coefficients), threshold, outcome=work.outcome)


def _shared_bytes(uplink: Chain, shared: State) -> bytes:
    """Return what the stages keep for all clients in its binary form.

    What the server has aggregated stays at the server: only the stages that put it in again there have it.
    """
    stages = [
        _without_tensors(state) if stage.uses_mean else state for stage, state in zip(uplink.stages, shared["stages"])
    ]
    out = Writer()
    write_state(out, {"stages": stages})
    return out.getvalue()


def _without_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _without_tensors(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_without_tensors(value) for value in state]
    return None if isinstance(state, torch.Tensor) else state
