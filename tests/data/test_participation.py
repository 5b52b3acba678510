"""Who takes part in a round: availability, over-selection, deadlines and drop-outs."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm import Dropout, PowerOfChoice, SizeSampler, UniformSampler
from lightning_lbgm.data import Participation, Turnout, sample_cohort

ROUNDS = 1000


class Clients:
    """A feed without data: what participation asks of it."""

    def __init__(self, num_clients=10, seed=1, names=None, steps=None):
        self.num_clients, self.seed, self.client_names = num_clients, seed, names
        self.steps = steps or [1 + k for k in range(num_clients)]

    def num_examples(self, client_id):
        return 10 + client_id

    def num_steps(self, client_id):
        return self.steps[client_id]


def turnouts(cohort_size=4, rounds=ROUNDS, feed=None, **rules):
    participation, feed = Participation(**rules), feed or Clients()
    participation.check(feed, cohort_size)
    state = participation.sampler.init() if participation.sampler else {}
    return [participation.draw(t, feed, cohort_size, state) for t in range(rounds)]


def assert_share(flags, p):
    """Compare a share with a probability, by five standard deviations."""
    flags = list(flags)
    assert abs(np.mean(flags) - p) < 5 * math.sqrt(p * (1 - p) / len(flags)), (np.mean(flags), p)


def test_without_rules_cohorts_are_the_uniform_ones():
    assert turnouts(rounds=5) == [Turnout(sample_cohort(10, 4, 1, t)) for t in range(5)]
    assert turnouts(10, rounds=1) == [Turnout(tuple(range(10)))]
    assert [t.cohort for t in turnouts(rounds=5, sampler=UniformSampler(), availability=1.0)] == [
        sample_cohort(10, 4, 1, t) for t in range(5)
    ]


# Availability


def test_clients_are_available_with_the_probability_and_independently():
    drawn = turnouts(10, availability=0.3)
    present = np.array([[k in t.cohort for k in range(10)] for t in drawn], dtype=float)
    assert [t.num_available for t in drawn] == present.sum(1).tolist()
    for k in range(10):
        assert_share(present[:, k], 0.3)
        assert_share(present[:, k] * present[:, (k + 1) % 10], 0.09)  # another client in the same round
        assert_share(present[1:, k] * present[:-1, k], 0.09)  # the same client in the round before


def test_who_is_available_does_not_depend_on_how_many_clients_there_are():
    few, many = turnouts(5, 50, Clients(5), availability=0.5), turnouts(9, 50, Clients(9), availability=0.5)
    assert [t.cohort for t in few] == [tuple(k for k in t.cohort if k < 5) for t in many]


def test_a_function_says_who_is_available():
    drawn = turnouts(10, availability=lambda round_index, client_id: client_id > 7 or (client_id == 2) * 0.25)
    assert all(t.cohort in ((8, 9), (2, 8, 9)) for t in drawn)
    assert_share([2 in t.cohort for t in drawn], 0.25)


TABLE = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
SPANS = {0: [(0, 1)], 1: [(2, 3)], 2: [[0, 1]]}
SEEN = [(0, 2), (), (1,), (0, 2), (), (1,), (0, 2)]


@pytest.mark.parametrize(
    "trace",
    [
        TABLE,
        np.array(TABLE),
        torch.tensor(TABLE),
        np.array(TABLE, dtype=bool),
        SPANS,
        {str(k): v for k, v in SPANS.items()},
    ],
)
def test_a_trace_starts_again_when_it_ends(trace):
    drawn = turnouts(3, 7, Clients(3), availability=trace)
    assert [t.cohort for t in drawn] == SEEN
    assert [t.num_available for t in drawn] == [len(cohort) for cohort in SEEN]


@pytest.mark.parametrize("suffix", [".npy", ".csv", "spans.json", "table.json"])
def test_a_trace_may_lie_in_a_file(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    if suffix == ".npy":
        np.save(path, np.array(TABLE))
    elif suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in TABLE))
    else:
        path.write_text(json.dumps(SPANS if suffix == "spans.json" else TABLE))
    for given_as in (path, os.fspath(path)):
        assert [t.cohort for t in turnouts(3, 7, Clients(3), availability=given_as)] == SEEN


def test_a_trace_may_name_clients_that_have_names():
    feed = Clients(3, names=("a", "b", "c"))
    assert [t.cohort for t in turnouts(3, 7, feed, availability={"a": [(0, 1)], 1: [(2, 3)], "c": [(0, 1)]})] == SEEN


def test_fewer_available_clients_make_a_smaller_cohort():
    for t in turnouts(4, 300, availability=0.3):
        assert len(t.cohort) == min(4, t.num_available)


# Over-selection and deadlines


def test_the_fastest_of_the_chosen_count():
    for t in turnouts(4, 200, over_select=1.5):
        chosen = sorted((*t.cohort, *t.dropped))
        assert len(chosen) == 6
        assert list(t.cohort) == chosen[:4]  # client k needs k + 1 steps
        assert t.unreached == ()
        assert t.num_available == 10


@pytest.mark.parametrize(("factor", "chosen"), [(1.1, 11), (1.3, 13), (1.01, 11), (3.0, 20)])
def test_so_many_are_chosen(factor, chosen):
    assert Participation(over_select=factor).num_chosen(10, 20) == chosen
    assert len(turnouts(10, 1, Clients(20), over_select=factor)[0].dropped) == chosen - 10


def test_equally_fast_clients_are_as_likely_to_count():
    drawn = turnouts(5, feed=Clients(steps=[3] * 10), over_select=2.0)
    for k in range(10):
        assert_share([k in t.cohort for t in drawn], 0.5)
    assert len({t.cohort for t in drawn}) > 200  # of 252


def test_who_needs_longer_than_the_deadline_is_dropped():
    for round_index, t in enumerate(turnouts(4, 100, deadline=6)):
        chosen = sample_cohort(10, 4, 1, round_index)
        assert t.cohort == tuple(k for k in chosen if k < 6)  # client 5 needs 6 steps
        assert t.dropped == tuple(k for k in chosen if k >= 6)


# Drop-outs


def test_clients_drop_out_before_and_after_training():
    drawn = turnouts(10, dropout=Dropout(before=0.2, after=0.5))
    for t in drawn:
        assert sorted((*t.cohort, *t.dropped, *t.unreached)) == list(range(10))
    for k in (0, 7):
        assert_share([k in t.unreached for t in drawn], 0.2)
        assert_share([k in t.dropped for t in drawn], 0.8 * 0.5)
    assert_share([{1, 2} <= {*t.unreached} for t in drawn], 0.04)


def test_a_number_is_the_probability_after_training():
    drawn = turnouts(10, dropout=0.25)
    assert drawn == turnouts(10, dropout=Dropout(after=0.25))
    assert_share([3 in t.dropped for t in drawn], 0.25)


def test_a_function_says_who_drops_out():
    rules = {0: Dropout(before=0.5), 1: 0.5}
    drawn = turnouts(3, feed=Clients(3), dropout=lambda round_index, client_id: rules.get(client_id, 0))
    assert_share([t.unreached == (0,) for t in drawn], 0.5)
    assert_share([t.dropped == (1,) for t in drawn], 0.5)
    assert all(2 in t.cohort for t in drawn)


def test_over_selection_makes_up_for_drop_outs():
    """The server waits for the first four that arrive."""
    for t in turnouts(4, 300, over_select=1.5, dropout=0.3):
        arrived = [k for k in sorted((*t.cohort, *t.dropped)) if k not in t.dropped or k > max(t.cohort, default=10)]
        assert len(t.cohort) + len(t.dropped) == 6
        assert list(t.cohort) == arrived[: len(t.cohort)]


RULES = st.fixed_dictionaries(
    {},
    optional={
        "sampler": st.sampled_from(
            [
                None,
                UniformSampler(),
                SizeSampler(),
                PowerOfChoice(12),
                lambda t, clients, rng: rng.permutation(clients)[:1],
            ]
        ),
        "availability": st.one_of(
            st.floats(0.01, 1),
            st.just(lambda t, k: (t + k) % 3 / 2),
            st.dictionaries(st.integers(0, 3), st.just([(0, 2), (3, 4)]), min_size=1),
        ),
        "over_select": st.floats(1, 3),
        "deadline": st.integers(1, 12),
        "dropout": st.floats(0, 0.9) | st.builds(Dropout, st.floats(0, 0.9), st.floats(0, 0.9)),
    },
)


@given(st.data(), RULES, st.integers(4, 12), st.integers(0, 99))
@settings(max_examples=200)
def test_a_cohort_is_distinct_available_and_at_most_its_size(data, rules, num_clients, round_index):
    feed, size = Clients(num_clients), data.draw(st.integers(1, num_clients - 1))
    participation = Participation(**rules)
    participation.check(feed, size)
    state = {"losses": {0: 1.0, 3: -math.inf}}
    turnout = participation.draw(round_index, feed, size, state)
    groups = (turnout.cohort, turnout.dropped, turnout.unreached)
    chosen = [k for group in groups for k in group]
    assert len(set(chosen)) == len(chosen) <= participation.num_chosen(size, num_clients)
    assert all(list(group) == sorted(group) and all(type(k) is int for k in group) for group in groups)
    assert len(turnout.cohort) <= size
    everyone = Participation(availability=rules.get("availability")).draw(round_index, feed, num_clients, {}).cohort
    assert set(chosen) <= set(everyone)
    assert turnout.num_available in (None, len(everyone))
    assert turnout == participation.draw(round_index, feed, size, state)
    if not rules.get("dropout") and "deadline" not in rules and not callable(rules.get("sampler")):
        assert len(turnout.cohort) == min(size, len(everyone))


# What cannot be


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"availability": 0.0}, r"availability=0.0.*\(0, 1\]"),
        ({"availability": True}, r"availability=True.*\(0, 1\]"),
        ({"availability": "trace.txt"}, r"'trace.txt'.*\.npy, \.csv or \.json"),
        ({"availability": [[0, 2]]}, r"<list>.*nothing but 0 and 1"),
        ({"availability": np.ones(3)}, r"<ndarray>.*shape \(rounds, clients\).*has the shape \(3,\)"),
        ({"availability": [[0, 0]]}, "nobody would ever take part"),
        ({"availability": {}}, "nobody would ever take part"),
        ({"availability": {0: [(3, 3)]}}, r"client 0 has \[\(3, 3\)\]"),
        ({"availability": {"a": 5}}, "client 'a' has 5"),
        ({"over_select": 0.9}, "over_select=0.9.*at least 1"),
        ({"over_select": math.inf}, "over_select=inf.*at least 1"),
        ({"deadline": 0}, "`deadline` must be a positive whole number.*got 0"),
        ({"deadline": 2.5}, "`deadline` must be a positive whole number.*got 2.5"),
        ({"dropout": 1.0}, r"Dropout\(after=\.\.\.\)` must be a probability in \[0, 1\).*got 1.0"),
    ],
)
def test_values_out_of_range_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Participation(**rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"over_select": "1.3"}, "`over_select` must be a number"),
        ({"dropout": True}, "`dropout` must be a probability.*got True"),
        ({"dropout": Dropout}, "Dropout is a class"),
        ({"availability": object()}, "`availability` must be a probability"),
    ],
)
def test_values_of_another_type_are_refused(rules, message):
    with pytest.raises(TypeError, match=message):
        Participation(**rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"availability": [[1, 1]]}, "<list>.*has 2 columns, but there are 10 clients"),
        ({"availability": {11: [(0, 1)]}}, "client 11, but clients are numbered from 0 to 9"),
        ({"availability": {"x": [(0, 1)]}}, "client 'x', but clients are numbered from 0 to 9"),
        ({"availability": "nowhere.csv"}, "'nowhere.csv'.*could not be read"),
        ({"deadline": 2}, "`deadline=2` local steps would drop every client.*fastest needs 3.*deadline=3"),
    ],
)
def test_what_does_not_go_with_the_clients_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Participation(**rules).check(Clients(steps=range(3, 13)), 4)


def test_over_selection_needs_somebody_to_choose_beyond_the_cohort():
    Participation(over_select=1.3).check_size(9, 10)
    with pytest.raises(ValueError, match=r"over_select=1.3.*all 10 clients already.*clients_per_round"):
        Participation(over_select=1.3).check_size(10, 10)


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ([0, 3, 0], "returned client 0 more than once"),
        ([0, 1], "returned client 1, which is not available"),
        ([0, 2, 4, 6, 8], "returned 5 clients, but at most 4"),
        ([0, 2.0], "must return a sequence of client ids"),
        ([True], "must return a sequence of client ids"),
        (3, "must return a sequence of client ids.*got 3"),
        ("02", "must return a sequence of client ids"),
        (None, "must return a sequence of client ids.*got None"),
    ],
)
def test_what_a_function_returns_is_checked(cohort, message):
    def choose(round_index, clients, rng):
        return cohort

    with pytest.raises(ValueError, match=f"`sampler=.*choose.* in round 0.*{message}"):
        turnouts(4, 1, sampler=choose, availability=lambda t, k: k % 2 == 0)


def test_a_function_may_return_numpys_numbers_in_any_order():
    (turnout,) = turnouts(4, 1, sampler=lambda round_index, clients, rng: np.array([7, 2]))
    assert turnout == Turnout((2, 7))
    assert all(type(client_id) is int for client_id in turnout.cohort)


def test_what_functions_of_availability_and_dropout_return_is_checked():
    with pytest.raises(ValueError, match=r"availability=.*returned 1.5 in round 0 for client 0"):
        turnouts(rounds=1, availability=lambda t, k: 1.5)
    with pytest.raises(ValueError, match=r"availability=.*returned None in round 0 for client 0"):
        turnouts(rounds=1, availability=lambda t, k: None)
    with pytest.raises(ValueError, match=r"dropout=.*returned 2 in round 0 for client"):
        turnouts(rounds=1, dropout=lambda t, k: 2)
