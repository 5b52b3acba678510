"""Layout of a flat vector: how its M numbers are made up of parameter tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Union

__all__ = ["Layout", "LayoutLike", "matrix_shape"]


class Layout:
    """The shapes of the parameter tensors, in order. Both ends know it, so it is not sent.

    Args:
        shapes: One shape a tensor; an int stands for a vector of that many entries.

    Attributes:
        shapes: The shapes.
        sizes: Entries of each tensor.
        size: Entries in all, M for a whole update.

    Examples:
        >>> layout = Layout([(10, 784), 10])
        >>> layout.sizes, layout.size, layout.shapes
        ((7840, 10), 7850, ((10, 784), (10,)))
    """

    __slots__ = ("shapes", "size", "sizes")

    def __init__(self, shapes: Iterable[int | Sequence[int]]) -> None:
        self.shapes = tuple((shape,) if isinstance(shape, int) else tuple(map(int, shape)) for shape in shapes)
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.size = sum(self.sizes)

    @staticmethod
    def of(value: LayoutLike) -> Layout:
        """Return a layout as it is, and make one of anything else that ``Layout`` takes."""
        return value if isinstance(value, Layout) else Layout(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(self.shapes)

    def __repr__(self) -> str:
        """Show the constructor call."""
        return f"Layout({list(self.shapes)!r})"


# Not `|`: the forward reference is evaluated here.
LayoutLike = Union["Layout", Iterable["int | Sequence[int]"]]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a parameter tensor as a matrix; a vector is one row.

    Examples:
        >>> matrix_shape((64, 3, 5, 5)), matrix_shape((10,)), matrix_shape(())
        ((64, 75), (1, 10), (1, 1))
    """
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
