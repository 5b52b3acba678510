"""Gram matrix analysis (PCA) of a few long vectors, without the vectors.

T vectors g_0 ... g_{T-1}, T far smaller than their length, have the Gram matrix K with K_ij = <g_i, g_j>. All functions
take stacks of such matrices, shape ``(..., T, T)`` and float64, and work on each alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Centering", "centered", "cosines", "explained", "num_components", "principal_cosines", "with_momentum"]

Array = NDArray[np.float64]
Centering = Literal["entries", "epochs"] | None

_NO_VARIANCE = 1e-12  # of the vectors' squared norms: less is what rounding leaves of zero


def with_momentum(gram: Array, sums: Array, momentum: float) -> tuple[Array, Array]:
    """Return the Gram matrix and the sums of v_t = momentum v_{t-1} + g_t.

    Args:
        gram: Gram matrix of the g_t, ``(..., T, T)``.
        sums: Sum of each g_t's entries, ``(..., T)``.
        momentum: Share of the past that is kept, in [0, 1).

    Examples:
        >>> with_momentum(np.eye(2), np.ones(2), 0.5)[0].tolist()  # v_0 = g_0 and v_1 = 0.5 g_0 + g_1
        [[1.0, 0.5], [0.5, 1.25]]
    """
    if momentum == 0:
        return gram, sums
    lag = np.subtract.outer(np.arange(gram.shape[-1]), np.arange(gram.shape[-1]))
    mixing = np.where(lag >= 0, momentum ** np.maximum(lag, 0), 0.0)
    return mixing @ gram @ mixing.T, sums @ mixing.T


def centered(gram: Array, sums: Array, sizes: Array, center: Centering) -> tuple[Array, Array]:
    """Return the Gram matrix of the centred vectors c_t, and the inner products <c_i, g_j>.

    Args:
        gram: Gram matrix of the g_t, ``(..., T, T)``.
        sums: Sum of each g_t's entries, ``(..., T)``.
        sizes: Length of the vectors, ``(...,)``.
        center: ``"entries"``: from each g_t the mean of its own entries is subtracted. ``"epochs"``: from all the mean
            of the g_t. None: nothing.
    """
    if center == "entries":
        gram = gram - sums[..., :, None] * sums[..., None, :] / np.maximum(sizes, 1)[..., None, None]
        return gram, gram  # the subtracted constant is orthogonal to what remains
    if center == "epochs":
        cross = gram - gram.mean(-2, keepdims=True)
        return cross - cross.mean(-1, keepdims=True), cross
    return gram, gram


def explained(centered_gram: Array, gram: Array) -> Array:
    """Return the share of the variance that the first n principal components explain together, n = 1 ... T.

    The variance of a component is its eigenvalue, a singular value squared. NaN if the vectors do not vary.

    Examples:
        >>> gram = np.diag([9.0, 1.0])
        >>> explained(gram, gram).tolist()
        [0.9, 1.0]
    """
    variances = np.linalg.eigvalsh(centered_gram)[..., ::-1].clip(0)
    total = variances.sum(-1, keepdims=True)
    varies = total > _NO_VARIANCE * np.trace(gram, axis1=-2, axis2=-1)[..., None]
    return np.where(varies, np.cumsum(variances, -1) / np.where(varies, total, 1), np.nan)


def num_components(explained_shares: Array, share: float) -> NDArray[np.int64]:
    """Return the least number of components that explain ``share``, from ``explained``; 0 if nothing varies.

    Examples:
        >>> num_components(np.array([0.9, 0.96, 1.0]), 0.95).item()
        2
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must lie in (0, 1], got {share}: 0.95 stands for N95.")
    fewer = (explained_shares < share * (1 - _NO_VARIANCE)).sum(-1)  # no NaN is less
    return np.where(np.isnan(explained_shares[..., 0]), 0, fewer + 1)


def cosines(gram: Array) -> Array:
    """Return the cosines between the vectors, ``(..., T, T)``; 0 with a vector of zeros.

    Examples:
        >>> cosines(np.array([[4.0, 3.0], [3.0, 9.0]])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = _norms(gram)
    return (gram / (norms[..., :, None] * norms[..., None, :])).clip(-1, 1)


def principal_cosines(gram: Array, centered_gram: Array, cross: Array, share: float) -> Array:
    """Return the cosines between the principal directions that explain ``share`` and the vectors, ``(N, T)``.

    With the eigenvectors v_j and eigenvalues lambda_j of the centred Gram matrix, the principal directions are
    u_j = sum_i v_ij c_i / sqrt(lambda_j), of norm 1. So <u_j, g_t> = sum_i v_ij <c_i, g_t> / sqrt(lambda_j). The sign
    of a direction is arbitrary.

    Args:
        gram: Gram matrix of the g_t, ``(T, T)``.
        centered_gram: The first of what ``centered`` returns.
        cross: The second.
        share: Share of the variance, in (0, 1].
    """
    count = int(num_components(explained(centered_gram, gram), share))
    variances, vectors = np.linalg.eigh(centered_gram)
    variances, vectors = variances[::-1][:count], vectors[:, ::-1][:, :count]
    return (vectors.T @ cross / np.sqrt(variances)[:, None] / _norms(gram)).clip(-1, 1)


def _norms(gram: Array) -> Array:
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    return np.where(norms > 0, norms, np.inf)
