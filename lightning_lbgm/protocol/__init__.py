"""The protocol: messages between a client and the server, the channel that carries them, and its two ends."""

from lightning_lbgm.protocol.channel import Channel, SharedChannel, WireChannel
from lightning_lbgm.protocol.downlink import DownlinkServer
from lightning_lbgm.protocol.downlink_client import DownlinkClient
from lightning_lbgm.protocol.endpoints import ClientEnd, Received, Rejection, ServerEnd
from lightning_lbgm.protocol.message import HEADER_BYTES, Message, MessageError

__all__ = [
    "HEADER_BYTES",
    "Channel",
    "ClientEnd",
    "DownlinkClient",
    "DownlinkServer",
    "Message",
    "MessageError",
    "Received",
    "Rejection",
    "ServerEnd",
    "SharedChannel",
    "WireChannel",
]
