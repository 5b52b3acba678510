"""Row-wise span of a client's last updates: each row of a parameter matrix has coefficients of its own.

A row is what feeds one output: a unit's weights in a linear layer, a filter's in a convolution; a vector is one row.
For R rows and r vectors the span has up to R r dimensions instead of r, at the same memory and the same passes over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lightning_lbgm.compression.span import ROUNDINGS, Basis, Numbers, Span, can_hold, payloads
from lightning_lbgm.core.blocks import block_size
from lightning_lbgm.core.layout import Layout, matrix_shape
from lightning_lbgm.core.numerics import is_safe
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.coefficients import Combination

__all__ = ["RowCombination", "RowSpan"]

_LOST = 1e-36  # squares of float32 below it have fewer digits
_LONG = 2**13  # columns from which a row is worth a call of its own
_NOTHING = 1e-12  # share of the whole up to which a row whose digits are lost counts for nothing


class RowSpan(Span):
    """Coefficients for each vector and row; the Gram matrices are one tensor of shape ``(R, r, r)``, ``float64``."""

    def count(self, basis: Basis, layout: Layout) -> int:
        return len(basis["payloads"]) * sum(matrix_shape(shape)[0] for shape in layout.shapes)

    def vectors(self, basis: Basis, layout: Layout) -> list[Payload]:
        known = payloads(basis, layout)
        if known and layout.size <= block_size(known[0].tensors()[0]):
            # Decoded once for both uses; of larger ones that would take too much memory.
            return [vector if isinstance(vector, Dense) else Dense(vector.dense(), layout) for vector in known]
        return known

    def dots(self, basis: Basis, update: Payload, vectors: list[Payload] | None = None) -> Tensor:
        dense, known = update.dense(), payloads(basis, update.layout) if vectors is None else vectors
        return torch.cat([_row_products(dense, decoded, update.layout) for decoded in _decoded(known)], 1)

    def fit(self, basis: Basis, products: Tensor, update: Payload) -> tuple[float, Numbers]:
        # In NumPy, whose calls cost less: the matrices are small and many.
        numbers = torch.cat([basis["gram"], products[:, :, None]], 2).cpu().numpy()  # an accelerator is waited for once
        gram, inside = numbers[:, :, :-1], numbers[:, :, -1]
        squared_norm = update.squared_norm()
        if not gram.any() or not 0 < squared_norm < math.inf or not math.isfinite(inside.sum() + gram.sum()):
            return 1.0, []
        norms = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), 0.0))
        scales = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        matrices = gram * scales[:, :, None] * scales[:, None, :]
        rank = gram.shape[1]
        # Enough on the diagonal to keep dependent rows from blowing up round-off; the error below is that of the
        # coefficients as they are.
        ridge = ROUNDINGS * rank * torch.finfo(update.dtype).eps
        right = inside * scales
        matrices[:, range(rank), range(rank)] += ridge
        solution = np.linalg.solve(matrices, right[:, :, None])[:, :, 0]
        fitted = right - ridge * solution  # without the ridge, what the matrices make of the solution
        error = min(1.0, max(0.0, 1 - float((solution * (2 * right - fitted)).sum()) / squared_norm))
        coefficients = (solution * scales).reshape(-1)
        held = can_hold(update.dtype, torch.from_numpy(coefficients), torch.from_numpy(norms).reshape(-1), squared_norm)
        return error, coefficients if held else []

    def append(self, basis: Basis, update: Payload, products: Tensor | None, rank: int, *, copy: bool = True) -> None:
        dense = update.dense()
        squared_norms = _row_products(dense, [dense], update.layout)[:, 0]
        gram = basis["gram"] if products is not None else squared_norms.new_zeros(len(squared_norms), 0, 0)
        products = squared_norms.new_zeros(len(squared_norms), 0) if products is None else products
        first = int(gram.shape[1] == rank)
        size = gram.shape[1] - first
        grown = gram.new_empty(len(gram), size + 1, size + 1)
        grown[:, :size, :size] = gram[:, first:, first:]
        grown[:, size, :size] = grown[:, :size, size] = products[:, first:]
        grown[:, size, size] = squared_norms
        basis["gram"] = grown
        self._keep(basis, update, rank, copy)

    def combination(
        self, basis: Basis, coefficients: Tensor, layout: Layout, vectors: list[Payload] | None = None
    ) -> Payload:
        bases = payloads(basis, layout) if vectors is None else vectors
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

        self._sum: Tensor | None = None

    def dense(self) -> Tensor:
        if self._sum is None:
            self._sum = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            self._add_up(self._sum, 1.0)
        return self._sum

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        if self.size <= 8 * block_size(out):
            out.add_(self.dense(), alpha=alpha)  # error feedback and aggregation both add it: the sum is made once
        else:
            self._add_up(out, alpha)

    def _add_up(self, out: Tensor, alpha: float) -> None:
        matrices = [matrix_shape(shape) for shape in self.layout.shapes]
        rows = [shape[0] for shape in matrices]
        cut = torch.split_with_sizes  # without the checks of `Tensor.split`, which show in small updates
        factors = iter([cut(column, rows) for column in self.row_factors[:, :, None].unbind(1)])
        for decoded in _decoded(self.bases):
            terms = [(cut(vector, self.sizes), next(factors)) for vector in decoded]
            # Tensor by tensor, so that each sum stays in the cache.
            for index, (view, shape) in enumerate(zip(cut(out, self.sizes), matrices)):
                matrix = view.view(shape)
                for vector, factor in terms:
                    matrix.addcmul_(vector[index].view(shape), factor[index], value=alpha)


def _decoded(vectors: list[Payload]) -> Iterator[list[Tensor]]:
    """Yield the decoded vectors, all together if they are dense, else one at a time for the memory's sake."""
    if all(isinstance(vector, Dense) for vector in vectors):
        yield [vector.dense() for vector in vectors]
    else:
        yield from ([vector.dense()] for vector in vectors)


def _row_products(one: Tensor, others: list[Tensor], layout: Layout) -> Tensor:
    """Return the inner products of each row with that of each of r other vectors, shape ``(R, r)``, ``float64``."""
    result = _products(one, others, layout)
    if one.dtype == torch.float64:
        return result
    sizes = result.abs()
    totals = sizes.sum(0).tolist()
    # A row this far below the others has lost its digits in float32, and counts for nothing.
    result = torch.where(sizes < _LOST * layout.size, 0.0, result)
    for column, total in enumerate(totals):
        if not is_safe(total) or total * _NOTHING < _LOST * layout.size:
            result[:, column] = _products(one.double(), [others[column].double()], layout)[:, 0]
    return result


def _products(one: Tensor, others: list[Tensor], layout: Layout) -> Tensor:
    """Return the inner products of rows in the vectors' dtype, shape ``(R, r)``, as ``float64``."""
    if one.device.type != "cpu" or not hasattr(np, "vecdot"):  # of NumPy 2
        columns = []
        for other in others:
            parts = zip((one * other).split(layout.sizes), layout.shapes)
            columns.append(torch.cat([part.view(matrix_shape(s)).sum(1, dtype=torch.float64) for part, s in parts]))
        return torch.stack(columns, 1)
    left, rights = one.numpy(), [other.numpy() for other in others]
    result = np.empty((len(others), sum(matrix_shape(shape)[0] for shape in layout.shapes)), left.dtype)
    begin = row = 0
    for shape in layout.shapes:
        rows, columns_ = matrix_shape(shape)
        # Some rows at a time, so that those of the first vector stay in the cache for all others.
        for first in range(0, rows, step := max(1, block_size(one) // max(1, columns_))):
            count = min(step, rows - first)
            end = begin + count * columns_
            block = left[begin:end].reshape(count, columns_)
            for index, right in enumerate(rights):
                out = result[index, row : row + count]
                if columns_ > _LONG:  # torch's threads are those that were set
                    for at in range(count):
                        place = slice(begin + at * columns_, begin + (at + 1) * columns_)
                        out[at] = float(torch.dot(one[place], others[index][place]))
                else:
                    np.vecdot(block, right[begin:end].reshape(count, columns_), out=out)
            begin, row = end, row + count
    return torch.from_numpy(result).double().T.contiguous()
