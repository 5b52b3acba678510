"""Description of settings as text that is the same in every run: no memory addresses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch.optim import Optimizer

__all__ = ["describe", "describe_call", "describe_callable", "describe_optimizer"]


def describe(value: Any) -> str:
    """Return the representation of a setting; of a function, its name."""
    anonymous: Any = object.__repr__
    plain = type(value).__repr__ is anonymous or hasattr(value, "__qualname__") or hasattr(value, "func")
    return describe_callable(value) if callable(value) and plain else repr(value)


def describe_call(instance: object, shown_if_set: Collection[str] = ()) -> str:
    """Return the constructor call of an object whose arguments are attributes of the same names.

    Args:
        instance: The object. Arguments that are no attributes are left out.
        shown_if_set: Arguments that are left out at their default.
    """
    shown = []
    for name, parameter in inspect.signature(type(instance)).parameters.items():
        if not hasattr(instance, name):
            continue
        value = getattr(instance, name)
        if name not in shown_if_set or value != parameter.default:
            shown.append(f"{name}={describe(value)}")
    return f"{type(instance).__name__}({', '.join(shown)})"


def describe_callable(factory: Callable[..., Any]) -> str:
    """Name a callable, with the arguments of a ``functools.partial``, without its memory address."""
    function, settings = getattr(factory, "func", factory), getattr(factory, "keywords", {})
    # A config's callable is a partial that makes a class given by position: the class is what a reader looks for.
    function = next((arg for arg in getattr(factory, "args", ()) if isinstance(arg, type)), function)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def describe_optimizer(optimizer: Optimizer) -> str:
    """Show an optimizer's class, its learning rate, and the other hyperparameters that are not the class's defaults.

    Examples:
        >>> import torch
        >>> describe_optimizer(torch.optim.Adam([torch.zeros(1)], betas=(0.5, 0.999)))
        'Adam(lr=0.001, betas=(0.5, 0.999))'
    """
    group = optimizer.param_groups[0]
    defaults = {name: p.default for name, p in inspect.signature(type(optimizer)).parameters.items()}
    shown = {"lr": group["lr"]} if "lr" in group else {}
    shown |= {name: value for name, value in group.items() if name in defaults and not _equal(value, defaults[name])}
    shown.pop("params", None)
    return f"{type(optimizer).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # tensors of several elements
        return False
