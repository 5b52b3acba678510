"""Snapshot and restore of Python objects: lists, attributes and generators, to the bit; tensors are left out."""

from __future__ import annotations

import array
import operator
import random
import types
from collections import OrderedDict
from collections.abc import ItemsView
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "ATOMS",
    "MISSING",
    "CannotRestore",
    "Remembered",
    "cell_content",
    "generator_state",
    "is_descriptor",
    "items_of",
    "restore",
]


class CannotRestore(RuntimeError):
    """Something was changed that had not been copied."""


ATOMS = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice)
"""Types whose values cannot change."""

MISSING = object()
"""Stands for what is not there."""


@dataclass
class Remembered:
    """One object on the way, and what it held.

    Attributes:
        path: How it is reached, for messages.
        owner: The object.
        saved: A copy of its content, by kind; None if it is too large to be copied.
        mark: What tells a change in place of a tensor that is not copied.
    """

    path: str
    owner: Any
    saved: Any
    mark: Any = None


def restore(entry: Remembered) -> str | None:
    """Put one object back; return the path of what had changed."""
    path, owner, saved = entry.path, entry.owner, entry.saved
    if isinstance(owner, Tensor):
        return path if _restore_tensor(entry) else None
    if isinstance(owner, np.ndarray):
        if owner.dtype.hasobject or owner.tobytes() == saved.tobytes():
            return None
        owner[...] = saved
        return path
    if isinstance(owner, (bytearray, array.array)):
        if owner == saved:
            return None
        owner[:] = saved
        return path
    if isinstance(owner, types.CellType):
        if _same(cell_content(owner), saved):
            return None
        owner.cell_contents = saved
        return path
    if isinstance(owner, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        return path if _restore_generator(owner, saved) else None
    if entry.mark == "global":
        name, value = saved
        if _same(owner.get(name, MISSING), value):
            return None
        owner[name] = value
        return path
    if entry.mark == "class":
        return _restore_class(owner, saved)
    if entry.mark == "slots":
        return _restore_slots(path, owner, saved)
    if isinstance(entry.mark, tuple):
        return _restore_attributes(path, owner, saved, entry.mark[1])
    return path if _restore_container(owner, saved) else None


def _restore_tensor(entry: Remembered) -> bool:
    tensor, (version, pointer, shape) = entry.owner, entry.mark
    strided = tensor.layout is torch.strided
    touched = tensor._version != version or tensor.shape != shape or (strided and tensor.data_ptr() != pointer)
    if entry.saved is None:
        if touched:
            raise CannotRestore(
                f"The training step changes {entry.path!r}, a tensor of {tensor.nbytes} bytes, in place. Use"
                " `LBGMFederated(execution='sequential')`."
            )
        return False
    saved = entry.saved
    same = tensor.shape == shape and (not strided or torch.equal(_bits(tensor), _bits(saved)))
    if same and not touched:
        return False
    if not same:
        with torch.no_grad():
            if tensor.shape == shape and tensor.data_ptr() == pointer and not tensor.is_leaf:
                tensor.detach().copy_(saved)
            else:
                tensor.data = saved
    return True


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() and not flat.is_quantized else flat


def _restore_attributes(path: str, now: dict[str, Any], saved: dict[str, Any], skipped: tuple[str, ...]) -> str | None:
    changed = [name for name in now if name not in skipped and not _same(now[name], saved.get(name, MISSING))]
    changed += [name for name in saved if name not in now]
    for name in changed:
        if name in saved:
            now[name] = saved[name]
        else:
            del now[name]
    return (f"{path}.{changed[0]}" if path else changed[0]) if changed else None


def _restore_slots(path: str, owner: Any, saved: dict[str, Any]) -> str | None:
    changed = [name for name, value in saved.items() if not _same(getattr(owner, name, MISSING), value)]
    for name in changed:
        if saved[name] is MISSING:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, saved[name])
    return (f"{path}.{changed[0]}" if path else changed[0]) if changed else None


def _restore_class(cls: type, saved: dict[str, Any]) -> str | None:
    now = {name: value for name, value in vars(cls).items() if not is_descriptor(value)}
    changed = [name for name in now if not _same(now[name], saved.get(name, MISSING))]
    changed += [name for name in saved if name not in now]
    for name in changed:
        if name in saved:
            setattr(cls, name, saved[name])
        else:
            delattr(cls, name)
    return f"{cls.__qualname__}.{changed[0]}" if changed else None


def _restore_container(container: Any, saved: Any) -> bool:
    if len(container) == len(saved):
        if isinstance(container, dict):
            # Most often nothing has changed, and this is fast for a large one.
            now = dict(items_of(container))
            same = all(map(operator.is_, now, saved)) and all(map(operator.is_, now.values(), saved.values()))
            same = same or all(key in saved and _same(value, saved[key]) for key, value in now.items())
        elif isinstance(container, set):
            same = container == saved
        else:
            same = all(map(operator.is_, container, saved))
            same = same or all(_same(item, old) for item, old in zip(container, saved))
        if same:
            return False
    container.clear()
    container.update(saved) if isinstance(container, (dict, set)) else container.extend(saved)
    return True


def items_of(container: dict[Any, Any]) -> ItemsView[Any, Any]:
    """Return what a dict holds, past methods of a subclass that make something new of it at each access."""
    return (OrderedDict if isinstance(container, OrderedDict) else dict).items(container)


def _same(one: Any, two: Any) -> bool:
    """Whether two values are the same object, or equal numbers or strings."""
    if one is two:
        return True
    return type(one) is type(two) and isinstance(one, ATOMS) and (one == two or (one != one and two != two))


def generator_state(generator: Any) -> Any:
    """Return a copy of the state of a generator of torch, NumPy or Python."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _restore_generator(generator: Any, saved: Any) -> bool:
    now = generator_state(generator)
    if isinstance(generator, torch.Generator):
        if torch.equal(now, saved):
            return False
        generator.set_state(saved)
        return True
    if repr(now) == repr(saved) and _deep_equal(now, saved):
        return False
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = saved
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(saved)
    else:
        generator.setstate(saved)
    return True


def _deep_equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_deep_equal(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(_deep_equal, one, two))
    return bool(np.array_equal(one, two))


def cell_content(cell: types.CellType) -> Any:
    """Return a closure's variable; None if it is not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def is_descriptor(value: Any) -> bool:
    """Whether a class's attribute is code, such as a method or a property, and no state."""
    return callable(value) or hasattr(value, "__get__") or isinstance(value, (classmethod, staticmethod, property))
