"""Server's ends of nodes: the server's half of the channel and of the downlink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context, Decision, State
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.flower.nodes import Nodes
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.protocol.broadcast import BROADCAST, Delivery
from lightning_lbgm.protocol.channel import Channel
from lightning_lbgm.protocol.downlink import DownlinkServer, WholeModel
from lightning_lbgm.protocol.endpoints import Received, ServerEnd, forgotten, new_state
from lightning_lbgm.protocol.message import HEADER_BYTES, Message, MessageError

__all__ = ["RemoteChannel", "RemoteDownlink", "RemoteWholeModel"]


@dataclass(frozen=True)
class _Taken:
    """What a node's reply came to.

    Attributes:
        received: What the server has of its message.
        state: The server's state of the client after it.
    """

    received: Received
    state: State


class RemoteChannel(Channel):
    """The server's half of a channel: decodes what a node has sent.

    Args:
        uplink: The stages.
        layout: The parameter tensors.
        known: What may come besides the update, by name.
    """

    def __init__(self, uplink: Chain, layout: Layout, known: Mapping[str, Tensor]) -> None:
        super().__init__(uplink)
        self.layout = layout
        self._end = ServerEnd(uplink, layout, known)
        self._taken: dict[int, _Taken] = {}

    def init(self) -> State:
        return {"server": new_state(self.uplink)}

    def take(
        self,
        data: bytes,
        client_id: int,
        state: State | None,
        context: Context,
        decision: Decision | None,
        device: torch.device,
    ) -> Received:
        """Decode a client's message; ``send`` will hand it on, and advance the client's state.

        Args:
            data: The message.
            client_id: The client that its node is.
            state: The server's state of the client; None if it has sent nothing yet.
            context: The client's round.
            decision: The look-back tests that the client says that it made.
            device: Where the update goes.

        Raises:
            MessageError: If it is none, is of another client or round, comes again, or refers to something that the
                server does not have.
        """
        known = (state or self.init())["server"]
        self._end.load_state_dict({"clients": {client_id: known}})
        try:
            message = Message.from_bytes(data, self.layout).to(device)
            if message.client_id != client_id:
                raise MessageError(f"The message is of client {message.client_id}, and the node is client {client_id}.")
            received = self._end.receive(message, context.round_index, context)
        except MessageError:
            raise
        except Exception as error:  # whatever bytes from elsewhere lead to, the round goes on
            raise MessageError(f"The message does not decode: {type(error).__name__}: {error}") from error
        received = replace(received, decision=decision)
        self._taken[client_id] = _Taken(received, self._end.state_dict()["clients"][client_id])
        return received

    def drop(self, client_id: int) -> None:
        """Forget a message that was decoded: ``send`` does not hand it on."""
        self._taken.pop(client_id, None)

    def send(
        self, client_id: int, update: Dense, buffers: Mapping[str, Tensor], context: Context, state: State
    ) -> Received | None:
        taken = self._taken.pop(client_id, None)
        if taken is None:
            return None
        state["server"] = taken.state
        return taken.received

    def forget(self, state: State) -> None:
        state["server"] = forgotten(self.uplink, state["server"])


class RemoteWholeModel(WholeModel):
    """A downlink without stages: each node gets the whole model in each of its rounds.

    Attributes:
        outbox: The messages for each client of the round.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outbox: dict[int, list[bytes]] = {}
        self._messages: list[bytes] = []

    def begin_round(self, params: Tensor, context: Context, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        self.outbox = {}
        message = Message(BROADCAST, Dense(params), dict(buffers or {}), context.round_index)
        self._messages = [message.to_bytes()]
        return super().begin_round(params, context, buffers)

    def deliver(self, client_id: int) -> Delivery:
        self.outbox[client_id] = self._messages
        return super().deliver(client_id)


class RemoteDownlink(DownlinkServer):
    """The server's end of a downlink to nodes that say which version of the model they hold.

    Args:
        downlink: The stages.
        layout: The parameter tensors.
        nodes: The table of nodes.

    Attributes:
        outbox: The messages for each client of the round.
    """

    def __init__(self, downlink: Chain, layout: Layout, nodes: Nodes) -> None:
        super().__init__(downlink, layout, keep_messages=True)
        self.outbox: dict[int, list[bytes]] = {}
        self._nodes = nodes
        self._following: dict[int, list[bytes]] = {}  # the round's messages by the version that they follow

    def begin_round(self, params: Tensor, context: Context, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        self.outbox, self._following = {}, {}
        return super().begin_round(params, context, buffers)

    def deliver(self, client_id: int) -> Delivery:
        """Make the messages that bring a client's node up to date from what it said that it holds."""
        version = self._nodes[client_id].held
        if version not in self._following:
            self._following[version] = self.messages(version)
        messages = self.outbox[client_id] = self._following[version]
        delivery = super().deliver(client_id)
        bits = sum(8 * (len(data) - HEADER_BYTES) for data in messages)
        is_whole = self._lacking(version) is None
        return Delivery(bits, delivery.dense_bits, whole=is_whole, missed=max(0, len(messages) - 1))
