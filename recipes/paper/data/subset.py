"""Fewer examples than a data set has: the same ones in every run."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_subset"]

_SEED = 0  # fixed: a run's seed says who gets which example, not which examples there are


def draw_subset(num_examples: int, wanted: int | None, strata: Tensor | None = None, name: str = "wanted") -> Tensor:
    """Draw examples at random without replacement; the same arguments give the same ones.

    Args:
        num_examples: n.
        wanted: Examples to draw; None: all.
        strata: Class of each example, ``int64`` of the shape ``(n,)``: each keeps its share of the examples, as nearly
            as whole numbers allow. None: all are drawn alike.
        name: The argument that an error is to name.

    Returns:
        Indices in increasing order, ``int64``.

    Raises:
        ValueError: If ``wanted`` is less than 1 or more than ``num_examples``.

    Examples:
        >>> classes = torch.tensor([0, 1, 0, 1, 0, 0])
        >>> classes[draw_subset(6, 3, classes)].bincount()
        tensor([2, 1])
    """
    if wanted is None:
        return torch.arange(num_examples)
    if not 1 <= wanted <= num_examples:
        raise ValueError(f"`{name}={wanted}` must lie between 1 and the {num_examples} examples there are; null: all.")
    generator = torch.Generator().manual_seed(_SEED)
    shuffled = torch.randperm(num_examples, generator=generator)
    if strata is None:
        return shuffled[:wanted].sort().values
    sizes = strata.bincount()
    exact = sizes.double() * wanted / num_examples
    counts = exact.long()
    # What rounding down leaves over goes to the largest remainders.
    counts[(counts - exact).argsort(stable=True)[: wanted - int(counts.sum())]] += 1
    by_class = shuffled[strata[shuffled].argsort(stable=True)]
    rank = torch.arange(num_examples) - (sizes.cumsum(0) - sizes)[strata[by_class]]  # within its class
    return by_class[rank < counts[strata[by_class]]].sort().values
