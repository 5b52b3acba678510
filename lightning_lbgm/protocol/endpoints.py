"""The two ends of an uplink that loses, repeats or reorders messages.

A client numbers its messages, and names in each the version of what it believes the server to remember of it (its
look-back gradients): a checksum over all that went into it, so that equal versions are equal memories. A server that
does not have that version rejects the message; told so, the client forgets what it believed and sends its next update
in full. In simulation nothing is lost, and ``Federation`` lets both ends share one state instead.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.compression.chain import as_chain
from lightning_lbgm.compression.context import Context, State
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.protocol.message import Message, MessageError
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
        self._state = state or {"sequence": 0, "memory": 0, "uplink": self.uplink.init()}

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
        context = replace(_checked(context, round_index, "ClientEnd.send"), path=(self.client_id,))
        state = self._state
        dense = update if isinstance(update, Dense) else Dense(update)
        encoded = self.uplink.encode(dense, state["uplink"], context)
        state["sequence"] += 1
        base = state["memory"] if encoded.reads else 0
        if encoded.writes:
            # Over the version before, so that it stands for all that the memory is made of; 0 is no version.
            state["memory"] = zlib.crc32(encoded.payload.to_bytes(), base) or 1
        memory = state["memory"] if encoded.reads or encoded.writes else 0
        return Message(
            self.client_id, encoded.payload, dict(buffers or {}), round_index, state["sequence"], base, memory
        )

    def rejected(self, rejection: Rejection) -> None:
        """Take note that the server did not take a message: where it lacks something, the next goes in full."""
        state = self._state
        restarted = rejection.sequence > state["sequence"]  # a client that lost its state has lost count too
        state["sequence"] = max(state["sequence"], rejection.sequence)
        if rejection.forgotten or restarted:
            self.uplink.forget(state["uplink"])
            state["memory"] = 0

    def state_dict(self) -> State:
        """Return the state, made of built-ins and tensors (shared, not copied)."""
        return self._state


@dataclass(frozen=True)
class Received:
    """What a message brought. It unpacks into update and buffers.

    Attributes:
        update: The decoded update.
        buffers: The float buffers that the client's training changed, by name.
    """

    update: Payload
    buffers: dict[str, Tensor]

    def __iter__(self) -> Iterator[Any]:
        """Yield update and buffers: ``update, buffers = server.receive(...)``."""
        return iter((self.update, self.buffers))

    def dense(self) -> Tensor:
        """Return the update as a vector of shape ``(M,)``, not to be written to."""
        return self.update.dense()


class ServerEnd:
    """The server's end: turns messages into updates, and never takes one twice, late or beside what it refers to.

    Args:
        uplink: The stages, the same at both ends. Beyond the ``capacity`` of a ``LookBack`` the client whose last
            message is longest ago is forgotten, and will be asked to send in full.
        layout: The parameter tensors; ints stand for vectors.
        buffers: The module's float buffers that clients may send, by name; their shapes and dtypes count, not their
            values. None: none.
    """

    def __init__(
        self, uplink: Sequence[Stage] | Stage, layout: LayoutLike, buffers: Mapping[str, Tensor] | None = None
    ) -> None:
        self.uplink = as_chain(uplink)
        self.layout = Layout.of(layout)
        self._buffers = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in (buffers or {}).items()}
        self._clients: dict[int, State] = {}
        self._uses = LeastRecentlyUsed(self.uplink.capacity)

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
        message = data if isinstance(data, Message) else Message.from_bytes(data, self.layout)
        context = replace(context, path=(message.client_id,))
        if message.payload.size != self.layout.size:
            raise MessageError(
                f"The message holds an update of {message.payload.size} entries, not {self.layout.size}."
            )
        self._check_buffers(message.buffers)
        state = self._clients.get(message.client_id) or {"sequence": 0, "memory": 0, "uplink": self.uplink.init()}
        name = f"Client {message.client_id}, message {message.sequence}:"
        if message.round_index != round_index or message.sequence <= state["sequence"]:
            reason = f"{name} round {message.round_index}; this is round {round_index}, after message"
            raise Rejection(f"{reason} {state['sequence']}.", state["sequence"], forgotten=False)
        if message.base and message.base != state["memory"]:
            reason = f"{name} refers to version {message.base} of its memory, the server has {state['memory']}."
            raise Rejection(reason, state["sequence"], forgotten=True)
        # On a copy: a message that turns out to be none must leave no trace.
        starts_afresh = bool(message.memory and not message.base)
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
        for client_id in self._uses.begin([message.client_id]):
            # Its count stays: what it sent before is not taken again.
            self._clients[client_id] = {**self._clients[client_id], "memory": 0, "uplink": self.uplink.init()}
        self._uses.finish()
        memory = message.memory or state["memory"]
        self._clients[message.client_id] = {"sequence": message.sequence, "memory": memory, "uplink": stages}
        return Received(update, dict(message.buffers))

    def _check_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            found, wanted = (tuple(buffer.shape), buffer.dtype), self._buffers.get(name)
            if wanted is None:
                raise MessageError(
                    f"The message has the buffer {name!r}; known are {sorted(self._buffers)}. Pass the module's float"
                    " buffers as `ServerEnd(buffers=...)`."
                )
            if found != wanted:
                raise MessageError(f"The message has the buffer {name!r} of shape and dtype {found}, not {wanted}.")

    def state_dict(self) -> dict[str, Any]:
        """Return the state, made of built-ins and tensors (shared, not copied)."""
        return {"clients": self._clients, "uses": self._uses.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._clients = dict(state["clients"])
        self._uses = LeastRecentlyUsed(self.uplink.capacity, state.get("uses", []))


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
