"""Top-k and random subsets against plain definitions, above all where a sample misleads."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.core import selection
from lightning_lbgm.core.blocks import block_size
from lightning_lbgm.core.selection import largest, random_subset

BLOCK = block_size(torch.empty(0))
seeds = st.integers(0, 2**32 - 1)


def plain(values, k):
    """The definition: by decreasing magnitude, then by index."""
    magnitudes = np.abs(values.double().numpy())
    return sorted(np.lexsort((np.arange(len(magnitudes)), -magnitudes))[:k].tolist())


def vector(kind, size, rng):
    normal = rng.normal(size=size)
    return {
        "normal": normal,
        "ties": np.round(normal * 2),
        "few values": rng.choice([-1.0, 0.0, 1.0], size=size, p=[0.01, 0.98, 0.01]),
        "zeros": np.zeros(size),
        "mostly zero": np.where(rng.random(size) < 0.005, normal, 0.0),
        "heavy tail": normal**9 * 1e-3,
        "one block": np.where(np.arange(size) < size // 50, normal * 100, normal),  # large ones where few are sampled
        "periodic": normal * (np.arange(size) % 66 == 5),
        "extremes": np.where(rng.random(size) < 0.5, 1e-30, 1e30) * normal,
    }[kind]


KINDS = ["normal", "ties", "few values", "zeros", "mostly zero", "heavy tail", "one block", "periodic", "extremes"]


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=seeds,
    size=st.sampled_from([1, 5, 300, 4095, 4096, 9_001, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]),
    share=st.sampled_from([0.0, 1e-6, 0.01, 0.03, 0.3, 0.5, 0.999, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=12)
def test_the_largest_are_those_of_the_definition(kind, seed, size, share, dtype):
    values = torch.tensor(vector(kind, size, np.random.default_rng(seed)), dtype=dtype)
    for k in {min(size, max(1, round(share * size))), min(size, 1)}:
        found = largest(values, k)
        assert found.dtype == torch.int64
        assert found.tolist() == plain(values, k)


@given(seed=seeds, size=st.integers(1, 200), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=30)
def test_the_largest_of_smaller_formats_and_on_accelerators_have_the_same_definition(seed, size, dtype):
    values = torch.tensor(np.random.default_rng(seed).normal(size=size).round(1), dtype=dtype)
    k = seed % size + 1
    assert largest(values, k).tolist() == plain(values, k)


@pytest.mark.parametrize("guess", [math.inf, math.nan, 0.0])
def test_a_misleading_sample_changes_nothing(guess, monkeypatch):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(selection, "_lower_bound", lambda numbers, k: guess)
    assert largest(values, 600).tolist() == plain(values, 600)


def test_a_sample_leaves_few_candidates():
    numbers = np.random.default_rng(0).normal(size=1_000_000)
    for k in (1, 1000, 30_000, 500_000):
        reached = int((np.abs(numbers) >= selection._lower_bound(numbers, k)).sum())
        assert k <= reached <= 1.2 * k + 3000


@given(seed=seeds, size=st.sampled_from([1, 2, 7, 4095, 4096, 5000, 70_000]), share=st.floats(0, 1))
@settings(max_examples=60)
def test_a_random_subset_has_k_different_indices_and_follows_from_the_seed(seed, size, share):
    k = round(share * size)
    one, two = (random_subset(size, k, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.int64
    indices = one.tolist()
    assert indices == sorted(set(indices))
    assert len(indices) == k
    assert not indices or (indices[0] >= 0 and indices[-1] < size)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_every_subset_is_as_likely_as_any_other(k, monkeypatch):
    # Drawn with repetition down to 5 entries, which has all branches: the complement, too many and too few draws.
    monkeypatch.setattr(selection, "_SMALL", 5)
    monkeypatch.setattr(selection, "_DEVIATIONS", 0)  # several rounds of draws
    generator, draws = torch.Generator().manual_seed(k), 4000
    found = Counter(tuple(random_subset(5, k, generator).tolist()) for _ in range(draws))
    subsets = list(itertools.combinations(range(5), k))
    expected = draws / len(subsets)
    assert set(found) == set(subsets)
    chi_squared = sum((found[subset] - expected) ** 2 / expected for subset in subsets)
    degrees = len(subsets) - 1
    assert chi_squared <= degrees + 5 * math.sqrt(2 * max(1, degrees))


@pytest.mark.parametrize(("size", "k"), [(5000, 500), (5000, 2400), (5000, 4500), (4097, 1)])
def test_every_entry_is_chosen_as_often_as_any_other(size, k):
    generator, draws = torch.Generator().manual_seed(1), 300
    counts = np.zeros(size)
    for _ in range(draws):
        counts[random_subset(size, k, generator).numpy()] += 1
    share = k / size
    deviation = math.sqrt(draws * share * (1 - share))
    # The halves, of which one may lack what the power of two above the size has beyond it.
    for half in (counts[: size // 2], counts[size // 2 :]):
        assert half.mean() == pytest.approx(draws * share, abs=5 * deviation / math.sqrt(len(half)) + 1e-9)
    assert counts.max() <= draws * share + 6 * deviation + 3
