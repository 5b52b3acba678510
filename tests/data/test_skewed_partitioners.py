"""Shards, quantity skew and feature skew: every example belongs to one client, by the rule of each."""

import math
import random
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, SubsetRandomSampler, TensorDataset

from lightning_lbgm.data import (
    DirichletPartitioner,
    FeaturePartitioner,
    QuantityPartitioner,
    SampledSubset,
    ShardPartitioner,
    count_labels,
    heterogeneity,
    make_partitions,
)


def labelled(labels):
    return TensorDataset(torch.zeros(len(labels), 1), torch.tensor(labels))


def assert_each_example_once(partitions, num_examples):
    assert sorted(torch.cat(partitions).tolist()) == list(range(num_examples))


PARTITIONERS = [
    ShardPartitioner(2),
    QuantityPartitioner(0.5),
    QuantityPartitioner(0.1, min_examples=4),
    FeaturePartitioner(np.arange(80) % 13, alpha=0.3),
    FeaturePartitioner(lambda example: example[1], alpha=0.3, min_examples=3),
]


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=repr)
def test_partitions_are_a_function_of_the_seed_alone(partitioner):
    dataset = labelled([k % 4 for k in range(80)])
    first = [part.tolist() for part in make_partitions(dataset, 8, partitioner, seed=7)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert [part.tolist() for part in make_partitions(dataset, 8, partitioner, seed=7)] == first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [part.tolist() for part in make_partitions(dataset, 8, partitioner, seed=8)] != first


# Shards


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=120), data=st.data(), seed=st.integers(0, 2**32))
def test_a_client_has_a_few_runs_of_the_examples_sorted_by_label(labels, data, seed):
    shards = data.draw(st.integers(1, min(4, len(labels))))
    num_clients = data.draw(st.integers(1, len(labels) // shards))
    partitions = make_partitions(labelled(labels), num_clients, ShardPartitioner(shards), seed)
    n, total = len(labels), num_clients * shards
    assert_each_example_once(partitions, n)
    assert all(shards * (n // total) <= len(part) <= shards * math.ceil(n / total) for part in partitions)
    # A shard of q examples starts at most in one label and goes on into as many others as fit.
    smallest = min(Counter(labels).values())
    reach = 1 + math.ceil((math.ceil(n / total) - 1) / smallest)
    assert all(len({labels[k] for k in part.tolist()}) <= shards * reach for part in partitions)


def test_the_split_of_mcmahan_has_one_or_two_labels_a_client():
    labels = [label for label in range(10) for _ in range(600)]  # no shard lies across a border
    partitions = make_partitions(labelled(labels), 100, ShardPartitioner(), seed=0)
    assert {len(part) for part in partitions} == {60}
    counts = Counter(len({labels[k] for k in part.tolist()}) for part in partitions)
    assert set(counts) == {1, 2}
    # A client's second shard has the label of its first with probability 19 / 199: 9.5 of 100, deviation about 3.
    assert abs(counts[1] - 9.5) < 15


def test_examples_of_a_label_are_in_random_order_within_shards():
    whole = make_partitions(labelled([0] * 100), 2, ShardPartitioner(1), seed=0)[0].tolist()
    assert whole not in (list(range(50)), list(range(50, 100)))


# Quantity


@given(n=st.integers(1, 200), data=st.data(), alpha=st.floats(0.05, 100), seed=st.integers(0, 2**32))
def test_every_client_has_the_minimum_and_every_example_one_client(n, data, alpha, seed):
    num_clients = data.draw(st.integers(1, n))
    minimum = data.draw(st.integers(1, n // num_clients))
    partitions = make_partitions(labelled([0] * n), num_clients, QuantityPartitioner(alpha, minimum), seed)
    assert_each_example_once(partitions, n)
    assert min(map(len, partitions)) >= minimum


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_sizes_spread_as_the_dirichlet_distribution_says(alpha):
    num_clients, n = 20, 100_000
    shares = np.array(
        [
            [len(part) / n for part in QuantityPartitioner(alpha).partition(range(n), num_clients, rng)]
            for rng in map(np.random.default_rng, range(60))
        ]
    )
    # A symmetric Dirichlet's shares have the mean 1/K and the variance (K - 1) / (K^2 (K alpha + 1)).
    expected = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    assert shares.var() == pytest.approx(expected, rel=0.3)


def test_a_client_of_a_quantity_skew_has_a_random_sample():
    labels = [0] * 5000 + [1] * 5000
    for part in make_partitions(labelled(labels), 4, QuantityPartitioner(1.0, 500), seed=0):
        share = sum(labels[k] for k in part.tolist()) / len(part)
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(part))


# Features


@given(n=st.integers(1, 150), data=st.data(), seed=st.integers(0, 2**32))
def test_features_deal_groups_of_neighbours_by_shares(n, data, seed):
    values = data.draw(st.lists(st.floats(-10, 10), min_size=n, max_size=n))
    num_clients, groups = data.draw(st.integers(1, n)), data.draw(st.integers(1, 12))
    alpha = data.draw(st.sampled_from([0.1, 1.0, 50.0]))
    partitioner = FeaturePartitioner(values, alpha, groups, min_examples=data.draw(st.integers(1, n // num_clients)))
    partitions = make_partitions(labelled([0] * n), num_clients, partitioner, seed)
    assert_each_example_once(partitions, n)
    assert min(map(len, partitions)) >= partitioner.min_examples


def test_groups_are_of_equal_size_and_dealt_as_classes_are():
    # Each example's value names its group: so the rule is the Dirichlet partitioner's, up to what it draws.
    values = np.repeat(np.arange(5), 40)
    rng = np.random.default_rng(0)
    rng.permutation(200)
    rng.integers(2**31)
    expected = DirichletPartitioner(0.3, labels=values).partition(labelled([0] * 200), 6, rng)
    found = FeaturePartitioner(values, 0.3, 5).partition(labelled([0] * 200), 6, np.random.default_rng(0))
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


def test_a_small_alpha_gives_clients_few_groups_and_a_large_one_all():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    deciles = (values.argsort().argsort() // 200).numpy()

    def skew(alpha):
        parts = make_partitions(labelled([0] * 2000), 10, FeaturePartitioner(values, alpha, min_examples=20), 0)
        return heterogeneity([len(part) for part in parts], count_labels(parts, deciles)[0])

    assert skew(0.02)["label_distance_mean"] > 0.6
    assert skew(1000.0)["label_distance_mean"] < skew(1000.0)["label_distance_chance"]


class Noisy(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(()) + random.random() + np.random.rand()


def test_a_function_gets_each_example_and_random_transforms_are_seeded():
    seen = []
    data = TensorDataset(torch.arange(30.0), torch.arange(30))
    make_partitions(data, 3, FeaturePartitioner(lambda e: seen.append(int(e[1])) or e[0], 0.5), seed=0)
    assert seen == list(range(30))
    first, again = (
        [part.tolist() for part in make_partitions(Noisy(), 3, FeaturePartitioner(float, 0.1), seed=3)] for _ in "ab"
    )
    assert first == again


def test_features_of_the_whole_dataset_are_restricted_to_what_a_sampler_picks():
    data = TensorDataset(torch.zeros(20))
    picked = SampledSubset(data, list(SubsetRandomSampler(range(4, 20, 2))))
    chosen = picked.positions.numpy()
    values = np.random.default_rng(0).normal(size=20)
    whole = FeaturePartitioner(values, 0.1, 4).partition(picked, 2, np.random.default_rng(0))
    own = FeaturePartitioner(values[chosen], 0.1, 4).partition(
        TensorDataset(torch.zeros(8)), 2, np.random.default_rng(0)
    )
    assert [part.tolist() for part in whole] == [part.tolist() for part in own]


# Errors


def never(example):
    return "bright"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardPartitioner(0), r"`ShardPartitioner\(shards_per_client=...\)` must be an integer, at least"),
        (lambda: ShardPartitioner(2.0), "got 2.0. McMahan et al. have 2"),
        (lambda: QuantityPartitioner(0), r"Partitioner\(alpha=...\)` must be positive and finite; got 0. Try 0.5"),
        (lambda: QuantityPartitioner("0.5"), "got '0.5'"),
        (lambda: QuantityPartitioner(math.nan), "got nan"),
        (lambda: QuantityPartitioner(1.0, 0), r"\(min_examples=...\)` must be an integer, at least 1; got 0"),
        (lambda: FeaturePartitioner([1.0], -1), r"`FeaturePartitioner\(alpha=...\)` must be positive"),
        (lambda: FeaturePartitioner([1.0], 1, 0), r"\(num_groups=...\)` must be an integer"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("partitioner", "message"),
    [
        (ShardPartitioner(3), "`num_clients=4` with `shards_per_client=3` needs 12 examples; the training data has 10"),
        (QuantityPartitioner(1.0, 3), "`num_clients=4` with `min_examples=3` needs 12 examples"),
        (FeaturePartitioner(range(10), 1.0, min_examples=3), "`num_clients=4` with `min_examples=3` needs 12"),
        (FeaturePartitioner(range(9), 1.0), r"one number for each of the 10 training examples; got the shape \(9,\)"),
        (FeaturePartitioner(np.zeros((10, 2)), 1.0), r"shape \(10, 2\). For several numbers an example, cluster them"),
        (FeaturePartitioner(["a"] * 10, 1.0), r"must hold numbers; got .*'a'.* `DirichletPartitioner\(alpha, labels="),
        (FeaturePartitioner(pandas.Series([1.0] * 8 + [None] * 2), 1.0), "2 of 10 are missing .*first at position 8"),
        (FeaturePartitioner([1] * 9 + [None], 1.0), "1 of 10 are missing .*first at position 9"),
        (FeaturePartitioner(never, 1.0), r"features=never\(\)\)` returned 'bright' for example 0: return one number"),
        (FeaturePartitioner(lambda e: torch.zeros(2), 1.0), r"returned tensor\(\[0., 0.\]\) for example 0"),
    ],
    ids=range(10),
)
def test_data_that_does_not_go_with_the_rule_is_refused(partitioner, message):
    with pytest.raises(ValueError, match=message):
        make_partitions(labelled([0] * 10), 4, partitioner, seed=0)


def test_a_function_is_shown_by_its_name_and_an_array_by_its_length():
    assert (
        repr(FeaturePartitioner(never, 1))
        == "FeaturePartitioner(features=never(), alpha=1.0, num_groups=10, min_examples=1)"
    )
    assert repr(FeaturePartitioner([1.0, 2.0], 1)).startswith("FeaturePartitioner(features=<2 values>, ")
