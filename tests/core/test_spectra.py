"""Leading singular directions against NumPy's singular value decomposition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.core.spectra import leading_directions, times_few

seeds = st.integers(0, 2**32 - 1)
SHAPES = [(1, 1), (3, 3), (40, 64), (65, 70), (128, 300), (129, 200), (200, 900), (300, 300)]
SPECTRA = {
    "noise": None,
    "harmonic": lambda i: 1 / i,
    "geometric": lambda i: 0.8**i,
    "three alike": lambda i: np.where(i <= 3, 1.0, 1e-4),
    "rank one": lambda i: np.where(i <= 1, 1.0, 0.0),
    "zero": lambda i: 0.0 * i,
    "alike": lambda i: 1.0 + 0.0 * i,
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seed=seeds, rank=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=3)
def test_what_is_left_is_as_small_as_with_the_singular_vectors(name, shape, seed, rank, dtype):
    rank = min(rank, shape[0])
    matrix = np.random.default_rng(seed).normal(size=shape)
    if SPECTRA[name] is not None:
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        matrix = (u * SPECTRA[name](np.arange(1.0, shape[0] + 1))) @ vt
    best = float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())  # Eckart and Young
    found = leading_directions(torch.tensor(matrix, dtype=dtype), rank)
    assert found.dtype == dtype
    assert found.shape == (shape[0], rank)
    directions = found.double().numpy()
    np.testing.assert_allclose(directions.T @ directions, np.eye(rank), atol=1e-5)
    left = float(((matrix - directions @ (directions.T @ matrix)) ** 2).sum())
    assert left <= best * 1.001 + 1e-6 * float((matrix**2).sum())


def test_the_same_matrix_has_the_same_directions_whatever_was_drawn_before():
    matrix = torch.randn(200, 300)
    first = leading_directions(matrix, 2)
    torch.randn(17)
    assert torch.equal(leading_directions(matrix, 2), first)


@given(seed=seeds, rows=st.integers(1, 20), columns=st.integers(1, 20), few=st.integers(1, 6))
@settings(max_examples=30)
def test_a_product_with_few_columns_is_the_product(seed, rows, columns, few):
    rng = np.random.default_rng(seed)
    matrix, thin = rng.normal(size=(rows, columns)), rng.normal(size=(columns, few))
    np.testing.assert_allclose(times_few(torch.tensor(matrix), torch.tensor(thin)).numpy(), matrix @ thin, rtol=1e-9)
