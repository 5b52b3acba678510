"""Validation of arguments that users give to stages."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["check_count", "check_fraction", "class_hint"]

_EXAMPLES = {
    "fraction": "0.1",
    "rank": "2",
    "num_layers": "2",
    "correction": "TopK(0.02)",
    "stage": "TopK(0.02)",
    "mu": "0.1",
    "d": "20",
}


def check_fraction(owner: str, name: str, value: Any) -> float:
    """Return a share in (0, 1] as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{owner}({name}=...)` must be a number in (0, 1]; got {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(
            f"`{owner}({name}=...)` must be in (0, 1]; got {value!r}. Use 0.1 to send a tenth of the entries."
        )
    return float(value)


def check_count(owner: str, name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Return a whole number from ``low`` to ``high``.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{owner}({name}=...)` must be a whole number; got {value!r}.")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{owner}({name}=...)` must be {wanted}; got {value!r}.")
    return value


def class_hint(value: object, base: type) -> str:
    """Return the remedy if a class was given, or a list with one, instead of an object; else nothing.

    Args:
        value: What was given.
        base: The class of which an object is wanted.
    """
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, type) and issubclass(item, base):
            parameters = inspect.signature(item).parameters.values()
            required = [f"{p.name}={_EXAMPLES.get(p.name, '...')}" for p in parameters if p.default is p.empty]
            optional = [f"{p.name}={p.default!r}" for p in parameters if p.default is not p.empty]
            return f" {item.__name__} is a class: write {item.__name__}({', '.join(required or optional[:1])})."
    return ""
