"""Low-rank payload: a matrix as the product of two thin factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lbgm.core.blocks import block_size
from lightning_lbgm.core.layout import Layout, LayoutLike, matrix_shape
from lightning_lbgm.core.numerics import binary_exponent, is_safe
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size

__all__ = ["LowRank", "factorize"]

_ORDINARY = 40  # matrices with a largest entry from 2^-40 to 2^40, 1e-12 to 1e12, are factorized as they are


class LowRank(Payload):
    """A parameter matrix of shape (n, m) as ``P Q^T``: ``rank * (n + m)`` numbers.

    The body has n, m and the rank (seven bits a byte), the kind of the numbers (a byte) and the numbers.

    Args:
        factors: P, shape (n, rank), and Q, shape (m, rank), row by row in one vector; or a payload of as many entries.
        rows: n.
        columns: m.
        layout: The one parameter tensor; convolution kernels of shape (out, in, kh, kw) are (out, in * kh * kw).
    """

    fields = ("body", "rows", "columns")
    code = 9

    def __init__(self, factors: Tensor | Payload, rows: int, columns: int, layout: LayoutLike | None = None) -> None:
        super().__init__([(rows, columns)] if layout is None else layout)
        self.body = factors if isinstance(factors, Payload) else Dense(factors)
        self.rows = rows
        self.columns = columns

    @staticmethod
    def of(left: Tensor, right: Tensor, layout: LayoutLike | None = None) -> LowRank:
        """Make one of P, shape (n, rank), and Q, shape (m, rank), their columns scaled to entries of like magnitude.

        So a stage that rounds the numbers errs alike in both.
        """
        sizes = [torch.linalg.vector_norm(factor, dim=0) / max(1, len(factor)) ** 0.5 for factor in (left, right)]
        scale = (sizes[1] / sizes[0]).sqrt().nan_to_num(1.0, 1.0, 1.0)
        scale = torch.where(scale > 0, scale, 1.0)
        left, right = left * scale, right / scale
        return LowRank(torch.cat([left.reshape(-1), right.reshape(-1)]), len(left), len(right), layout)

    @property
    def rank(self) -> int:
        """Columns of the factors."""
        return self.body.size // (self.rows + self.columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return P and Q, decoded."""
        left, right = self.body.dense().split([self.rows * self.rank, self.columns * self.rank])
        return left.view(self.rows, self.rank), right.view(self.columns, self.rank)

    def dense(self) -> Tensor:
        left, right = self.factors()
        return (left @ right.T).reshape(-1)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        left, right = self.factors()
        # Some rows at a time, so that the product stays in the cache.
        step = max(1, block_size(out) // max(1, self.columns))
        for part, rows in zip(out.view(self.rows, self.columns).split(step), left.split(step)):
            part.add_(rows @ right.T, alpha=alpha)

    def _dot(self, other: Payload) -> float | None:
        left, right = self.factors()
        if isinstance(other, LowRank) and (other.rows, other.columns) == (self.rows, self.columns):
            # <P Q^T, R S^T> = sum of (P^T R) * (Q^T S), in float64: the factors are small.
            other_left, other_right = other.factors()
            products = (left.double().T @ other_left.double()) * (right.double().T @ other_right.double())
            return float(products.sum())
        if isinstance(other, Dense):
            matrix = other.values.view(self.rows, self.columns)
            result = float((left * (matrix @ right)).double().sum())
            if is_safe(abs(result)) or matrix.dtype == torch.float64:
                return result
            return float((left.double() * (matrix.double() @ right.double())).sum())
        return None

    def split(self) -> list[Payload]:
        return [self]

    def relabel(self, layout: Layout) -> None:
        super().relabel(layout)
        if matrix_shape(layout.shapes[0]) != (self.rows, self.columns) or len(layout.shapes) > 1:
            raise MessageError(f"The message has factors of a {self.rows} x {self.columns} matrix for {layout}.")

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        if not factors:
            return super().compress(encode)
        return LowRank(self.body.compress(encode, factors=True), self.rows, self.columns, self.layout)

    @property
    def num_bits(self) -> int:
        return 8 * (sum(map(varint_size, (self.rows, self.columns, self.rank))) + 1) + self.body.num_bits

    def write(self, out: Writer) -> None:
        out.varint(self.rows)
        out.varint(self.columns)
        out.varint(self.rank)
        self.body.write_inside(out)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        rows, columns, rank = data.varint(), data.varint(), data.varint()
        if not rows * columns == size > 0 or rank > min(rows, columns):
            raise MessageError(f"The message has factors of rank {rank} of a {rows} x {columns} matrix of {size}.")
        return cls(Payload.read_inside(data, (rows + columns) * rank), rows, columns)


def factorize(update: Payload, rank: int, factor: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> Blocks:
    """Encode each matrix of an update by its factors, and the rest as it is.

    Vectors are sent whole, and matrices for which ``rank`` factors would take no fewer numbers.

    Args:
        update: The update.
        rank: Columns of the factors.
        factor: Called with the tensor's index and the matrix, shape (n, m), which for extreme scales is divided by a
            power of two; returns P and Q.
    """
    parts: list[Payload] = []
    for index, (values, shape) in enumerate(zip(update.dense().split(update.sizes), update.layout.shapes)):
        rows, columns = matrix_shape(shape)
        if rank * (rows + columns) >= values.numel():
            # A copy: what follows may keep it, and the update's memory is the caller's.
            parts.append(Dense(values.clone(), Layout([shape])))
        else:
            parts.append(_factorized(index, values.view(rows, columns), factor, Layout([shape])))
    return Blocks(parts, update.layout)


def _factorized(index: int, matrix: Tensor, factor: Callable[..., tuple[Tensor, Tensor]], layout: Layout) -> LowRank:
    """Return a matrix's factors, found at a scale at which squares and products of three neither over- nor underflow.

    A power of two brings it there and back, so that no digit changes; it is even, for half of it goes to each factor.
    """
    power = binary_exponent(matrix)
    if power is None or abs(power) <= _ORDINARY:
        return LowRank.of(*factor(index, matrix), layout)
    half = power // 2
    # One half at a time: 2 ** power itself may be beyond the dtype.
    payload = LowRank.of(*factor(index, matrix * 2.0**-half * 2.0**-half), layout)
    return LowRank(payload.body.dense() * 2.0**half, payload.rows, payload.columns, layout)
