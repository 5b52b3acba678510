"""Binary form of a stage's state: nested built-ins and tensors, for a receiver that has none yet."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.payloads.codec import MAX_SIZE, MessageError, Reader, Writer, varint_size

__all__ = ["has_tensors", "read_state", "state_bytes", "write_state"]

_NONE, _FALSE, _TRUE, _INT, _NEGATIVE, _FLOAT, _TEXT, _LIST, _DICT, _TENSOR = range(10)
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_DOUBLE = struct.Struct("<d")
_DEEPEST = 24
_LARGEST = 2**63 - 1


def write_state(out: Writer, state: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None: for each its kind (a byte) and itself.

    Raises:
        TypeError: If something else is in them.
    """
    if state is None or isinstance(state, bool):
        out.byte(_NONE if state is None else _TRUE if state else _FALSE)
    elif isinstance(state, int):
        if abs(state) > _LARGEST:
            raise TypeError(f"A stage's state has numbers of 64 bits at the most; got {state}.")
        out.byte(_INT if state >= 0 else _NEGATIVE)
        out.varint(abs(state))
    elif isinstance(state, float):
        out.byte(_FLOAT)
        out.raw(_DOUBLE.pack(state))
    elif isinstance(state, str):
        encoded = state.encode()
        out.byte(_TEXT)
        out.varint(len(encoded))
        out.raw(encoded)
    elif isinstance(state, (list, tuple)):
        out.byte(_LIST)
        out.varint(len(state))
        for item in state:
            write_state(out, item)
    elif isinstance(state, dict):
        out.byte(_DICT)
        out.varint(len(state))
        for key, item in state.items():
            write_state(out, key)
            write_state(out, item)
    elif isinstance(state, Tensor) and state.dtype in _DTYPES:
        out.byte(_TENSOR)
        out.byte(_DTYPES.index(state.dtype))
        out.byte(state.ndim)
        for extent in state.shape:
            out.varint(extent)
        out.tensor(state)
    else:
        raise TypeError(f"A stage's state is made of built-ins and tensors; got {state!r}, a {type(state).__name__}.")


def state_bytes(state: Any) -> int:
    """Return the number of bytes that ``write_state`` writes, without writing them."""
    if state is None or isinstance(state, bool):
        return 1
    if isinstance(state, int):
        return 1 + varint_size(abs(state))
    if isinstance(state, float):
        return 1 + _DOUBLE.size
    if isinstance(state, str):
        length = len(state.encode())
        return 1 + varint_size(length) + length
    if isinstance(state, (list, tuple)):
        return 1 + varint_size(len(state)) + sum(map(state_bytes, state))
    if isinstance(state, dict):
        return 1 + varint_size(len(state)) + sum(state_bytes(key) + state_bytes(item) for key, item in state.items())
    if isinstance(state, Tensor):
        return 3 + sum(map(varint_size, state.shape)) + state.nbytes
    raise TypeError(f"A stage's state is made of built-ins and tensors; got {state!r}, a {type(state).__name__}.")


def read_state(data: Reader, depth: int = _DEEPEST) -> Any:
    """Undo ``write_state``: tuples are lists, and tensors are on the CPU.

    Raises:
        MessageError: If the bytes are no state.
    """
    if depth == 0:
        raise MessageError("The message holds a state that is too deep.")
    kind = data.byte()
    if kind in (_NONE, _FALSE, _TRUE):
        return (None, False, True)[kind]
    if kind in (_INT, _NEGATIVE):
        value = data.varint(limit=_LARGEST)
        return value if kind == _INT else -value
    if kind == _FLOAT:
        return float(_DOUBLE.unpack(data.take(_DOUBLE.size))[0])
    if kind == _TEXT:
        try:
            return bytes(data.take(data.varint())).decode()
        except UnicodeDecodeError as error:
            raise MessageError("The message holds a state with a name that is no text.") from error
    if kind == _LIST:
        return [read_state(data, depth - 1) for _ in range(_count(data))]
    if kind == _DICT:
        return dict(_item(data, depth - 1) for _ in range(_count(data)))
    if kind == _TENSOR:
        return _tensor(data)
    raise MessageError(f"The message holds a state with something of unknown kind {kind}.")


def has_tensors(state: Any) -> bool:
    """Whether there is a tensor in nested built-ins."""
    if isinstance(state, dict):
        return any(map(has_tensors, state.values()))
    if isinstance(state, (list, tuple)):
        return any(map(has_tensors, state))
    return isinstance(state, Tensor)


def _count(data: Reader) -> int:
    """Take the number of things to come, each of at least a byte."""
    return data.varint(limit=data.remaining)


def _item(data: Reader, depth: int) -> tuple[Any, Any]:
    key = read_state(data, depth)
    if not isinstance(key, (str, int)):
        raise MessageError(f"The message holds a state with the name {key!r}.")
    return key, read_state(data, depth)


def _tensor(data: Reader) -> Tensor:
    kind = data.byte()
    if kind >= len(_DTYPES):
        raise MessageError(f"The message holds a state with a tensor of unknown dtype {kind}.")
    shape = [data.varint() for _ in range(data.byte())]
    if math.prod(max(1, extent) for extent in shape) > MAX_SIZE:
        raise MessageError(f"The message holds a state with a tensor of shape {shape}.")
    return data.tensor(math.prod(shape), _DTYPES[kind]).view(shape)
