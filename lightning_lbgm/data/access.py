"""Errors for code that uses a communication round as a batch of tensors."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["BatchAccessError", "NotABatch"]


class BatchAccessError(AttributeError, TypeError):
    """Something was used as a batch of tensors that is none; the message says what to do instead.

    It is an ``AttributeError`` so that ``hasattr`` works, and a ``TypeError`` as for other objects that cannot be
    unpacked or indexed.
    """


class NotABatch:
    """Answer attribute access, indexing, unpacking, ``len()`` and torch functions with an error that names a remedy.

    ``__iter__`` is left out on purpose: what searches a batch for tensors must not take this for a collection.
    Unpacking and loops go through ``__getitem__`` then.
    """

    def _refuse(self, what: str) -> NoReturn:
        """Raise the error.

        Args:
            what: What was asked of the object, such as ``"has no attribute 'x'"``.
        """
        raise BatchAccessError(f"{type(self).__name__} {what}.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and libraries probe for, also on objects that are not made yet
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._refuse(f"has no attribute {name!r}")

    def __getitem__(self, key: Any) -> NoReturn:
        self._refuse("cannot be indexed or unpacked")

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        self._refuse("takes no items")

    def __len__(self) -> int:
        self._refuse("has no length")

    def __bool__(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, NotABatch):
                value._refuse(f"is no tensor for `{name}`")
        raise BatchAccessError(f"{cls.__name__} is no tensor for `{name}`.")
