"""Stacked batches of several clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_lbgm.clients.vmap.guards import CannotVectorize
from lightning_lbgm.data.feed import LocalBatch

__all__ = ["SplitBatch", "shapes_of", "stack"]

_PLAIN = (int, float, bool, str, bytes, type(None))


@dataclass(frozen=True)
class SplitBatch:
    """A local batch of each of C clients, taken apart.

    Attributes:
        tensors: Its tensors, each of shape ``(C, ...)``.
        size: Examples of one client.
    """

    tensors: list[Tensor]
    size: int
    _constants: dict[int, Any]
    _structure: TreeSpec | type

    def join(self, tensors: Sequence[Tensor]) -> Any:
        """Put one client's tensors together to a batch as its DataLoader made it."""
        if isinstance(self._structure, type):
            return self._structure(tensors)
        if not self._constants:
            return tree_unflatten(tensors, self._structure)
        rest = iter(tensors)
        leaves = [self._constants[i] if i in self._constants else next(rest) for i in range(self._structure.num_leaves)]
        return tree_unflatten(leaves, self._structure)


def shapes_of(batches: Sequence[LocalBatch]) -> tuple[Any, ...]:
    """Return what two clients' batches must agree in to be stacked.

    Raises:
        CannotVectorize: If a batch has other leaves than tensors and plain values.
    """
    return tuple((batch.size, *_shapes(batch.data)) for batch in batches)


def stack(batches: Sequence[LocalBatch]) -> SplitBatch:
    """Stack one batch of each client; they agree in ``shapes_of``."""
    if _is_flat(batches[0].data):
        columns = zip(*[batch.data for batch in batches])
        return SplitBatch([torch.stack(column) for column in columns], batches[0].size, {}, type(batches[0].data))
    leaves = [tree_flatten(batch.data)[0] for batch in batches]
    structure = tree_flatten(batches[0].data)[1]
    constants = {i: leaf for i, leaf in enumerate(leaves[0]) if not isinstance(leaf, Tensor)}
    tensors = [torch.stack(column) for i, column in enumerate(zip(*leaves)) if i not in constants]
    return SplitBatch(tensors, batches[0].size, constants, structure)


def _is_flat(data: Any) -> bool:
    """Whether a batch is a list or tuple of tensors, the usual case, which needs no walk through a tree."""
    return type(data) in (list, tuple) and all(type(tensor) is Tensor for tensor in data)


def _shapes(data: Any) -> tuple[Any, ...]:
    if _is_flat(data):
        return (type(data), *[(tensor.shape, tensor.dtype) for tensor in data])
    leaves, structure = tree_flatten(data)
    shapes: list[Any] = [structure]
    for leaf in leaves:
        if type(leaf) is Tensor:
            shapes.append((leaf.shape, leaf.dtype))
        elif isinstance(leaf, _PLAIN):
            shapes.append((type(leaf), leaf))
        else:
            raise CannotVectorize(f"batches have a {type(leaf).__name__}, which cannot be stacked")
    return tuple(shapes)
