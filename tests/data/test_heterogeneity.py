"""Numbers of a partition's heterogeneity, against small cases by hand and by enumeration."""

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lbgm.data import count_labels, heterogeneity


def test_two_clients_by_hand():
    # p_0 = (3/4, 1/4), p_1 = (0, 1), p = (3/6, 3/6): distances 1/4 and 1/2.
    found = heterogeneity([4, 2], [[3, 1], [0, 2]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found == pytest.approx(
        {
            "clients": 2,
            "size_min": 2,
            "size_max": 4,
            "size_cv": 1 / 3,  # standard deviation 1, mean 3
            "labels": 2,
            "label_distance_mean": 0.375,
            "label_distance_max": 0.5,
            "label_distance_chance": float(chance([4, 2], [3, 3])),
            "labels_effective_mean": (math.exp(entropy) + 1) / 2,
            "labels_effective": 2,
        }
    )


def chance(sizes, totals):
    """Mean distance over every way to draw each client's examples, in exact numbers."""
    labels = [label for label, total in enumerate(totals) for _ in range(total)]
    n = len(labels)
    means = []
    for m in sizes:
        draws = [
            sum(abs(Fraction(draw.count(c), m) - Fraction(t, n)) for c, t in enumerate(totals)) / 2
            for draw in itertools.combinations(labels, m)
        ]
        means.append(sum(draws) / len(draws))
    return sum(means) / len(means)


@pytest.mark.parametrize(
    ("sizes", "totals"),
    [
        ([4, 2], [3, 3]),
        ([5, 3, 1], [2, 6, 1]),
        ([8], [5, 3]),
        ([1] * 6, [2, 2, 2]),
        ([3, 3, 2], [1] * 8),
        ([4, 4], [8]),
    ],
)
def test_the_distance_by_chance_is_the_mean_over_all_draws(sizes, totals):
    # Any counts of these sizes and totals: the first clients take the first labels.
    labels = [label for label, total in enumerate(totals) for _ in range(total)]
    parts = np.split(np.arange(len(labels)), np.cumsum(sizes)[:-1])
    counts, _ = count_labels(parts, labels)
    found = heterogeneity(sizes, counts)["label_distance_chance"]
    assert found == pytest.approx(float(chance(sizes, totals)), abs=1e-12)


def test_clients_drawn_at_random_have_the_distance_of_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 4000)
    parts = np.split(rng.permutation(4000), np.cumsum([10] * 100 + [40] * 50)[:-1])
    found = heterogeneity([len(part) for part in parts], count_labels(parts, labels)[0])
    assert found["label_distance_mean"] == pytest.approx(found["label_distance_chance"], rel=0.05)


@given(
    st.integers(1, 6).flatmap(
        lambda c: st.lists(st.lists(st.integers(0, 30), min_size=c, max_size=c), min_size=1, max_size=8)
    )
)
def test_numbers_are_in_their_ranges_and_do_not_depend_on_the_order(counts):
    grid = np.array(counts)
    if grid.sum() == 0:
        return
    found = heterogeneity(grid.sum(1), grid)
    used = int((grid.sum(0) > 0).sum())
    assert 0 <= found["label_distance_mean"] <= found["label_distance_max"] + 1e-12 <= 1 + 1e-9
    assert -1e-12 <= found["label_distance_chance"] <= 1
    assert 1 - 1e-9 <= found["labels_effective_mean"] <= used + 1e-9
    assert found["labels"] == used
    assert 0 <= found["size_cv"] <= math.sqrt(len(grid))
    turned = grid[::-1, ::-1]
    assert heterogeneity(turned.sum(1), turned) == pytest.approx(found)


def test_counts_are_those_of_each_client_and_labels_sorted():
    counts, labels = count_labels([torch.tensor([0, 3]), [1], []], np.array(["b", "a", "unused", "a"]))
    assert labels.tolist() == ["a", "b"]
    assert counts.tolist() == [[1, 1], [1, 0], [0, 0]]
    # A client without examples is left out of what is about labels.
    assert heterogeneity([2, 1, 0], counts)["label_distance_max"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("sizes", "counts", "message"),
    [
        ([], None, "`sizes` must hold the number of examples of each client"),
        ([0, 0], None, "with one example at least"),
        ([[1, 2]], None, r"shape \(K,\)"),
        ([1, -1], None, "`sizes`"),
        ([1, 2], [[1], [1], [1]], r"each of the 2 clients, shape \(K, C\).*shape \(3, 1\)"),
        ([1, 2], [1, 2], r"got the shape \(2,\)"),
        ([1, 2], [[0, 0], [0, 0]], "with one example at least"),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(sizes, counts, message):
    with pytest.raises(ValueError, match=message):
        heterogeneity(sizes, counts)


def test_the_metrics_page_lists_them():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    listed = re.findall(r"^\| `partition/(\w+)`", page, re.MULTILINE)
    assert listed == list(heterogeneity([1], [[1]]))
