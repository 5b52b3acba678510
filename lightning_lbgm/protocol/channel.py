"""Channel: the one place in which a client's update becomes what the server sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_lbgm.compression.chain import Chain, as_chain
from lightning_lbgm.compression.context import Context, State
from lightning_lbgm.compression.methods.lookback import LookBack
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.core.layout import LayoutLike
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.protocol.endpoints import ClientEnd, Received, Rejection, ServerEnd, forgotten, new_state
from lightning_lbgm.protocol.message import Message, count_bits

__all__ = ["Channel", "SharedChannel", "WireChannel", "as_uplink"]


def as_uplink(stages: Sequence[Stage] | Stage | None) -> Chain:
    """Make the chain of an uplink; None is LBGM with the paper's threshold, 0.2.

    Raises:
        TypeError: If an element is not a stage.
        ValueError: If the stages do not go together in this order.
    """
    return as_chain([LookBack(threshold=0.2)] if stages is None else stages)


class Channel(ABC):
    """The way from a client to the server: encodes an update, carries the message, decodes it.

    It holds settings only. What its ends remember of a client is in a ``State`` of the caller's, made by ``init``, so
    that it can be checkpointed, taken back and moved to another process.

    Args:
        uplink: The stages.
    """

    def __init__(self, uplink: Sequence[Stage] | Stage) -> None:
        self.uplink = as_chain(uplink)

    @abstractmethod
    def init(self) -> State:
        """Make the state of a client that has sent nothing yet."""

    @abstractmethod
    def send(
        self, client_id: int, update: Dense, buffers: Mapping[str, Tensor], context: Context, state: State
    ) -> Received | None:
        """Carry one client's update of one round to the server.

        Args:
            client_id: The sender.
            update: The update, finite. It is not written to.
            buffers: Float buffers to send along, by name.
            context: The client's round.
            state: The client's state, changed in place.

        Returns:
            What the server has of it, valid until the update's memory is used again; None if the message was lost, or
            the server did not take it.
        """

    @abstractmethod
    def forget(self, state: State) -> None:
        """Let both ends forget what the client has sent, in place: its next update goes in full."""


class SharedChannel(Channel):
    """A channel within one process, whose ends share one state; nothing is lost, and no bytes are made.

    The server's copy of a client's state would be equal to the client's by construction, so there is one.

    Examples:
        >>> import torch
        >>> from lightning_lbgm import TopK
        >>> channel = SharedChannel([TopK(0.5)])
        >>> update = Dense(torch.tensor([3.0, 1.0]))
        >>> received = channel.send(7, update, {}, Context(), channel.init())
        >>> received.update.dense().tolist()
        [3.0, 0.0]
    """

    def init(self) -> State:
        return self.uplink.init()

    def send(
        self, client_id: int, update: Dense, buffers: Mapping[str, Tensor], context: Context, state: State
    ) -> Received:
        encoded = self.uplink.encode(update, state, context)
        bits = count_bits(encoded.payload.num_bits, buffers)
        return Received(encoded.decoded, dict(buffers), bits, encoded.decision)

    def forget(self, state: State) -> None:
        self.uplink.forget(state)


class WireChannel(Channel):
    """A channel of bytes between a ``ClientEnd`` and a ``ServerEnd``, each with a state of its own.

    What the server sees is equal to that of a ``SharedChannel`` to the bit as long as nothing is lost. Tensors are
    received on the device of the client's update.

    Args:
        uplink: The stages.
        layout: The parameter tensors; ints stand for vectors.
        buffers: The module's float buffers that clients may send, by name. None: none.
        transport: Carries the bytes of one message; returns None if it is lost. None: nothing is lost.

    Examples:
        >>> import torch
        >>> from lightning_lbgm import LookBack
        >>> channel = WireChannel([LookBack(0.2)], layout=[2])
        >>> state, update = channel.init(), Dense(torch.tensor([3.0, 1.0]))
        >>> [channel.send(7, update, {}, Context(round_index), state).bits for round_index in range(2)]
        [64, 32]
    """

    def __init__(
        self,
        uplink: Sequence[Stage] | Stage,
        layout: LayoutLike,
        buffers: Mapping[str, Tensor] | None = None,
        transport: Callable[[bytes], bytes | None] | None = None,
    ) -> None:
        super().__init__(uplink)
        self._server = ServerEnd(self.uplink, layout, buffers)
        self._transport = transport

    def init(self) -> State:
        return {"client": new_state(self.uplink), "server": new_state(self.uplink)}

    def send(
        self, client_id: int, update: Dense, buffers: Mapping[str, Tensor], context: Context, state: State
    ) -> Received | None:
        client = ClientEnd(client_id, self.uplink, state["client"])
        message, encoded = client.encode(update, context.round_index, context, buffers)
        sent = message.to_bytes()
        data = sent if self._transport is None else self._transport(sent)
        if data is None:
            return None
        # The server's end of this client alone: whom to forget is the caller's to say, to both ends.
        self._server.load_state_dict({"clients": {client_id: state["server"]}})
        try:
            received_message = Message.from_bytes(data, self._server.layout).to(update.device)
            received = self._server.receive(received_message, context.round_index, context)
        except Rejection as rejection:
            client.rejected(rejection)
            return None
        state["server"] = self._server.state_dict()["clients"][client_id]
        return Received(received.update, received.buffers, received.bits, encoded.decision)

    def forget(self, state: State) -> None:
        ClientEnd(0, self.uplink, state["client"]).forget()
        state["server"] = forgotten(self.uplink, state["server"])
