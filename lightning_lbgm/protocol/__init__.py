"""The protocol: messages between a client and the server, and the two ends that keep in step by them."""

from lightning_lbgm.protocol.endpoints import ClientEnd, Received, Rejection, ServerEnd
from lightning_lbgm.protocol.message import HEADER_BYTES, Message, MessageError

__all__ = ["HEADER_BYTES", "ClientEnd", "Message", "MessageError", "Received", "Rejection", "ServerEnd"]
