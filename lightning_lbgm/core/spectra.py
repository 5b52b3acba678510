"""Leading singular directions of a matrix by the Gram matrix of its small side, and products with thin factors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["leading_directions", "times_few"]

_EXACT = 64  # rows up to which the Gram matrix is in float64
_DIRECT = 128  # rows up to which all eigenvectors are computed, or a short Krylov iteration is in NumPy
_PANEL = 64  # rows of the Gram matrix at a time
_STEPS = 12  # of the Krylov iteration
_SHORT = 6  # steps of the short one


def leading_directions(wide: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors of a matrix for its largest singular values.

    They are eigenvectors of ``A A^T``. If A has many rows they are found in a block Krylov subspace (Musco, Musco:
    "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition", NIPS 2015), from
    a start that is the same each time; what is left of A is then as small as with the exact ones to about a thousandth.

    Args:
        wide: A, shape (n, m), with n at most m.
        rank: Vectors to return, at most n.

    Returns:
        Shape ``(n, rank)``, with orthonormal columns in A's dtype.

    Examples:
        >>> leading_directions(torch.tensor([[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]), rank=1).abs().tolist()
        [[0.0], [1.0]]
    """
    rows = len(wide)
    if rows <= _EXACT:
        tall = wide.double()
        return torch.linalg.eigh(tall @ tall.T).eigenvectors[:, -rank:].flip(1).to(wide.dtype)
    gram = _gram(wide)
    width = rank + 2
    if wide.device.type == "cpu" and rows <= _DIRECT and width * (_SHORT + 1) <= rows // 2:
        return _few_of_small(gram, rank, width)
    if rows <= max(_DIRECT, 2 * width * (_STEPS + 1)):
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(gram)
    basis = gram.new_empty(rows, width * (_STEPS + 1))
    block = basis[:, :width] = torch.linalg.qr(start).Q
    for end in range(width, basis.shape[1], width):
        image, known = gram @ block, basis[:, :end]
        block = basis[:, end : end + width] = torch.linalg.qr(image - known @ (known.T @ image)).Q
    # Once more: what is left of the last images may be round-off, in any direction.
    basis = torch.linalg.qr(basis).Q
    inside = torch.linalg.eigh(basis.T @ (gram @ basis)).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(basis @ inside).Q


def _few_of_small(gram: Tensor, rank: int, width: int) -> Tensor:
    """Return eigenvectors as the Krylov iteration does: in NumPy, whose calls cost less, and ``float64``.

    Blocks are made orthogonal each for itself, every second time, and all together at the end.
    """
    matrix = gram.double().numpy()
    block = torch.randn(len(gram), width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    blocks = [block]
    for step in range(_SHORT):
        block = matrix @ block
        if step % 2:
            block = np.linalg.qr(block)[0]
        blocks.append(block)
    basis = np.linalg.qr(np.concatenate(blocks, 1))[0]
    inside = np.linalg.eigh(basis.T @ (matrix @ basis))[1][:, : -rank - 1 : -1]
    return torch.from_numpy(basis @ inside).to(gram.dtype)


def _gram(wide: Tensor) -> Tensor:
    """Return ``A A^T``, of whose symmetric half about is computed."""
    if len(wide) <= _PANEL:
        return wide @ wide.T
    gram = wide.new_empty(len(wide), len(wide))
    for begin in range(0, len(wide), _PANEL):
        panel = wide[begin : begin + _PANEL]
        end = begin + len(panel)
        gram[begin:end, :end] = panel @ wide[:end].T
        gram[:begin, begin:end] = gram[begin:end, :begin].T
    return gram


def times_few(matrix: Tensor, thin: Tensor) -> Tensor:
    """Return the product of a matrix, shape (n, m), and one of few columns, shape (m, r).

    Column by column on a CPU, whose general product is slow at it, and each is a pass over the matrix.
    """
    if matrix.device.type != "cpu" or thin.shape[1] > 4:
        return matrix @ thin
    return torch.stack([matrix.mv(column) for column in thin.T.contiguous()], 1)
