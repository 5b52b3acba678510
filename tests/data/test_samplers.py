"""Samplers: with which probabilities clients are drawn, and what a sampler learns."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from lightning_lbgm import PowerOfChoice, SizeSampler, UniformSampler
from lightning_lbgm.data import Draw, Participation, sample_cohort
from lightning_lbgm.data.samplers import as_sampler

ROUNDS = 2000


def draw(round_index=0, clients=(0, 1, 2, 3), size=2, sizes=(10, 20, 30, 40), num_clients=4, seed=3):
    return Draw(round_index, tuple(clients), size, num_clients, sizes.__getitem__, seed)


def orders_by_size(sizes, clients):
    """Yield each order in which clients are drawn one after the other by size, and its probability."""
    for order in itertools.permutations(clients):
        left, probability = sum(sizes[k] for k in clients), 1.0
        for k in order:
            probability *= sizes[k] / left
            left -= sizes[k]
        yield order, probability


def assert_drawn_as_often(counts, probabilities):
    """Compare with five standard deviations of a count's binomial."""
    for k, p in probabilities.items():
        assert abs(counts[k] - ROUNDS * p) < 5 * math.sqrt(ROUNDS * p * (1 - p)) + 1e-9, (k, counts[k], ROUNDS * p)


def test_uniform_cohorts_are_those_without_a_sampler():
    for t in range(20):
        everyone = draw(t, range(30), 4, [1] * 30, 30)
        assert UniformSampler().sample(everyone, {}) == sample_cohort(30, 4, seed=3, round_index=t)


def test_uniform_cohorts_of_the_available_clients_are_uniform():
    cohorts = [UniformSampler().sample(draw(t, (1, 4, 6, 7, 9), 2, [1] * 10, 10), {}) for t in range(ROUNDS)]
    assert_drawn_as_often(Counter(k for c in cohorts for k in c), dict.fromkeys((1, 4, 6, 7, 9), 2 / 5))
    assert_drawn_as_often(Counter(cohorts), dict.fromkeys(itertools.combinations((1, 4, 6, 7, 9), 2), 1 / 10))


@pytest.mark.parametrize("clients", [(0, 1, 2, 3), (1, 2, 3)])
def test_sampling_by_size_draws_one_after_the_other_in_proportion(clients):
    sizes = (10, 20, 30, 400)
    drawn = [SizeSampler().sample(draw(t, clients, 2, sizes), {}) for t in range(ROUNDS)]
    included, firsts = Counter(), Counter()
    for order, probability in orders_by_size(sizes, clients):
        firsts[order[0]] += probability
        for k in order[:2]:
            included[k] += probability
    assert firsts[3] == pytest.approx(400 / sum(sizes[k] for k in clients))
    assert_drawn_as_often(Counter(k for cohort in drawn for k in cohort), included)
    assert_drawn_as_often(Counter(cohort[0] for cohort in drawn), firsts)


def test_a_draw_is_a_pure_function_of_seed_and_round():
    for sampler in (SizeSampler(), UniformSampler(), PowerOfChoice(3)):
        one, other = (tuple(sampler.sample(draw(5), sampler.init())) for _ in range(2))
        assert one == other
        drawn = [tuple(sampler.sample(draw(t, seed=s), sampler.init())) for s in (3, 4) for t in range(20)]
        assert len(set(drawn)) > 2


def test_power_of_choice_takes_the_candidates_with_the_largest_losses():
    """By hand: with d of everybody, those with the largest last losses; who has none comes before them."""
    everyone = PowerOfChoice(4)
    assert set(everyone.sample(draw(), {"losses": {0: 0.5, 1: 2.0, 2: 1.0, 3: 1.5}})) == {1, 3}
    assert everyone.sample(draw(), {"losses": {0: 0.5, 1: 2.0, 3: 1.5}}) == [2, 1]
    assert everyone.sample(draw(clients=(0, 1, 3)), {"losses": {0: 0.5, 1: 2.0, 3: 1.5}}) == [1, 3]
    assert everyone.sample(draw(), {"losses": {0: 0.5, 1: -math.inf, 2: 0.1, 3: -math.inf}}) == [0, 2]


def test_power_of_choice_draws_its_candidates_by_size():
    """The largest of two candidates: client k wins if it is drawn and no candidate has a larger loss."""
    sizes, losses = (10, 20, 30, 40), {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}
    expected = Counter()
    for order, probability in orders_by_size(sizes, range(4)):
        expected[max(order[:2], key=losses.__getitem__)] += probability
    drawn = Counter(PowerOfChoice(2).sample(draw(t, size=1), {"losses": losses})[0] for t in range(ROUNDS))
    assert drawn[3] == expected[3] == 0  # the smallest loss never wins
    assert_drawn_as_often(drawn, expected)


def test_equal_losses_are_taken_in_the_order_of_the_draw():
    firsts = Counter(PowerOfChoice(4).sample(draw(t, size=1), {"losses": {}})[0] for t in range(ROUNDS))
    assert_drawn_as_often(firsts, {k: size / 100 for k, size in enumerate((10, 20, 30, 40))})


def test_power_of_choice_remembers_the_last_losses_and_leaves_the_state_before_as_it_was():
    sampler = PowerOfChoice(2)
    before = sampler.init()
    after = sampler.end_round(before, {1: 0.5, 2: math.nan})
    later = sampler.end_round(after, {1: 0.25, 3: math.inf})
    assert before == {"losses": {}}
    assert after == {"losses": {1: 0.5, 2: -math.inf}}
    assert later == {"losses": {1: 0.25, 2: -math.inf, 3: -math.inf}}


def test_what_is_no_sampler_is_refused():
    with pytest.raises(TypeError, match=r"PowerOfChoice is a class: write PowerOfChoice\(d=20\)"):
        as_sampler(PowerOfChoice)
    with pytest.raises(TypeError, match=r"must be a `Sampler` such as.*got 'uniform'"):
        as_sampler("uniform")
    with pytest.raises(ValueError, match=r"PowerOfChoice\(d=\.\.\.\)` must be at least 1"):
        PowerOfChoice(0)
    participation = Participation(PowerOfChoice(5), over_select=1.3)
    participation.check_size(None, None)
    participation.check_size(3, 10)
    with pytest.raises(ValueError, match=r"d=5.*fewer candidates than the 6 clients.*d=6 or more"):
        participation.check_size(4, 10)
