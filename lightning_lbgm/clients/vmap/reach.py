"""Python state that a training step can reach: found, remembered and put back.

A step keeps state in attributes of its module, in objects and containers below them, in class attributes, closures,
default arguments and global variables of its functions, and in generators of random numbers. All of these are walked;
code and objects of the libraries that are below a module (torch, Lightning, NumPy, the standard library) are not.
"""

from __future__ import annotations

import array
import io
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lbgm.clients.vmap.remembered import (
    ATOMS,
    MISSING,
    Remembered,
    cell_content,
    generator_state,
    is_descriptor,
    items_of,
    restore,
)

__all__ = ["ReachedState"]

_LIBRARIES = frozenset(
    {
        "torch",
        "torchvision",
        "torchmetrics",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_utilities",
    }
    | {"lightning_lbgm", "numpy", "mlflow", "matplotlib", "jsonargparse", "builtins"}
    | set(sys.stdlib_module_names) - {"__main__"}
)
_IMMUTABLE = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, types.ModuleType)
_TREE = ("_parameters", "_buffers", "_modules")  # `ModuleState` and `torch.func.functional_call` look after these
_TRAINER = ("_trainer", "_fabric", "_fabric_optimizers", "trainer")
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_MAX_OBJECTS = 100_000
_MAX_COPIED_BYTES = 2**26


@dataclass
class ReachedState:
    """What a module's step can reach, as it was when this was made.

    Args:
        module: The module; its parameters and buffers are not part of it.

    Attributes:
        obstacle: Why the state cannot be put back, or None: an iterator, whose place is not known.
    """

    module: nn.Module
    obstacle: str | None = None

    def __post_init__(self) -> None:
        self._entries: list[Remembered] = []
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
        self._copied = 0
        self._tree = {id(part) for part in self.module.modules()}
        self._known = {id(t) for t in [*self.module.parameters(), *self.module.buffers()]}
        # Functions elsewhere are taken to keep no state: a model library's code is too large to be walked each time.
        self._sources = {type(part).__module__ for part in self.module.modules()}
        self._sources = {name for name in self._sources if not _is_library(name)} | {"__main__"}
        queue: deque[tuple[str, Any]] = deque()
        for name, part in self.module.named_modules():
            queue.append((name, part))
        while queue and len(self._seen) < _MAX_OBJECTS:
            path, value = queue.popleft()
            if isinstance(value, (*ATOMS, *_IMMUTABLE)) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            queue.extend(self._visit(path, value))
        if queue:
            self.obstacle = f"{queue[0][0]!r} and more than {_MAX_OBJECTS} other objects can be reached from the module"

    def restore(self) -> str | None:
        """Put back what has changed since, to the bit; return where the first change was, or None.

        Raises:
            CannotRestore: If a tensor was changed that was too large to be copied.
        """
        first: str | None = None
        for entry in self._entries:
            changed = restore(entry)
            if changed is not None and first is None:
                first = changed
        return first

    def _visit(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        """Remember one object and return what can be reached from it."""
        if isinstance(value, Tensor):
            return self._tensor(path, value)
        if isinstance(value, (np.ndarray, bytearray, array.array)):
            return self._array(path, value)
        if isinstance(value, (list, deque)):
            self._add(path, value, list(value))
            return _items(path, enumerate(value))
        if isinstance(value, (tuple, frozenset)):
            return _items(path, enumerate(value))
        if isinstance(value, dict):
            held = dict(items_of(value))
            self._add(path, value, held)
            return itertools.chain(_items(path, held.items()), self._attributes(path, value))
        if isinstance(value, set):
            self._add(path, value, set(value))
            return []
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            self._add(path, value, generator_state(value))
            return []
        if isinstance(value, types.FunctionType):
            return self._function(path, value)
        if isinstance(value, types.MethodType):
            return [(path, value.__self__), (path, value.__func__)]
        if isinstance(value, partial):
            return [(path, value.func), (f"{path}.args", value.args), (f"{path}.keywords", value.keywords)]
        if isinstance(value, type):
            return self._class(path, value)
        if isinstance(value, types.CellType):
            content = cell_content(value)
            self._add(path, value, content)
            return [(path, content)]
        if hasattr(value, "__next__") and not isinstance(value, io.IOBase):
            self.obstacle = self.obstacle or f"{path!r} is an iterator, whose place cannot be compared"
        return self._object(path, value)

    def _add(self, path: str, owner: Any, saved: Any, mark: Any = None) -> None:
        self._entries.append(Remembered(path, owner, saved, mark))

    def _tensor(self, path: str, value: Tensor) -> Iterable[tuple[str, Any]]:
        if id(value) in self._known or torch._C._functorch.is_batchedtensor(value):
            return []
        mark = (value._version, value.data_ptr() if value.layout is torch.strided else 0, value.shape)
        if value.is_inference():
            return []
        copied = value.detach().clone() if self._fits(value.nbytes if value.layout is torch.strided else 0) else None
        self._add(path, value, copied, mark)
        return []

    def _array(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        size = value.nbytes if isinstance(value, np.ndarray) else len(value)
        self._add(path, value, value.copy() if isinstance(value, np.ndarray) else value[:], None)
        self._copied += size
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return [(f"{path}[{index}]", item) for index, item in enumerate(value.ravel())]
        return []

    def _fits(self, num_bytes: int) -> bool:
        if self._copied + num_bytes > _MAX_COPIED_BYTES:
            return False
        self._copied += num_bytes
        return True

    def _function(self, path: str, function: types.FunctionType) -> Iterable[tuple[str, Any]]:
        if function.__module__ not in self._sources:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            yield f"{path}: {name}", cell
        yield f"{path}: defaults", function.__defaults__
        yield f"{path}: defaults", function.__kwdefaults__
        yield f"{path}.__dict__", vars(function)
        yield f"{path}: __wrapped__", getattr(function, "__wrapped__", None)
        variables = function.__globals__
        for name in sorted(set(_names(function.__code__)) & variables.keys()):
            value = variables[name]
            if isinstance(value, types.ModuleType):
                continue
            self._add(f"the global variable {name}", variables, (name, value), "global")
            yield f"the global variable {name}", value

    def _class(self, path: str, cls: type) -> Iterable[tuple[str, Any]]:
        for base in cls.__mro__:
            if _is_library(base.__module__):
                continue
            state = {name: value for name, value in vars(base).items() if not is_descriptor(value)}
            self._add(f"{base.__qualname__}", base, state, "class")
            for name, value in vars(base).items() if base.__module__ in self._sources else ():
                inner = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                inner = inner.fget if isinstance(inner, property) else inner
                yield f"{base.__qualname__}.{name}", inner

    def _object(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        """Walk an object's attributes and its class; the objects of libraries are left alone, but for modules."""
        source = type(value).__module__
        plain = isinstance(value, (nn.Module, types.SimpleNamespace)) or not _is_library(source)
        if plain or source.partition(".")[0] in ("torch", "torchmetrics", "torchvision", "collections"):
            yield from self._attributes(path, value)
        yield path, type(value)

    def _attributes(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        skipped = (*_TREE, *_TRAINER) if id(value) in self._tree else _TRAINER
        prefix = f"{path}." if path else ""
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            if isinstance(value, nn.Module):
                # Hooks that are registered later are seen by `structure_of`.
                skipped += tuple(name for name, item in attributes.items() if name.endswith(_HOOKS) and not item)
            state = {name: item for name, item in attributes.items() if name not in skipped}
            self._add(path, attributes, state, ("attributes", skipped))
            for name, item in state.items():
                yield prefix + name, item
        slots = [slot for cls in type(value).__mro__ for slot in _slots(cls)]
        if slots:
            saved = {name: getattr(value, name, MISSING) for name in slots}
            self._add(path, value, saved, "slots")
            for name, item in saved.items():
                yield prefix + name, item


def _items(path: str, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield what may change among a container's items, with its path."""
    return ((f"{path}[{key!r}]", item) for key, item in items if not isinstance(item, ATOMS))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


def _is_library(module_name: str | None) -> bool:
    return (module_name or "builtins").partition(".")[0] in _LIBRARIES
