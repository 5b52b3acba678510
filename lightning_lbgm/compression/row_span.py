"""Row-wise span of a client's last updates: each row of a parameter matrix has coefficients of its own.

A row is what feeds one output: a unit's weights in a linear layer, a filter's in a convolution; a vector is one row.
For R rows and r vectors the span has up to R r dimensions instead of r, at the same memory and the same passes over it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lbgm.compression.span import ROUNDINGS, Basis, Span, can_hold, payloads
from lightning_lbgm.core.layout import Layout, matrix_shape
from lightning_lbgm.core.numerics import is_safe
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.coefficients import Combination

__all__ = ["RowCombination", "RowSpan"]

_LOST = 1e-36  # squares of float32 below it have fewer digits
_NOTHING = 1e-12  # share of the whole up to which a row whose digits are lost counts for nothing


class RowSpan(Span):
    """Coefficients for each vector and row; the Gram matrices are one tensor of shape ``(R, r, r)``, ``float64``."""

    def count(self, basis: Basis, layout: Layout) -> int:
        return len(basis["payloads"]) * sum(matrix_shape(shape)[0] for shape in layout.shapes)

    def dots(self, basis: Basis, update: Payload) -> Tensor:
        dense = update.dense()
        columns = [_row_products(dense, payload.dense(), update.layout) for payload in payloads(basis, update.layout)]
        return torch.stack(columns, 1)

    def fit(self, basis: Basis, products: Tensor, update: Payload) -> tuple[float, list[float]]:
        gram: Tensor = basis["gram"]
        if not bool(gram.any()):
            return 1.0, []
        dense = update.dense()
        squared_norm = float(_row_products(dense, dense, update.layout).sum())
        if not 0 < squared_norm < math.inf or not math.isfinite(float(products.sum() + gram.sum())):
            return 1.0, []
        norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        scales = torch.where(norms > 0, 1 / norms, 0.0)
        matrices = gram * scales[:, :, None] * scales[:, None, :]
        rank = gram.shape[1]
        # Enough on the diagonal to keep dependent rows from blowing up round-off; the error below is that of the
        # coefficients as they are.
        ridge = ROUNDINGS * rank * torch.finfo(update.dtype).eps
        regular = matrices + torch.eye(rank, dtype=gram.dtype, device=gram.device) * ridge
        right = products * scales
        solution = torch.linalg.solve(regular, right[:, :, None])[:, :, 0]
        explained = 2 * (right * solution).sum(1) - (solution * (matrices @ solution[:, :, None])[:, :, 0]).sum(1)
        error = min(1.0, max(0.0, 1 - float(explained.sum()) / squared_norm))
        coefficients = (solution * scales).reshape(-1)
        held = can_hold(update.dtype, coefficients, norms.reshape(-1), squared_norm)
        return error, coefficients.tolist() if held else []

    def append(self, basis: Basis, update: Payload, products: Tensor | None, rank: int) -> None:
        dense = update.dense()
        squared_norms = _row_products(dense, dense, update.layout)
        gram = basis["gram"] if products is not None else squared_norms.new_zeros(len(squared_norms), 0, 0)
        products = squared_norms.new_zeros(len(squared_norms), 0) if products is None else products
        first = int(gram.shape[1] == rank)
        size = gram.shape[1] - first
        grown = gram.new_empty(len(gram), size + 1, size + 1)
        grown[:, :size, :size] = gram[:, first:, first:]
        grown[:, size, :size] = grown[:, :size, size] = products[:, first:]
        grown[:, size, size] = squared_norms
        basis["gram"] = grown
        self._keep(basis, update, rank)

    def combination(self, basis: Basis, coefficients: Tensor, layout: Layout) -> Payload:
        bases = payloads(basis, layout)
        return RowCombination(bases, coefficients.view(-1, len(bases)))


class RowCombination(Combination):
    """A sum of payloads, each row of each times a number of its own. It exists at each end and is never sent.

    Args:
        bases: The payloads.
        factors: Shape ``(R, r)``.
    """

    def __init__(self, bases: list[Payload], factors: Tensor) -> None:
        super().__init__(bases, [])
        self.row_factors = factors

    def dense(self) -> Tensor:
        out = torch.zeros(self.size, dtype=self.dtype, device=self.bases[0].device)
        self.add_to(out)
        return out

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        for base, factors in zip(self.bases, self.row_factors.unbind(1)):
            begin = 0
            for part, view, shape in zip(base.dense().split(self.sizes), out.split(self.sizes), self.layout.shapes):
                rows, columns = matrix_shape(shape)
                scale = factors[begin : begin + rows, None]
                view.view(rows, columns).addcmul_(part.view(rows, columns), scale, value=alpha)
                begin += rows


def _row_products(one: Tensor, two: Tensor, layout: Layout) -> Tensor:
    """Return the inner product of each row, shape ``(R,)``, ``float64``."""
    products = (one * two).split(layout.sizes)
    sums = [part.view(matrix_shape(shape)).sum(1, dtype=torch.float64) for part, shape in zip(products, layout.shapes)]
    result = torch.cat(sums)
    if one.dtype == torch.float64:
        return result
    sizes = result.abs()
    total = float(sizes.sum())
    if not is_safe(total) or total * _NOTHING < _LOST * layout.size:
        return _row_products(one.double(), two.double(), layout)
    # A row this far below the others has lost its digits in float32, and counts for nothing.
    return torch.where(sizes < _LOST * layout.size, 0.0, result)
