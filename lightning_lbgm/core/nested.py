"""Nested built-ins: dicts and lists at any depth, as states of clients and checkpoints are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["map_leaves"]


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of nested dicts and lists with ``function`` applied to all that is neither.

    Examples:
        >>> map_leaves({"a": [1, {"b": 2}]}, lambda number: 10 * number)
        {'a': [10, {'b': 20}]}
    """
    if isinstance(value, dict):
        return {key: map_leaves(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_leaves(item, function) for item in value]
    return function(value)
