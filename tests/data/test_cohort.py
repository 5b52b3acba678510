"""Which clients take part in a round."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.data import resolve_cohort_size, sample_cohort


@pytest.mark.parametrize(
    ("num_clients", "clients_per_round", "expected"),
    [
        (7, None, 7),
        (7, 1, 1),
        (7, 7, 7),
        (7, 1.0, 7),  # a float is a share, even 1.0
        (50, 0.3, 15),
        (10, 0.26, 3),  # 2.6 rounds up
        (10, 0.24, 2),  # 2.4 rounds down
        (10, 0.001, 1),  # at least one
        (1, 0.5, 1),
    ],
)
def test_cohort_size_follows_the_rule(num_clients, clients_per_round, expected):
    size = resolve_cohort_size(num_clients, clients_per_round)
    assert size == expected
    assert type(size) is int


@pytest.mark.parametrize("wrong", [0, -1, 8, 0.0, -0.5, 1.01, 5.0, math.nan, math.inf, True, False, "3", [3]])
def test_a_cohort_size_out_of_range_or_of_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match="clients_per_round"):
        resolve_cohort_size(7, wrong)


@given(st.data(), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_a_cohort_is_drawn_without_replacement_and_sorted(data, num_clients, seed, round_index):
    size = data.draw(st.integers(1, num_clients))
    cohort = sample_cohort(num_clients, size, seed, round_index)
    assert len(cohort) == size
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(range(num_clients))
    assert all(type(client_id) is int for client_id in cohort)
    assert cohort == sample_cohort(num_clients, size, seed, round_index)


def test_a_cohort_depends_on_nothing_but_its_arguments():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample_cohort(30, 4, seed=5, round_index=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample_cohort(30, 4, seed=5, round_index=2) == first


def test_a_full_cohort_is_everyone():
    assert sample_cohort(6, 6, seed=0, round_index=0) == (0, 1, 2, 3, 4, 5)


def test_cohorts_change_with_the_round_and_with_the_seed():
    # Two independent draws of 10 out of 100 coincide with probability 1 / C(100, 10), about 6e-14.
    cohorts = {sample_cohort(100, 10, seed, t) for seed in (0, 1) for t in range(20)}
    assert len(cohorts) == 40


def test_every_client_and_every_pair_is_drawn_equally_often():
    num_clients, size, rounds = 8, 3, 2000
    cohorts = [sample_cohort(num_clients, size, seed=3, round_index=t) for t in range(rounds)]
    singles = Counter(k for cohort in cohorts for k in cohort)
    pairs = Counter((a, b) for cohort in cohorts for a in cohort for b in cohort if a < b)
    # Hypergeometric: P(client) = 3/8, P(pair) = (3 * 2) / (8 * 7). Five standard deviations of the count's binomial.
    for counts, keys, p in ((singles, num_clients, 3 / 8), (pairs, 28, 6 / 56)):
        assert len(counts) == keys
        tolerance = 5 * math.sqrt(rounds * p * (1 - p))
        assert all(abs(count - rounds * p) < tolerance for count in counts.values())
