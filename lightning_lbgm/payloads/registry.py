"""Registry of payload kinds: names in checkpoints, codes in messages."""

from __future__ import annotations

import sys
from typing import Generic, TypeVar

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name and by code, each of which one class has.

    Attributes:
        names: Class of each name.
        codes: Class of each code, of those that have one.
    """

    def __init__(self) -> None:
        self.names: dict[str, type[T]] = {}
        self.codes: dict[int, type[T]] = {}

    def add(self, cls: type[T]) -> None:
        """Take a class in. Without a ``code`` of its own, messages are read as the class that it extends.

        Raises:
            TypeError: If another class has its name or its code, or the code is not from 1 to 255.
        """
        code = cls.__dict__.get("code")
        _check_new("name", cls, self.names.get(cls.__name__))
        if code is not None:
            if isinstance(code, bool) or not isinstance(code, int) or not 1 <= code <= 255:
                raise TypeError(f"`{cls.__name__}.code` must be from 1 to 255 (a byte); got {code!r}.")
            _check_new(f"code {code}", cls, self.codes.get(code))
            self.codes[code] = cls
        self.names[cls.__name__] = cls


def _check_new(what: str, cls: type, known: type | None) -> None:
    """Refuse a class whose name or code another one has; a cell of a notebook that is run again replaces its own."""
    if known is None:
        return
    again = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if again and hasattr(sys, "ps1") and "<locals>" not in cls.__qualname__:
        return
    raise TypeError(
        f"The payload {cls.__module__}.{cls.__qualname__} has the {what} of {known.__module__}.{known.__qualname__}:"
        " messages and checkpoints could be read as either. Give it a name and a `code` (64 to 255) of its own."
    )
