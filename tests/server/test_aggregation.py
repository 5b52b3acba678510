"""Aggregation rules: the weighted mean, the coordinate-wise median, and a rule of one's own in a fit."""

import math

import numpy as np
import pytest
import torch
from conftest import flat_params
from hypothesis import given
from hypothesis import strategies as st

from lightning_lbgm import LBGMFederated
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.server import Aggregator, CoordinateMedian, WeightedMean


def aggregate(rule, updates, cohort_size=None, weights=None):
    updates = [torch.as_tensor(update, dtype=torch.float32) for update in updates]
    rule.begin(torch.empty_like(updates[0]), cohort_size or len(updates))
    for update, weight in zip(updates, weights or [1 / len(updates)] * len(updates)):
        rule.receive(Dense(update), weight)
        update.fill_(math.nan)  # it is valid during the call alone
    return rule.finish()


class TwoRanks:
    """The other rank has received ``rows``; what this one sends to it is answered with its part."""

    rank, size = 0, 2

    def __init__(self, rows):
        self.rows = rows

    def all_reduce_sum(self, tensor):
        tensor.add_(self.rows.sum(0))

    def gather(self, value, purpose):
        if isinstance(value, int):
            return [value, len(self.rows)]
        start = int(purpose.split()[-2])
        return [value, self.rows[:, start : start + value.shape[1]]]


matrices = st.integers(1, 7).flatmap(
    lambda rows: st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=rows, max_size=rows
    )
)


@given(matrices, st.integers(1, 200))
def test_the_median_is_that_of_each_coordinate_however_little_memory_there_is(updates, memory):
    found = aggregate(CoordinateMedian(memory=memory), updates)
    np.testing.assert_allclose(found.numpy(), np.median(np.float32(updates), axis=0), rtol=1e-6, atol=1e-6)


def test_a_minority_of_wrong_updates_does_not_move_the_median():
    # Of 1, 2, 3 and twice 1e30 the third smallest is 3.
    found = aggregate(CoordinateMedian(), [[1.0], [1e30], [3.0], [2.0], [1e30]])
    assert found.tolist() == [3.0]


def test_a_rule_starts_afresh_each_round_and_counts_only_what_arrived():
    rule = CoordinateMedian()
    assert aggregate(rule, [[5.0], [7.0], [9.0]]).tolist() == [7.0]
    assert aggregate(rule, [[1.0], [3.0]], cohort_size=4).tolist() == [2.0]
    rule.begin(torch.zeros(1), 3)
    assert rule.finish() is None


@pytest.mark.parametrize("memory", [8, 2**20])
def test_the_median_of_two_ranks_is_that_of_all_updates(memory):
    # 1, 2, 9 here and 4, 5 there: the median is 4; of the second coordinate, 0, 0, 0 and 1, 1, it is 0.
    rule = CoordinateMedian(memory=memory)
    rule.begin(torch.empty(2), 5)
    for value in (1.0, 2.0, 9.0):
        rule.receive(Dense(torch.tensor([value, 0.0])), 0.2)
    rule.merge(TwoRanks(torch.tensor([[4.0, 1.0], [5.0, 1.0]])), [0.2] * 5)
    assert rule.finish().tolist() == [4.0, 0.0]


def test_the_mean_of_two_ranks_is_that_of_all_updates():
    # 0.25 (4, 0) here and 0.75 (0, 8) there.
    mean = WeightedMean()
    mean.begin(torch.empty(2), 2)
    mean.receive(Sparse(torch.tensor([4.0]), torch.tensor([0]), (2,)), 0.25)
    mean.merge(TwoRanks(torch.tensor([[0.0, 6.0]])), [0.25, 0.75])
    assert mean.finish().tolist() == [1.0, 6.0]


class Largest(Aggregator):
    """The update of the largest norm, as an example of a rule."""

    def begin(self, like, cohort_size):
        self.best = None

    def receive(self, update, weight):
        if self.best is None or update.dense().norm() > self.best.norm():
            self.best = update.dense().clone()

    def merge(self, ranks, weights):
        self.best = max(ranks.gather(self.best, "the largest update"), key=torch.norm)

    def finish(self):
        return self.best


def test_a_fit_follows_the_rule_that_it_is_given(fit):
    # With one client a round all rules agree; with several the largest update is another than the mean.
    def run(rule, cohort):
        strategy = LBGMFederated(4, uplink=[], clients_per_round=cohort, seed=0, aggregation=rule)
        return flat_params(fit(strategy=strategy)[1])

    assert torch.equal(run(Largest(), 1), run(None, 1))
    assert torch.equal(run(CoordinateMedian(), 1), run(WeightedMean(), 1))
    assert not torch.allclose(run(Largest(), 4), run(None, 4))
    # Of two updates the median is the mean; weights are equal here.
    torch.testing.assert_close(run(CoordinateMedian(), 2), run(None, 2))


def test_what_is_no_rule_is_refused_by_name():
    with pytest.raises(TypeError, match="`aggregation` must be an `Aggregator` such as `WeightedMean"):
        LBGMFederated(aggregation="median")
    with pytest.raises(TypeError, match="aggregation"):
        LBGMFederated(aggregation=CoordinateMedian)
