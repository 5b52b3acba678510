"""ATOMO, singular value sparsification: a matrix as the sum of some of its singular components.

Wang, Sievert, Liu, Charles, Papailiopoulos, Wright: "ATOMO: Communication-efficient Learning via Atomic
Sparsification", NeurIPS 2018 (arXiv 1806.04090).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, Stage, State
from lightning_lbgm.core.spectra import leading_directions, times_few
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.low_rank import factorize

__all__ = ["ATOMO", "keep_probabilities"]


class ATOMO(Stage):
    """Send ``rank`` singular components of each parameter matrix; vectors go whole.

    ``rank * (n + m)`` numbers for a matrix of shape (n, m), with convolution kernels of shape (out, in, kh, kw) taken
    as (out, in * kh * kw). A matrix that this would not make smaller goes whole. Of matrices with more than 64 rows
    and columns the largest components are found by iteration, see ``leading_directions``.

    Args:
        rank: Components to send (in the mean, if ``sampling`` is ``"unbiased"``). The paper on LBGM compares with 2.
        sampling: ``"top"``: the largest ones, biased, so wrap it in ``ErrorFeedback``; ``"unbiased"``: at random, each
            with a probability proportional to its singular value as far as that is at most 1 (the choice of smallest
            variance), divided by it.

    Raises:
        TypeError: If ``rank`` is not a whole number.
        ValueError: If it is not positive, or ``sampling`` is unknown.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> update = Dense(torch.outer(torch.arange(1.0, 7.0), torch.ones(5)).reshape(-1), [(6, 5)])
        >>> payload = ATOMO(rank=1).encode(update, {}).payload
        >>> torch.allclose(payload.dense(), update.dense(), atol=1e-5), payload.num_bits < update.num_bits
        (True, True)
    """

    def __init__(self, rank: int, sampling: Literal["top", "unbiased"] = "top") -> None:
        self.rank = check_count("ATOMO", "rank", rank)
        if sampling not in ("top", "unbiased"):
            raise ValueError(
                "`ATOMO(sampling=...)` must be 'top' (the largest components) or 'unbiased' (chosen at random); got"
                f" {sampling!r}."
            )
        self.sampling = sampling

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        generator = context.generator(update.device) if self.sampling == "unbiased" else None

        def factor(index: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
            wide = matrix.shape[0] < matrix.shape[1]
            if self.sampling == "top":
                basis = leading_directions(matrix if wide else matrix.T, self.rank)
                scaled = (basis.T @ matrix).T if wide else times_few(matrix, basis)
            else:
                scaled, basis = _components(matrix.T if wide else matrix)
                probabilities = keep_probabilities(torch.linalg.vector_norm(scaled, dim=0), self.rank)
                kept = torch.empty_like(probabilities).uniform_(generator=generator) < probabilities
                scaled, basis = scaled[:, kept] / probabilities[kept], basis[:, kept]
                scaled, basis = scaled.to(matrix.dtype), basis.to(matrix.dtype)
            return (basis, scaled) if wide else (scaled, basis)

        return Encoded(factorize(update, self.rank, factor))


def keep_probabilities(values: Tensor, budget: int) -> Tensor:
    """Return with which probability to keep each atom: proportional to its weight, at most 1, ``budget`` in sum.

    This is the paper's Algorithm 1: if the proportional probability of the largest exceeds 1 it is kept for sure,
    and the rest of the budget is spent on the others.

    Args:
        values: Weights of the atoms, decreasing, at least 0.
        budget: Atoms to keep in the mean; all with a weight are kept if there are no more.

    Examples:
        >>> keep_probabilities(torch.tensor([8.0, 1.0, 1.0]), budget=2).tolist()
        [1.0, 0.5, 0.5]
    """
    probabilities = (values > 0).to(values.dtype)
    # What is left from each on. On the CPU, because CUDA has no deterministic cumsum of floats.
    rests = values.cpu().flip(0).cumsum(0).flip(0)
    for sure in range(min(budget, values.numel())):
        if float(rests[sure]) <= 0:
            break
        if (budget - sure) * float(values[sure]) <= float(rests[sure]):
            probabilities[sure:] = values[sure:] * ((budget - sure) / rests[sure])
            break
    return probabilities.clamp_(max=1)


def _components(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular components of a tall matrix A as ``A V`` and V in ``float64``, largest first.

    V is from the eigenvectors of ``A^T A``, many times faster than an SVD. ``(A V) V^T`` is A for any orthonormal V, so
    the squared condition number costs no accuracy of the sum, only of the order among components near round-off.
    """
    tall = matrix.double()
    basis = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)
    return tall @ basis, basis
