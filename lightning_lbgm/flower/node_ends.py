"""Node's ends: the client's half of the channel and of the downlink."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context, State
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.protocol.broadcast import Delivery
from lightning_lbgm.protocol.channel import Channel
from lightning_lbgm.protocol.downlink import Downlink
from lightning_lbgm.protocol.endpoints import ClientEnd, Received, Rejection, new_state

__all__ = ["NodeChannel", "NodeDownlink"]


class NodeChannel(Channel):
    """The client's half of a channel: encodes the update, and keeps the message for the reply.

    Args:
        uplink: The stages.

    Attributes:
        message: What is to be sent; None until the client's turn is over, and if its update is not finite.
    """

    def __init__(self, uplink: Chain) -> None:
        super().__init__(uplink)
        self.message: bytes | None = None

    def init(self) -> State:
        return {"client": new_state(self.uplink)}

    def send(
        self, client_id: int, update: Dense, buffers: Mapping[str, Tensor], context: Context, state: State
    ) -> Received:
        end = ClientEnd(client_id, self.uplink, state["client"])
        message, encoded = end.encode(update, context.round_index, context, buffers)
        self.message = message.to_bytes()  # now: its tensors are used again
        # What the server makes of it is not known here, and of no use: the next model comes from the server.
        return Received(update, {}, message.num_bits, encoded.decision)

    def forget(self, state: State) -> None:
        ClientEnd(0, self.uplink, state["client"]).forget()

    def agree(self, state: State, sequence: int, version: int) -> None:
        """Drop what the server does not remember in the same way, so that the next update goes in full.

        Args:
            state: The client's.
            sequence: Number of the last message that the server took.
            version: Version of what it remembers.
        """
        differs = state["client"]["memory"] != version
        reason = "the server remembers something else"
        ClientEnd(0, self.uplink, state["client"]).rejected(Rejection(reason, sequence, forgotten=differs))


class NodeDownlink(Downlink):
    """The client's half of a downlink: what the node holds, brought up to date already by the server's messages.

    Args:
        held: What it holds now, shape ``(M,)``.
        bits: Bits that came for it.
        is_whole: Whether it was the whole model.
    """

    def __init__(self, held: Tensor, bits: int, is_whole: bool) -> None:
        self._held = held
        self._delivery = Delivery(bits, 8 * held.nbytes, whole=is_whole)

    def begin_round(self, params: Tensor, context: Context, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._held

    def deliver(self, client_id: int) -> Delivery:
        return self._delivery
