"""Identity of settings as plain values: whether a checkpoint's clients are this federation's.

A setting's representation is for reading: it shows arrays by their length, and functions by their names. Here they are
described by value, in built-ins that load under ``weights_only=True``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import types
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.data.columns import is_column, read_column

__all__ = ["identify", "identify_optimizer", "is_same", "show"]

_CLASS, _ARRAY, _FUNCTION = "class", "array", "function"
_CODE = ("code", "bytecode")
_MOST_VALUES = 2**24  # of an array that are hashed; of a larger one as many, evenly spaced
_SHORT = 8  # sequences up to this length are shown in full
_DEEPEST = 8
_DEPTH_OF_CLOSURE = 6  # what a function has captured may lead anywhere
_NO_RESULT_CHANGES = ("store",)  # where states lie may change
# The learning rate is compared apart; the others are how a step is computed, and what a schedule notes for itself.
_NO_SETTINGS = ("params", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")
_BYTECODE = importlib.util.MAGIC_NUMBER.hex()


def identify(value: Any, depth: int = 0) -> Any:
    """Describe a setting by value, in dicts with string keys, lists, strings, numbers and None.

    Arrays, tensors and other sequences of numbers or strings are hashed, whatever their container. Objects are
    described by the name of their class and their settings (constructor arguments and public attributes), functions by
    name, captured values and code. An object that shows nothing of itself is described by its class.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, (torch.dtype, torch.device, complex, bytes, Enum)):
        return str(value)
    if depth > _DEEPEST or isinstance(value, (nn.Module, Dataset, Generator)):
        return {_CLASS: type(value).__qualname__}
    if isinstance(value, (Tensor, np.ndarray)):
        return _identify_array(value)
    if isinstance(value, Chain):
        return [identify(stage, depth + 1) for stage in value.stages]
    if isinstance(value, Mapping):
        return {str(key): identify(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((identify(item, depth + 1) for item in value), key=str)
    if is_column(value):
        value = read_column(value)
    if isinstance(value, Sequence) or hasattr(value, "__array__"):
        return _identify_sequence(value, depth)
    if isinstance(value, type):
        return {_CLASS: value.__qualname__}
    if isinstance(value, (functools.partial, types.MethodType, types.FunctionType, types.BuiltinFunctionType)):
        return _identify_function(value, depth)
    return {_CLASS: type(value).__qualname__, **_identify_settings(value, depth)}


def identify_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Describe an optimizer by its class and its hyperparameters, but for the learning rate."""
    groups = [
        {name: identify(value) for name, value in group.items() if name not in _NO_SETTINGS}
        for group in optimizer.param_groups
    ]
    others = {"groups": groups[1:]} if len(groups) > 1 else {}
    return {_CLASS: type(optimizer).__name__, **groups[0], **others}


def is_same(one: Any, other: Any) -> bool:
    """Whether two descriptions say the same, as far as both can: code is compared within one version of Python."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.get("bytecode") != other.get("bytecode"):
            one = {name: value for name, value in one.items() if name not in _CODE}
            other = {name: value for name, value in other.items() if name not in _CODE}
        return one.keys() == other.keys() and all(is_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def show(identity: Any) -> str:
    """Write a description in the way of the setting's constructor call, arrays with their length and hash."""
    if isinstance(identity, list):
        return f"[{', '.join(map(show, identity))}]"
    if not isinstance(identity, dict):
        return repr(identity)
    if _ARRAY in identity:
        return f"<{identity['length']} values, hash {str(identity[_ARRAY])[:8]}>"
    name = identity.get(_CLASS, identity.get(_FUNCTION, ""))
    hidden = (_CLASS, _FUNCTION, *_CODE)
    return f"{name}({', '.join(f'{k}={show(v)}' for k, v in identity.items() if k not in hidden)})"


def _identify_array(value: Any) -> Any:
    array = value.detach().cpu() if isinstance(value, Tensor) else value
    if isinstance(array, Tensor):
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
    if array.ndim == 0:
        return identify(array.item())
    if array.ndim == 1 and array.size <= _SHORT:
        return list(map(identify, array.tolist()))
    shape = array.shape[:1] if array.ndim == 2 and array.shape[1] == 1 else array.shape  # a column is a list
    values = array.reshape(-1)
    values = values[:: -(-values.size // _MOST_VALUES) or 1]
    # One type for each kind of value, so that a list, an array and a tensor of the same values agree.
    kinds = {"b": np.int64, "i": np.int64, "u": np.int64, "f": np.float64}
    if values.dtype.kind in kinds:
        content = np.ascontiguousarray(values.astype(kinds[values.dtype.kind])).tobytes()
    else:
        content = "\0".join(map(str, values.tolist())).encode()
    digest = hashlib.blake2b(repr(tuple(shape)).encode() + content, digest_size=16).hexdigest()
    return {_ARRAY: digest, "length": int(shape[0])}


def _identify_sequence(value: Any, depth: int) -> Any:
    items = list(value) if isinstance(value, Sequence) else value
    if not isinstance(items, list) or len(items) > _SHORT:
        try:
            array = np.asarray(items)
        except (ValueError, TypeError):  # ragged
            array = np.empty(0, dtype=object)
        if array.dtype.kind != "O":
            return _identify_array(array)
        if not isinstance(items, list):
            items = list(items)
        if all(item is None or isinstance(item, (str, int, float)) for item in items):
            return _identify_array(np.array(list(map(repr, items))))
        if len(items) > 1000:
            return {_CLASS: type(value).__qualname__, "length": len(items)}
    return [identify(item, depth + 1) for item in items]


def _identify_settings(value: Any, depth: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        name: getattr(value, name)
        for cls in type(value).__mro__
        for name in getattr(cls, "__slots__", ())
        if isinstance(name, str) and hasattr(value, name)
    }
    attributes = {**attributes, **getattr(value, "__dict__", {})}
    try:
        arguments = list(inspect.signature(type(value)).parameters)
    except (TypeError, ValueError):
        arguments = []
    kept_apart = [f"_{name}" for name in arguments if name not in attributes]
    # Where an argument is kept under some other name, it may be any attribute.
    all_count = any(name not in attributes for name in kept_apart)
    return {
        name: identify(attribute, depth + 1)
        for name, attribute in attributes.items()
        if (all_count or not name.startswith("_") or name in kept_apart) and name not in _NO_RESULT_CHANGES
    }


def _identify_function(value: Any, depth: int) -> dict[str, Any]:
    if isinstance(value, functools.partial):
        inner = identify(value.func, depth + 1)
        arguments = {"args": identify(list(value.args), depth + 1), **identify(value.keywords, depth + 1)}
        return {_FUNCTION: show(inner), "of": inner, **arguments}
    if isinstance(value, types.MethodType):
        return {
            _FUNCTION: value.__func__.__qualname__,
            "self": identify(value.__self__, max(depth + 1, _DEPTH_OF_CLOSURE)),
        }
    described: dict[str, Any] = {_FUNCTION: value.__qualname__}
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        bound = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *cells]
        if bound:
            described["bound"] = [identify(item, max(depth + 1, _DEPTH_OF_CLOSURE)) for item in bound]
        described["code"], described["bytecode"] = _hash_code(value.__code__), _BYTECODE
    return described


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _hash_code(code: types.CodeType) -> str:
    """Hash what a function does, without where it stands."""
    constants = [
        _hash_code(c) if isinstance(c, types.CodeType) else repr(sorted(map(repr, c)) if isinstance(c, Set) else c)
        for c in code.co_consts
    ]
    text = repr((code.co_code, code.co_names, constants))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
