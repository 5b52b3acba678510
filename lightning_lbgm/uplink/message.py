"""The one thing that crosses from a client to the server."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_lbgm.uplink.payload import Payload

__all__ = ["Message"]


@dataclass(frozen=True)
class Message:
    """What a client sends in one round.

    Attributes:
        client_id: The sender.
        payload: The encoded update.
        buffers: The float buffers (BatchNorm's running statistics) that the client's training changed, by name.
    """

    client_id: int
    payload: Payload
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bits(self) -> int:
        """Bits sent: the payload's and the buffers' tensors. Framing (client, round, kind, layout) is not counted."""
        return self.payload.num_bits + sum(8 * tensor.nbytes for tensor in self.buffers.values())
