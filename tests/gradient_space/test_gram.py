"""What follows from inner products alone equals what the vectors themselves give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from lightning_lbgm.gradient_space import gram as grams

CENTERS = [None, "entries", "epochs"]


@st.composite
def stacks(draw):
    """Draw T vectors of length M: of low rank, with a mean, and some of them zero."""
    count, length, rank = draw(st.integers(1, 7)), draw(st.integers(2, 40)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vectors = rng.normal(size=(count, rank)) @ rng.normal(size=(rank, length)) + draw(st.sampled_from([0.0, 1.0]))
    vectors[rng.random(count) < 0.15] = 0
    return vectors


def center(vectors, how):
    if how is None:
        return vectors
    return vectors - vectors.mean(1 if how == "entries" else 0, keepdims=True)


def analysed(vectors, how):
    gram, sums = vectors @ vectors.T, vectors.sum(1)
    return gram, *grams.centered(gram, sums, np.array(float(vectors.shape[1])), how)


@given(stacks(), st.sampled_from(CENTERS), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_components_are_those_of_the_singular_values_squared(vectors, how, share):
    variances = np.linalg.svd(center(vectors, how), compute_uv=False) ** 2
    count = int(grams.num_components(grams.explained(*analysed(vectors, how)[1::-1]), share))
    if variances.sum() <= 1e-11 * (vectors**2).sum():
        assert count == 0
        return
    explained = np.cumsum(variances) / variances.sum()
    # The least number that explains the share, where rounding does not decide.
    assert explained[count - 1] >= share - 1e-9
    assert count == 1 or explained[count - 2] < share + 1e-9


@given(stacks(), st.sampled_from([0.9, 0.99]))
def test_centering_on_entries_is_sklearns_pca_with_epochs_as_features(vectors, share):
    """As the authors' code does it: entries are the samples, so each epoch's mean over entries is subtracted."""
    gram, centered, _ = analysed(vectors, "entries")
    if np.trace(centered) <= 1e-11 * np.trace(gram):
        return
    ratios = PCA().fit(vectors.T).explained_variance_ratio_
    explained = grams.explained(centered, gram)
    np.testing.assert_allclose(explained[: len(ratios)], np.cumsum(ratios)[: len(explained)], atol=1e-9)


@given(stacks())
def test_centering_on_epochs_is_sklearns_pca_with_epochs_as_samples(vectors):
    gram, centered, _ = analysed(vectors, "epochs")
    if np.trace(centered) <= 1e-11 * np.trace(gram):
        return
    ratios = PCA().fit(vectors).explained_variance_ratio_
    explained = grams.explained(centered, gram)
    np.testing.assert_allclose(explained[: len(ratios)], np.cumsum(ratios)[: len(explained)], atol=1e-9)


@given(stacks(), st.sampled_from(CENTERS), st.sampled_from([0.5, 0.95]))
def test_principal_cosines_are_those_with_the_right_singular_vectors(vectors, how, share):
    gram, centered, cross = analysed(vectors, how)
    got = grams.principal_cosines(gram, centered, cross, share)
    _, values, directions = np.linalg.svd(center(vectors, how), full_matrices=False)
    norms = np.linalg.norm(vectors, axis=1)
    want = (directions @ vectors.T)[: len(got)] / np.where(norms > 0, norms, np.inf)
    # Directions of nearly equal variance may be mixed: compare those that stand apart.
    gaps = np.abs(np.subtract.outer(values**2, values**2)) + np.eye(len(values)) * values[0] ** 2
    for j in range(len(got)):
        if gaps[j].min() > 1e-3 * values[0] ** 2:
            np.testing.assert_allclose(np.abs(got[j]), np.abs(want[j]), atol=1e-6)


@given(stacks())
def test_cosines_are_the_vectors_own_and_zero_with_zeros(vectors):
    got = grams.cosines(vectors @ vectors.T)
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            size = np.linalg.norm(a) * np.linalg.norm(b)
            assert got[i, j] == pytest.approx(a @ b / size if size > 0 else 0.0, abs=1e-9)
    assert np.abs(got).max() <= 1


@given(stacks(), st.sampled_from([0.0, 0.5, 0.9]))
def test_momentum_is_that_of_the_vectors(vectors, momentum):
    mixed, last = [], np.zeros(vectors.shape[1])
    for vector in vectors:
        last = momentum * last + vector
        mixed.append(last)
    mixed = np.array(mixed)
    gram, sums = grams.with_momentum(vectors @ vectors.T, vectors.sum(1), momentum)
    np.testing.assert_allclose(gram, mixed @ mixed.T, atol=1e-8 * (1 + np.abs(gram).max()))
    np.testing.assert_allclose(sums, mixed.sum(1), atol=1e-8 * (1 + np.abs(sums).max()))


def test_components_by_hand():
    """Orthogonal vectors of squared lengths 90, 6, 3 and 1: shares 0.9, 0.96, 0.99 and 1."""
    gram = np.diag([3.0, 90.0, 1.0, 6.0])
    explained = grams.explained(gram, gram)
    counts = [int(grams.num_components(explained, share)) for share in (0.5, 0.9, 0.91, 0.95, 0.99, 0.995, 1.0)]
    assert counts == [1, 1, 2, 2, 3, 4, 4]


def test_each_matrix_of_a_stack_is_analysed_alone():
    gram = np.stack([np.diag([1.0, 1.0, 1.0]), np.diag([98.0, 1.0, 1.0]), np.zeros((3, 3))])
    assert grams.num_components(grams.explained(gram, gram), 0.95).tolist() == [3, 1, 0]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, 95])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"`share` must lie in \(0, 1\]"):
        grams.num_components(np.ones(1), share)
