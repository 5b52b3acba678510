"""Message from a client to the server, the one thing that crosses, and its binary form."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.core.nested import map_leaves
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.codec import DTYPES, MAX_SIZE, MessageError, Reader, Writer, dtype_code, varint_size

__all__ = ["HEADER_BYTES", "Message", "MessageError", "check_buffers", "count_bits", "open_message"]

_FORMAT_VERSION = 1
_HAS_BUFFERS = 0x80  # in the byte of the dtype
# Format version, kind of payload, dtype; client, round, sequence, base version, state version; entries; then CRC-32 of
# all the rest.
_FIELDS = struct.Struct("<BBBxIIIIIQ")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
"""Bytes of ``Message.to_bytes`` that ``num_bits`` does not count: 36, whatever is sent."""
_MAX_U32 = 2**32 - 1


@dataclass(frozen=True)
class Message:
    """What a client sends in one round.

    Attributes:
        client_id: The sender, below 2^32.
        payload: The encoded update.
        buffers: The float buffers (BatchNorm's running statistics) that the client's training changed, by name.
        round_index: The round, from 0.
        sequence: Number of the client's message, from 1; 0 if messages cannot be lost.
        base_version: Version of the server's state of the client that the payload refers to, such as a look-back
            gradient; 0 if it refers to nothing.
        state_version: Version of that state once this message has been taken in; 0 if the payload neither needs nor
            updates it.

    Examples:
        >>> import torch
        >>> from lightning_lbgm.payloads import Dense
        >>> message = Message(7, Dense(torch.tensor([1.0, 2.0])), round_index=3)
        >>> data = message.to_bytes()
        >>> len(data) == HEADER_BYTES + message.num_bits // 8
        True
        >>> Message.from_bytes(data).payload.dense().tolist()
        [1.0, 2.0]
    """

    client_id: int
    payload: Payload
    buffers: dict[str, Tensor] = field(default_factory=dict)
    round_index: int = 0
    sequence: int = 0
    base_version: int = 0
    state_version: int = 0

    @property
    def num_bits(self) -> int:
        """Bits sent: all but the header, which has ``HEADER_BYTES`` bytes whatever is sent."""
        return count_bits(self.payload.num_bits, self.buffers)

    def to(self, device: torch.device) -> Message:
        """Return the message with its tensors on a device; ``from_bytes`` puts them on the CPU."""
        if device.type == "cpu":
            return self

        def moved(leaf: object) -> object:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        payload = Payload.from_state(map_leaves(self.payload.to_state(), moved), self.payload.layout)
        return replace(self, payload=payload, buffers=map_leaves(self.buffers, moved))

    def to_bytes(self) -> bytes:
        """Return the binary form, which docs/uplink.md describes.

        Raises:
            TypeError: If the payload has no binary form, or a dtype cannot be sent.
            ValueError: If a number does not fit into its field.
        """
        numbers = (self.client_id, self.round_index, self.sequence, self.base_version, self.state_version)
        if not all(0 <= number <= _MAX_U32 for number in numbers) or self.payload.size > MAX_SIZE:
            raise ValueError(
                "`Message` numbers (client_id, round_index, sequence, base_version, state_version) must be in"
                f" [0, {_MAX_U32}] and its update of at most {MAX_SIZE} entries; got {numbers} and {self.payload.size}."
            )
        out = Writer()
        body = self.payload.to_bytes()
        if self.buffers:
            out.varint(len(body))
        out.raw(body)
        for name, tensor in self.buffers.items():
            encoded = name.encode()
            out.varint(len(encoded))
            out.raw(encoded)
            out.byte(dtype_code(tensor.dtype))
            out.byte(tensor.ndim)
            for extent in tensor.shape:
                out.varint(extent)
            out.tensor(tensor)
        dtype = dtype_code(self.payload.dtype) | (_HAS_BUFFERS if self.buffers else 0)
        fields = _FIELDS.pack(_FORMAT_VERSION, self.payload.wire_code(), dtype, *numbers, self.payload.size)
        content = out.getvalue()
        return fields + _CHECKSUM.pack(zlib.crc32(content, zlib.crc32(fields))) + content

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview, layout: Layout | None = None) -> Message:
        """Read the binary form. What it allocates is bounded by the bytes given, not by what they claim.

        Args:
            data: The bytes of one message.
            layout: The parameter tensors that the receiver expects. None: any size is taken, as one vector.

        Raises:
            MessageError: If the bytes are truncated, oversized, corrupt, of another format version or, if a layout
                is given, of an update of another size.
        """
        view = memoryview(data).cast("B")
        if len(view) < HEADER_BYTES:
            raise MessageError(f"The message is truncated: {len(view)} bytes are less than a header of {HEADER_BYTES}.")
        head, checksum, content = view[: _FIELDS.size], view[_FIELDS.size : HEADER_BYTES], view[HEADER_BYTES:]
        version, code, dtype, client_id, round_index, sequence, base, state, size = _FIELDS.unpack(head)
        if version != _FORMAT_VERSION:
            raise MessageError(f"The message has format version {version}; this is version {_FORMAT_VERSION}.")
        if _CHECKSUM.unpack(checksum)[0] != zlib.crc32(content, zlib.crc32(head)):
            raise MessageError("The message is corrupt or truncated: its checksum does not match.")
        if (dtype & ~_HAS_BUFFERS) not in DTYPES or size > MAX_SIZE:
            raise MessageError(f"The message has the unknown dtype {dtype}, or {size} entries.")
        if layout is not None and size != layout.size:
            raise MessageError(f"The message holds an update of {size} entries, not {layout.size}.")
        reader = Reader(content, DTYPES[dtype & ~_HAS_BUFFERS])
        body = reader.sub(reader.varint()) if dtype & _HAS_BUFFERS else reader.sub()
        payload = Payload.read_from(body, code, size)
        if layout is not None:
            payload.relabel(layout)
        buffers = _read_buffers(reader) if dtype & _HAS_BUFFERS else {}
        return Message(client_id, payload, buffers, round_index, sequence, base, state)


def open_message(data: bytes | bytearray | memoryview | Message, layout: Layout) -> Message:
    """Return a message of an update with these parameter tensors, from its bytes or as it is.

    Raises:
        MessageError: If the bytes are no message, or its update is of another size.
    """
    message = data if isinstance(data, Message) else Message.from_bytes(data, layout)
    if message.payload.size != layout.size:
        raise MessageError(f"The message holds an update of {message.payload.size} entries, not {layout.size}.")
    return message


def count_bits(bits: int, buffers: Mapping[str, Tensor]) -> int:
    """Return ``Message.num_bits`` of a payload of ``bits`` and the buffers sent with it, without making the message."""
    if buffers:
        bits += 8 * varint_size(bits // 8)
        bits += sum(8 * (_framing_bytes(name, tensor) + tensor.nbytes) for name, tensor in buffers.items())
    return bits


def check_buffers(buffers: Mapping[str, Tensor], known: Mapping[str, Tensor], owner: str) -> None:
    """Refuse a message's buffers that the module does not have in that shape and dtype.

    Args:
        buffers: The message's.
        known: The module's; their values do not count.
        owner: The class that was told of them, for errors.

    Raises:
        MessageError: If one is not known, or different.
    """
    for name, buffer in buffers.items():
        if name not in known:
            raise MessageError(
                f"The message has the buffer {name!r}; known are {sorted(known)}. Pass the module's float buffers as"
                f" `{owner}(buffers=...)`."
            )
        found, wanted = ((tuple(one.shape), one.dtype) for one in (buffer, known[name]))
        if found != wanted:
            raise MessageError(f"The message has the buffer {name!r} of shape and dtype {found}, not {wanted}.")


def _framing_bytes(name: str, tensor: Tensor) -> int:
    """Return the bytes in front of a buffer's values: its name, its dtype and its shape."""
    length = len(name.encode())
    return varint_size(length) + length + 2 + sum(map(varint_size, tensor.shape))


def _read_buffers(reader: Reader) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    while reader.remaining:
        try:
            name = bytes(reader.take(reader.varint())).decode()
        except UnicodeDecodeError as error:
            raise MessageError("The message has a buffer whose name is no text.") from error
        dtype = DTYPES.get(reader.byte())
        if dtype is None or name in buffers:
            raise MessageError(f"The message has the buffer {name!r} twice, or in an unknown dtype.")
        shape = [reader.varint() for _ in range(reader.byte())]
        if math.prod(max(1, extent) for extent in shape) > MAX_SIZE:
            raise MessageError(f"The message has the buffer {name!r} of shape {shape}.")
        buffers[name] = reader.tensor(math.prod(shape), dtype).view(shape)
    if not buffers:
        raise MessageError("The message announces buffers and has none.")
    return buffers
