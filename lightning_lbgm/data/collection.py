"""Collections of training loaders, taken apart as Lightning does: one loader, or a list or dict of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

__all__ = ["TrainLoaders"]


class TrainLoaders:
    """The training loader, or the loaders of a nested list, tuple or dict, in order.

    Attributes:
        source: What the user gave.
        loaders: The loaders.
        names: Where each stands: its key or position, joined by ``/`` if collections are nested.
        is_collection: Whether there is a list, tuple or dict; one of plain values alone is a loader.
        mode: How the user wanted them combined, if that was said.

    Examples:
        >>> loaders = TrainLoaders({"a": range(3), "b": [range(2), range(2)]})
        >>> loaders.names, loaders.is_collection, TrainLoaders(range(3)).is_collection
        (('a', 'b/0', 'b/1'), True, False)
    """

    def __init__(self, source: Any, mode: str | None = None) -> None:
        self.source = source
        self.mode = mode
        leaves, self._spec = tree_flatten_with_path(source, is_leaf=_is_loader)
        self.loaders = [loader for _, loader in leaves]
        self.names = tuple("/".join(_name(key) for key in path) for path, _ in leaves)
        self.is_collection = not _is_loader(source)

    def __iter__(self) -> Iterator[Any]:
        """Yield the loaders."""
        return iter(self.loaders)

    @property
    def wrap(self) -> Callable[[Any], Any] | None:
        """What puts a batch of the only loader where that stands in the collection; None if there is no collection."""
        return (lambda batch: tree_unflatten([batch], self._spec)) if self.is_collection else None


def _is_loader(value: Any) -> bool:
    if not isinstance(value, (list, tuple, dict)):
        return True
    members = value.values() if isinstance(value, dict) else value
    return bool(members) and all(isinstance(member, (int, float, str)) for member in members)


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
