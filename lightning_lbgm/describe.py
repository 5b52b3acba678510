"""Settings as text that is the same in every run: no memory addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["describe", "describe_callable"]


def describe(value: Any) -> str:
    """Return the representation of a setting; of a function, its name."""
    anonymous: Any = object.__repr__
    plain = type(value).__repr__ is anonymous or hasattr(value, "__qualname__") or hasattr(value, "func")
    return describe_callable(value) if callable(value) and plain else repr(value)


def describe_callable(factory: Callable[..., Any]) -> str:
    """Name a callable, with the arguments of a ``functools.partial``, without its memory address."""
    function, settings = getattr(factory, "func", factory), getattr(factory, "keywords", {})
    # A config's callable is a partial that makes a class given by position: the class is what a reader looks for.
    function = next((arg for arg in getattr(factory, "args", ()) if isinstance(arg, type)), function)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
