"""Binary reader and writer of a message's body, and the error for malformed bytes.

Numbers are little-endian. A reader never goes past the bytes that it was given, and what it allocates is bounded by
their number, whatever they claim.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "MAX_SIZE",
    "MessageError",
    "Reader",
    "Writer",
    "dtype_code",
    "dtype_name",
    "dtype_named",
    "varint_size",
]

DTYPES = {0: torch.float32, 1: torch.float64, 2: torch.bfloat16, 3: torch.float16}
"""The dtypes of values, by their code in a message."""

MAX_SIZE = 2**40
"""Entries that an update has at the most: sums of a few such numbers fit into 64 bits."""


class MessageError(ValueError):
    """Bytes that are no message: truncated, oversized, corrupt, or of another federation."""


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of a dtype.

    Raises:
        TypeError: If values of it cannot be sent.
    """
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise TypeError(f"Values of {dtype} cannot be sent: convert them to one of {list(DTYPES.values())}.")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``"float32"``, for states that load safely; ``dtype_named`` undoes it."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def varint_size(value: int) -> int:
    """Return the bytes of a number as ``Writer.varint`` writes it: seven bits a byte."""
    return max(1, -(-value.bit_length() // 7))


class Writer:
    """Collects the bytes of a body."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def byte(self, value: int) -> None:
        """Write a number below 256."""
        self._parts.append(bytes([value]))

    def varint(self, value: int) -> None:
        """Write a number of any size, seven bits a byte, lowest first (LEB128)."""
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        self._parts.append(bytes(out))

    def u64(self, value: int) -> None:
        """Write eight bytes."""
        self._parts.append(struct.pack("<Q", value))

    def tensor(self, tensor: Tensor) -> None:
        """Write the values as they lie in memory."""
        flat = tensor.detach().cpu().reshape(-1)
        if flat.stride(0) != 1:  # also of one entry, which torch calls contiguous whatever its stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        self._parts.append(flat.view(torch.uint8).numpy().tobytes())

    def raw(self, data: bytes) -> None:
        """Write bytes."""
        self._parts.append(data)

    def getvalue(self) -> bytes:
        """Return all that was written."""
        return b"".join(self._parts)


class Reader:
    """Takes the bytes of a body one field after the other.

    Args:
        data: The bytes.
        dtype: Of the decoded update.
        depth: How deep payloads may still lie in each other.
    """

    def __init__(self, data: memoryview, dtype: torch.dtype, depth: int = 5) -> None:
        self._data = data
        self._position = 0
        self.dtype = dtype
        self.depth = depth

    @property
    def remaining(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._position

    def take(self, count: int) -> memoryview:
        """Take the next bytes."""
        if count > self.remaining:
            raise MessageError(f"The message is truncated: {count} bytes are announced, {self.remaining} are left.")
        self._position += count
        return self._data[self._position - count : self._position]

    def byte(self) -> int:
        """Take a number below 256."""
        return self.take(1)[0]

    def varint(self, limit: int = MAX_SIZE) -> int:
        """Take a number of up to ``limit``."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if value > limit or shift > 63:
                raise MessageError(f"The message holds a number above {limit}.")
            if byte < 0x80:
                return value

    def u64(self) -> int:
        """Take eight bytes."""
        return int(struct.unpack("<Q", self.take(8))[0])

    def tensor(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Take ``count`` values, of the update's dtype if none is given; the tensor owns its memory."""
        dtype = dtype or self.dtype
        data = self.take(count * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def rest(self, dtype: torch.dtype) -> Tensor:
        """Take all that is left, whole values of ``dtype``."""
        count, odd = divmod(self.remaining, dtype.itemsize)
        if odd:
            raise MessageError(f"{self.remaining} bytes are no whole number of values of {dtype}.")
        return self.tensor(count, dtype)

    def sub(self, count: int | None = None) -> Reader:
        """Take the next bytes, or all that are left, as a reader of their own, one level deeper."""
        if self.depth <= 0:
            raise MessageError("The message holds payloads too deep in each other.")
        return Reader(self.take(self.remaining if count is None else count), self.dtype, self.depth - 1)

    def finish(self) -> None:
        """Check that nothing is left."""
        if self.remaining:
            raise MessageError(f"The message is oversized: {self.remaining} bytes are left over.")
