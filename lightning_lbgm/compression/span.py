"""Span of a client's last updates: projection by the Gram matrix, updated with a dot product a vector."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.coefficients import Combination

__all__ = ["ROUNDINGS", "Basis", "Numbers", "Span", "can_hold", "lbp_error", "new_basis", "payloads", "project"]

Numbers = list[float] | npt.NDArray[np.float64]
"""Coefficients of one client."""

Basis = dict[str, Any]
"""Vectors, oldest first, and their inner products, as built-ins and tensors: ``{"payloads": [state, ...], "gram":
[[float, ...], ...]}``."""

# Directions of the span whose share of the normalised Gram matrix is below this many roundings of a dot product are
# round-off, not directions: float32 products are good to about one rounding.
ROUNDINGS = 16

# How far round-off in the inner products may put the error off, for products good to one rounding.
_ERROR_OFF = 1e-3

# Share of |g| that coefficients may lose to the least number of their dtype.
_LOST = 1e-3


def lbp_error(dot: float, update_squared_norm: float, lbg_squared_norm: float) -> float:
    """Return the look-back phase (LBP) error of an update g against a look-back gradient (LBG) l.

    It is the squared sine of the angle between them, ``sin^2(alpha) = 1 - <g, l>^2 / (|g|^2 |l|^2)``, clamped into
    [0, 1] against round-off.

    Args:
        dot: ``<g, l>``.
        update_squared_norm: ``|g|^2 > 0``.
        lbg_squared_norm: ``|l|^2 > 0``.

    Examples:
        >>> lbp_error(dot=1.0, update_squared_norm=2.0, lbg_squared_norm=1.0)  # 45 degrees
        0.5
    """
    return min(1.0, max(0.0, 1.0 - (dot / update_squared_norm) * (dot / lbg_squared_norm)))


def project(
    gram: list[list[float]], products: list[float], squared_norm: float, eps: float = 2**-23
) -> tuple[float, list[float]]:
    """Project an update g on the span of vectors l_1 ... l_r, by their inner products alone.

    With the Gram matrix ``G_ij = <l_i, l_j>`` and ``b_i = <g, l_i>`` the coefficients solve ``G c = b``; the error is
    ``1 - |P g|^2 / |g|^2``, for r = 1 the squared sine of the angle. Vectors that are zero, or dependent up to
    round-off, do no harm: the solution of smallest norm is taken, among normalised vectors, in ``float64``.

    The error is that of the coefficients returned, up to 0.001. Round-off of ``eps`` in each product puts it off by up
    to ``eps (2 |x|_1 + |x|_1^2)``, x being the coefficients of normalised vectors, which grow as these become
    dependent. So x is bounded; beyond that it is the best one within the bound (a trust region).

    Args:
        gram: G, r x r.
        products: b, r numbers.
        squared_norm: ``|g|^2 > 0``.
        eps: Relative rounding of the inner products.

    Returns:
        The error, in [0, 1], and the coefficients c.

    Examples:
        >>> error, coefficients = project([[1.0, 0.0], [0.0, 4.0]], [3.0, 8.0], squared_norm=50.0)
        >>> round(error, 9), [round(c, 9) for c in coefficients]  # g = (3, 4, 5): a half lies in the span
        (0.5, [3.0, 2.0])
    """
    if len(products) == 1:
        if gram[0][0] == 0:
            return 1.0, [0.0]
        return lbp_error(products[0], squared_norm, gram[0][0]), [products[0] / gram[0][0]]
    matrix = np.array(gram)
    norms = np.sqrt(matrix.diagonal().clip(0))
    scales = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    matrix = matrix * scales[:, None] * scales
    cosines = np.array(products) * scales / squared_norm**0.5
    values, vectors = np.linalg.eigh(matrix)
    kept = values > ROUNDINGS * eps * len(products)
    basis, values = vectors[:, kept], values[kept]
    inside = basis.T @ cosines
    solution = basis @ (inside / values)
    limit = _ERROR_OFF / (eps * len(products))  # of |x|^2: |x|_1^2 is at most r times that
    if solution @ solution > limit:
        solution = basis @ (inside / (values + _damping(inside.tolist(), values.tolist(), limit)))
    error = 1 - float(2 * (cosines @ solution) - solution @ matrix @ solution)
    return min(1.0, max(0.0, error)), (solution * scales * squared_norm**0.5).tolist()


def _damping(inside: list[float], values: list[float], limit: float) -> float:
    """Return the mu at which ``sum (b_j / (lambda_j + mu))^2`` falls to a limit that it exceeds at 0, by bisection."""
    low, high = 0.0, math.sqrt(sum(b * b for b in inside) / limit)
    for _ in range(60):
        mu = (low + high) / 2
        if sum((b / (value + mu)) ** 2 for b, value in zip(inside, values)) > limit:
            low = mu
        else:
            high = mu
    return high


def new_basis() -> Basis:
    """Return a basis without vectors."""
    return {"payloads": [], "gram": []}


def payloads(basis: Basis, layout: Layout) -> list[Payload]:
    """Return the vectors, oldest first."""
    return [
        Dense(state["values"], layout) if state["kind"] == "Dense" else Payload.from_state(state, layout)
        for state in basis["payloads"]
    ]


class Span:
    """What is done with a basis: one coefficient for each vector. It holds no state."""

    def count(self, basis: Basis, layout: Layout) -> int:
        """Return the number of coefficients of an update."""
        return len(basis["payloads"])

    def vectors(self, basis: Basis, layout: Layout) -> list[Payload]:
        """Return the vectors, oldest first, for ``dots`` and ``combination`` to share."""
        return payloads(basis, layout)

    def dots(self, basis: Basis, update: Payload, vectors: list[Payload] | None = None) -> Any:
        """Return the inner products of an update with the vectors."""
        return update.dots(payloads(basis, update.layout) if vectors is None else vectors)

    def fit(self, basis: Basis, products: Any, update: Payload) -> tuple[float, Numbers]:
        """Project an update that is not zero, by its ``dots``.

        Returns:
            The error, ``1 - |P g|^2 / |g|^2``, and the coefficients: none if all vectors are zero, if the update's
            dtype cannot hold them, or if a squared norm has under- or overflowed (``float64`` alone).
        """
        gram, squared_norm = basis["gram"], update.squared_norm()
        squares = [gram[index][index] for index in range(len(gram))]
        if not any(squares) or not 0 < squared_norm < math.inf or not all(map(math.isfinite, (*squares, *products))):
            return 1.0, []
        info = torch.finfo(update.dtype)
        error, coefficients = project(gram, products, squared_norm, info.eps)
        if not all(info.tiny <= abs(coefficient) <= info.max for coefficient in coefficients):
            norms = torch.tensor(squares, dtype=torch.float64).clamp(min=0).sqrt()
            if not can_hold(update.dtype, torch.tensor(coefficients, dtype=torch.float64), norms, squared_norm):
                return error, []
        return error, coefficients

    def append(self, basis: Basis, update: Payload, products: Any, rank: int, *, copy: bool = True) -> None:
        """Take an update in, and let the oldest vector beyond ``rank`` go.

        Args:
            basis: Changed in place.
            update: The update.
            products: Its ``dots``; None for the first vector.
            rank: Vectors to keep at the most.
            copy: Whether the update is copied. If not, nobody may write to its tensors any more.
        """
        gram, products = basis["gram"], list(products or [])
        if len(gram) == rank:
            del gram[0], products[0]
            for row in gram:
                del row[0]
        for row, product in zip(gram, products):
            row.append(product)
        gram.append([*products, update.squared_norm()])
        self._keep(basis, update, rank, copy)

    def combination(
        self, basis: Basis, coefficients: Tensor, layout: Layout, vectors: list[Payload] | None = None
    ) -> Payload:
        """Return the sum of the vectors times the coefficients."""
        return Combination(payloads(basis, layout) if vectors is None else vectors, coefficients.tolist())

    @staticmethod
    def _keep(basis: Basis, update: Payload, rank: int, copy: bool) -> None:
        # Tensors of its own, never written to again: a round that breaks off puts the old list in its place.
        states = basis["payloads"]
        if len(states) == rank:
            del states[0]
        states.append(update.to_state(copy=copy))


def can_hold(dtype: torch.dtype, coefficients: Tensor, norms: Tensor, squared_norm: float) -> bool:
    """Whether coefficients survive their dtype: none overflows, and what underflows is no part of the update.

    Args:
        dtype: The dtype.
        coefficients: Shape ``(n,)``, ``float64``.
        norms: L2 norms of what each is multiplied with, shape ``(n,)``, ``float64``.
        squared_norm: ``|g|^2`` of the update.
    """
    info, sizes = torch.finfo(dtype), coefficients.abs()
    least, most = (float(size) for size in torch.aminmax(sizes))
    if info.tiny <= least and most <= info.max:
        return True
    lost = torch.where(sizes < info.tiny, sizes * norms, 0.0).sum()
    return most <= info.max and float(lost) <= _LOST * math.sqrt(squared_norm)
