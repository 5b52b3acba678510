"""Endpoints of an uplink that loses, repeats or reorders messages: the client's and the server's.

A client numbers its messages, and names in each the version of the state (its look-back gradients) that it believes the
server to have of it: a checksum over all that went into it, so that equal versions are equal states. A server that does
not have that version rejects the message. The client then forgets what it believed and sends its next update in full.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.compression.chain import Chain, as_chain
from lightning_lbgm.compression.context import Context, Decision, State
from lightning_lbgm.compression.stage import Encoded, Stage
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.protocol.message import Message, MessageError, check_buffers, open_message
from lightning_lbgm.protocol.recency import LeastRecentlyUsed

__all__ = ["ClientEnd", "Received", "Rejection", "ServerEnd"]


class Rejection(MessageError):
    """A message in good form that the server does not take, and what the client must know of it.

    Attributes:
        sequence: Number of the last message that the server took from the client.
        forgotten: Whether the server lacks what the message refers to.
    """

    def __init__(self, reason: str, sequence: int, *, forgotten: bool) -> None:
        super().__init__(reason)
        self.sequence = sequence
        self.forgotten = forgotten


class ClientEnd:
    """A client's end: turns updates into messages.

    Args:
        client_id: The client.
        uplink: The stages, the same at both ends.
        state: A ``state_dict`` to go on from; None: the client has sent nothing yet.

    Examples:
        >>> import torch
        >>> from lightning_lbgm import LookBack
        >>> from lightning_lbgm.compression import Context
        >>> client, server = ClientEnd(0, [LookBack(0.2)]), ServerEnd([LookBack(0.2)], [2])
        >>> contexts = [Context(round_index, seed=1) for round_index in range(3)]
        >>> _ = client.send(torch.tensor([1.0, 2.0]), 0, contexts[0])  # this one is lost
        >>> message = client.send(torch.tensor([2.0, 4.0]), 1, contexts[1])
        >>> try:
        ...     update, buffers = server.receive(message.to_bytes(), 1, contexts[1])
        ... except Rejection as rejection:
        ...     client.rejected(rejection)
        >>> message = client.send(torch.tensor([2.0, 4.0]), 2, contexts[2])
        >>> update, buffers = server.receive(message.to_bytes(), 2, contexts[2])
        >>> update.dense().tolist()
        [2.0, 4.0]
    """

    def __init__(self, client_id: int, uplink: Sequence[Stage] | Stage, state: State | None = None) -> None:
        self.client_id = client_id
        self.uplink = as_chain(uplink)
        self._state = state or new_state(self.uplink)

    def send(
        self,
        update: Tensor | Dense,
        round_index: int,
        context: Context | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Message:
        """Encode an update.

        Args:
            update: Shape ``(M,)``, finite.
            round_index: The round that it belongs to.
            context: The round's, with the run's seed and what the server told: it must be given. Random choices are
                those of the simulation.
            buffers: Float buffers to send along, by name.

        Raises:
            TypeError: If there is no context.
            ValueError: If the context is of another round.
        """
        return self.encode(update, round_index, context, buffers)[0]

    def encode(
        self,
        update: Tensor | Dense,
        round_index: int,
        context: Context | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Message, Encoded]:
        """Encode an update as ``send`` does; return the message, and what the client alone knows of it."""
        context = replace(_checked(context, round_index, "ClientEnd.send"), path=(self.client_id,))
        state = self._state
        dense = update if isinstance(update, Dense) else Dense(update)
        encoded = self.uplink.encode(dense, state["uplink"], context)
        state["sequence"] += 1
        base = state["memory"] if encoded.needs_state else 0
        if encoded.updates_state:
            # Over the version before, so that it stands for all that the state is made of; 0 is no version.
            state["memory"] = zlib.crc32(encoded.payload.to_bytes(), base) or 1
        version = state["memory"] if encoded.needs_state or encoded.updates_state else 0
        message = Message(
            self.client_id, encoded.payload, dict(buffers or {}), round_index, state["sequence"], base, version
        )
        return message, encoded

    def forget(self) -> None:
        """Drop what the server is to remember too: the next update goes in full."""
        self.uplink.forget(self._state["uplink"])
        self._state["memory"] = 0

    def rejected(self, rejection: Rejection) -> None:
        """Take note that the server did not take a message: if it lacks something, the next goes in full."""
        state = self._state
        restarted = rejection.sequence > state["sequence"]  # a client that lost its state has lost count too
        state["sequence"] = max(state["sequence"], rejection.sequence)
        if rejection.forgotten or restarted:
            self.forget()

    def state_dict(self) -> State:
        """Return the state, made of built-ins and tensors (shared, not copied)."""
        return self._state


@dataclass(frozen=True)
class Received:
    """What the server has of a client's message. It unpacks into update and buffers.

    Attributes:
        update: The decoded update, which is what the server sees.
        buffers: The float buffers that the client's training changed, by name.
        bits: Bits sent, without the header.
        decision: The client's look-back tests; None if none was made, or if the client is elsewhere.
    """

    update: Payload
    buffers: dict[str, Tensor]
    bits: int = 0
    decision: Decision | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield update and buffers: ``update, buffers = server.receive(...)``."""
        return iter((self.update, self.buffers))

    def dense(self) -> Tensor:
        """Return the update as a vector of shape ``(M,)``, not to be written to."""
        return self.update.dense()


class ServerEnd:
    """The server's end: turns messages into updates, and never takes one twice, late or beside what it refers to.

    Args:
        uplink: The stages, the same at both ends.
        layout: The parameter tensors; ints stand for vectors.
        buffers: The module's float buffers that clients may send, by name; their shapes and dtypes count, not their
            values. None: none.
        capacity: Clients that are remembered: beyond it the one whose last message is longest ago is forgotten, and
            will be asked to send in full. None: all.
    """

    def __init__(
        self,
        uplink: Sequence[Stage] | Stage,
        layout: LayoutLike,
        buffers: Mapping[str, Tensor] | None = None,
        capacity: int | None = None,
    ) -> None:
        self.uplink = as_chain(uplink)
        self.layout = Layout.of(layout)
        self._buffers = dict(buffers or {})
        self._clients: dict[int, State] = {}
        self._recency = LeastRecentlyUsed(capacity or self.uplink.capacity)

    def receive(self, data: bytes | Message, round_index: int, context: Context | None = None) -> Received:
        """Decode a message of the current round.

        Args:
            data: The message.
            round_index: The current round.
            context: The round's, with the run's seed and what was told to the clients: it must be given.

        Raises:
            TypeError: If there is no context.
            ValueError: If the context is of another round.
            MessageError: If the bytes are no message, its update is of another size, or it has a buffer that the module
                does not have in that shape and dtype.
            Rejection: If the message is of another round, or older than one that was taken; if it refers to something
                that the server does not have; or if its update is not finite, or a buffer is not a number. Hand it to
                the client's ``rejected``. The server is as it was before.
        """
        context = _checked(context, round_index, "ServerEnd.receive")
        message = open_message(data, self.layout)
        context = replace(context, path=(message.client_id,))
        check_buffers(message.buffers, self._buffers, "ServerEnd")
        state = self._clients.get(message.client_id) or new_state(self.uplink)
        name = f"Client {message.client_id}, message {message.sequence}:"
        if message.round_index != round_index or message.sequence <= state["sequence"]:
            reason = f"{name} round {message.round_index}; this is round {round_index}, after message"
            raise Rejection(f"{reason} {state['sequence']}.", state["sequence"], forgotten=False)
        if message.base_version and message.base_version != state["memory"]:
            reason = f"{name} refers to version {message.base_version} of its state, the server has {state['memory']}."
            raise Rejection(reason, state["sequence"], forgotten=True)
        # On a copy: a message that turns out to be none must leave no trace.
        starts_afresh = bool(message.state_version and not message.base_version)
        stages = self.uplink.init() if starts_afresh else copy.deepcopy(state["uplink"])
        try:
            update = self.uplink.decode(message.payload, stages, context)
            finite = bool(torch.isfinite(update.dense()).all())
        except (MessageError, TypeError) as error:
            reason = f"{name} does not decode to an update. {error}"
            raise Rejection(reason, state["sequence"], forgotten=True) from error
        if not finite:
            raise Rejection(f"{name} the update is not finite.", state["sequence"], forgotten=True)
        for buffer_name, buffer in message.buffers.items():
            if bool(torch.isnan(buffer).any()):
                raise Rejection(f"{name} the buffer {buffer_name!r} has NaN.", state["sequence"], forgotten=True)
        for client_id in self._recency.begin([message.client_id]):
            self._clients[client_id] = forgotten(self.uplink, self._clients[client_id])
        self._recency.finish()
        version = message.state_version or state["memory"]
        self._clients[message.client_id] = {"sequence": message.sequence, "memory": version, "uplink": stages}
        return Received(update, dict(message.buffers), message.num_bits)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, made of built-ins and tensors (shared, not copied)."""
        return {"clients": self._clients, "uses": self._recency.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._clients = dict(state["clients"])
        self._recency = LeastRecentlyUsed(self._recency.capacity, state.get("uses", []))


def new_state(uplink: Chain) -> State:
    """Make either end's state of a client that has sent nothing; ``"memory"`` is its version."""
    return {"sequence": 0, "memory": 0, "uplink": uplink.init()}


def forgotten(uplink: Chain, state: State) -> State:
    """Make the server's state of a client that it forgets: the count stays, so that nothing is taken twice."""
    return {**new_state(uplink), "sequence": state["sequence"]}


def _checked(context: Context | None, round_index: int, method: str) -> Context:
    """Return the round's context, or refuse what is none."""
    if not isinstance(context, Context):
        raise TypeError(
            f"`{method}(context=...)` must be the round's `Context`; got {context!r}. Without it random choices would"
            f" not be those of the other end and of the simulation: pass `Context({round_index}, shared, seed)`, with"
            " what the server keeps for all clients and the run's seed."
        )
    if context.round_index != round_index:
        raise ValueError(
            f"`{method}(round_index={round_index}, context=...)` got the context of round {context.round_index}: pass"
            f" `Context({round_index}, shared, seed)`."
        )
    return context
