"""Coefficient payload: coefficients of updates that both ends remember, and what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.core.blocks import block_size
from lightning_lbgm.core.layout import LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer

__all__ = ["Coefficients", "Combination"]


class Coefficients(Payload):
    """Look-back coefficients (LBC, rho), one for each basis vector: they mean nothing without the look-back gradients.

    Args:
        values: Shape ``(rank,)``.
        layout: The parameter tensors that they stand for.
    """

    fields = ("values",)
    code = 2

    def __init__(self, values: Tensor, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.values = values

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self) -> Tensor:
        raise TypeError("Coefficients decode only beside the look-back gradient: call the stage's `decode`.")

    def write(self, out: Writer) -> None:
        out.tensor(self.values)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        values = data.rest(data.dtype)
        if not values.numel():
            raise MessageError("The message holds no coefficient.")
        return cls(values, (size,))


class Combination(Payload):
    """A sum of payloads, each times a number: what coefficients decode to. It exists at each end and is never sent.

    Args:
        bases: The payloads, at least one, of the same size.
        factors: One number for each.
    """

    def __init__(self, bases: Sequence[Payload], factors: Sequence[float]) -> None:
        super().__init__(bases[0].layout)
        self.bases = list(bases)
        self.factors = list(factors)

    @property
    def dtype(self) -> torch.dtype:
        return self.bases[0].dtype

    def tensors(self) -> list[Tensor]:
        return [tensor for base in self.bases for tensor in base.tensors()]

    def dense(self) -> Tensor:
        out = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.add_to(out)
        return out

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        vectors = [base.values for base in self.bases if isinstance(base, Dense)]
        if len(vectors) < len(self.bases) or self.size <= 8 * (block := block_size(out)):
            for base, factor in zip(self.bases, self.factors):
                base.add_to(out, alpha * factor)
            return
        # Block by block: the sum of each goes through memory once.
        for part, *pieces in zip(out.split(block), *(vector.split(block) for vector in vectors)):
            for piece, factor in zip(pieces, self.factors):
                part.add_(piece, alpha=alpha * factor)

    def to_state(self, *, copy: bool = False) -> dict[str, Any]:
        raise TypeError("A combination of look-back gradients exists at each end and is never sent or stored.")

    @property
    def num_bits(self) -> int:
        raise TypeError("A combination of look-back gradients exists at each end and is never sent or stored.")
