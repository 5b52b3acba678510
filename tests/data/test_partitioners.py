"""Partitioners: every example belongs to one client, by the rule of each, as a pure function of the seed."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_lbgm.data import (
    DirichletPartitioner,
    IIDPartitioner,
    NaturalPartitioner,
    Partitioner,
    PathologicalPartitioner,
    make_partitions,
)


def labelled(class_sizes, seed=0):
    """A dataset with ``class_sizes[c]`` examples of class ``c``, in random order."""
    labels = torch.repeat_interleave(torch.arange(len(class_sizes)), torch.tensor(class_sizes))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(torch.zeros(len(labels), 1), labels[order])


def as_lists(partitions):
    return [part.tolist() for part in partitions]


def assert_each_example_once(partitions, num_examples):
    assert sorted(index for part in as_lists(partitions) for index in part) == list(range(num_examples))


def classes_of(dataset, part):
    """Count of each class among a client's examples."""
    return Counter(dataset.tensors[1][part].tolist())


RANDOM_PARTITIONERS = [
    IIDPartitioner(),
    PathologicalPartitioner(2),
    DirichletPartitioner(0.3),
    DirichletPartitioner(0.05, min_examples=5),
]


@pytest.mark.parametrize("partitioner", RANDOM_PARTITIONERS, ids=repr)
def test_partitions_are_a_function_of_the_seed_alone(partitioner):
    dataset = labelled([20, 20, 20, 20])
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = as_lists(make_partitions(dataset, 8, partitioner, seed=7))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(1)
    np.random.seed(1)
    assert as_lists(make_partitions(dataset, 8, partitioner, seed=7)) == first
    assert as_lists(make_partitions(dataset, 8, partitioner, seed=8)) != first


@pytest.mark.parametrize("partitioner", RANDOM_PARTITIONERS, ids=repr)
def test_partitions_are_increasing_int64_tensors(partitioner):
    partitions = make_partitions(labelled([20, 20, 20, 20]), 8, partitioner, seed=0)
    assert len(partitions) == 8
    for part in partitions:
        assert part.dtype == torch.int64
        assert part.ndim == 1
        assert part.tolist() == sorted(part.tolist())


# IID


@given(n=st.integers(1, 200), data=st.data(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_iid_clients_have_every_example_once_and_sizes_differ_by_one_at_most(n, data, seed):
    num_clients = data.draw(st.integers(1, n))
    partitions = make_partitions(TensorDataset(torch.zeros(n)), num_clients, IIDPartitioner(), seed)
    assert_each_example_once(partitions, n)
    assert {len(part) for part in partitions} <= {n // num_clients, math.ceil(n / num_clients)}


def test_iid_puts_an_example_with_any_client_equally_often():
    dataset, seeds = TensorDataset(torch.zeros(12)), 600
    owners = Counter()
    for seed in range(seeds):
        for client_id, part in enumerate(make_partitions(dataset, 3, IIDPartitioner(), seed)):
            owners.update((client_id, index) for index in part.tolist())
    # 12 examples in 3 equal parts: each pair has probability 1/3; five standard deviations of the count's binomial.
    tolerance = 5 * math.sqrt(seeds * (1 / 3) * (2 / 3))
    assert len(owners) == 36
    assert all(abs(count - seeds / 3) < tolerance for count in owners.values())


# Pathological


def assert_pathological(dataset, class_sizes, num_clients, classes_per_client, partitions):
    """The documented rule, checked from the result alone."""
    assert_each_example_once(partitions, sum(class_sizes))
    counts = [classes_of(dataset, part) for part in partitions]
    assert [len(count) for count in counts] == num_clients * [classes_per_client]
    # A client has one shard of each of its classes, so a class's shards are the clients' counts of it.
    shards = [[count[c] for count in counts if c in count] for c in range(len(class_sizes))]
    assert all(max(sizes) - min(sizes) <= 1 for sizes in shards)
    return [len(sizes) for sizes in shards]


def feasible(class_sizes, num_clients, classes_per_client):
    """Whether shards of at least one example, at most one of a class for each client, can use every class."""
    total = num_clients * classes_per_client
    return (
        classes_per_client <= len(class_sizes)
        and len(class_sizes) <= total
        and total <= sum(min(num_clients, size) for size in class_sizes)
    )


def smallest_largest_shard(class_sizes, num_clients, total):
    """Minimise the largest mean shard size over all deals, by trying every value that it can take."""
    candidates = sorted({Fraction(size, k) for size in class_sizes for k in range(1, num_clients + 1)})
    for bound in candidates:
        needed = [math.ceil(size / bound) for size in class_sizes]  # fewest shards with none above the bound
        if all(k <= num_clients for k in needed) and sum(needed) <= total:
            return bound
    raise AssertionError("infeasible")


@pytest.mark.parametrize(
    ("class_sizes", "num_clients", "classes_per_client"),
    [
        ([60] * 10, 100, 3),  # the paper's
        ([60] * 10, 20, 10),  # everyone has every class
        ([60] * 10, 10, 1),  # one class each
        ([60] * 10, 7, 3),  # shards do not divide evenly
        ([60] * 10, 4, 3),
        ([3, 3, 3], 1, 3),
        ([5], 5, 1),
        ([1000, 10, 10, 10], 5, 2),  # one class is nearly everything
        ([1000, 1, 1], 3, 1),
        ([1000, 5, 1, 1], 6, 2),
        ([2000, 40, 30, 20, 10, 5], 25, 3),
        ([8, 8, 8, 8, 8], 8, 5),  # every shard is one example
        ([1, 2, 3, 4, 5, 6, 7], 7, 4),  # just enough: the sum of min(7, size) is 28
    ],
)
def test_pathological_clients_have_exactly_so_many_classes(class_sizes, num_clients, classes_per_client):
    dataset = labelled(class_sizes)
    for seed in range(10):
        partitions = make_partitions(dataset, num_clients, PathologicalPartitioner(classes_per_client), seed)
        assert_pathological(dataset, class_sizes, num_clients, classes_per_client, partitions)


@given(
    class_sizes=st.lists(st.one_of(st.integers(1, 6), st.integers(1, 300)), min_size=1, max_size=8),
    num_clients=st.integers(1, 15),
    classes_per_client=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=300)
def test_pathological_split_is_found_whenever_there_is_one_and_refused_otherwise(
    class_sizes, num_clients, classes_per_client, seed
):
    dataset = labelled(class_sizes)
    partitioner = PathologicalPartitioner(classes_per_client)
    if feasible(class_sizes, num_clients, classes_per_client):
        partitions = make_partitions(dataset, num_clients, partitioner, seed)
        shards = assert_pathological(dataset, class_sizes, num_clients, classes_per_client, partitions)
        largest = max(Fraction(size, k) for size, k in zip(class_sizes, shards))
        assert largest == smallest_largest_shard(class_sizes, num_clients, num_clients * classes_per_client)
    else:
        with pytest.raises(ValueError, match=r"num_clients|classes_per_client"):
            make_partitions(dataset, num_clients, partitioner, seed)


def test_pathological_gives_larger_classes_more_shards():
    # Halving the largest shards: 600 -> 300 -> 200, so the 5 * 2 shards are 5, 3, 1, 1 (600/5 = 120, 300/3 = 100).
    class_sizes = [600, 300, 90, 90]
    dataset = labelled(class_sizes)
    partitions = make_partitions(dataset, 5, PathologicalPartitioner(2), seed=0)
    assert assert_pathological(dataset, class_sizes, 5, 2, partitions) == [5, 3, 1, 1]


def test_pathological_gives_a_client_any_class_equally_often():
    dataset, seeds = labelled([4] * 5), 400
    owners = Counter()
    for seed in range(seeds):
        for client_id, part in enumerate(make_partitions(dataset, 5, PathologicalPartitioner(2), seed)):
            owners.update((client_id, c) for c in classes_of(dataset, part))
    # Equal classes, 2 shards each: by symmetry 2/5 for each client and class. Five standard deviations.
    tolerance = 5 * math.sqrt(seeds * 0.4 * 0.6)
    assert len(owners) == 25
    assert all(abs(count - seeds * 0.4) < tolerance for count in owners.values())


def together(partitioner, class_size, first, second, seeds):
    """Share of the seeds for which two examples of one class are with the same of two clients."""
    dataset = labelled([class_size])
    partitions = (make_partitions(dataset, 2, partitioner, seed) for seed in range(seeds))
    return sum(({first, second} <= set(part)) for parts in partitions for part in as_lists(parts)) / seeds


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 5)])
def test_pathological_shards_are_random_subsets_of_their_class(first, second):
    # 6 examples in shards of 3: with one of them are 2 of the other 5. Five standard deviations of the share.
    share = together(PathologicalPartitioner(1), 6, first, second, seeds=400)
    assert abs(share - 2 / 5) < 5 * math.sqrt(0.4 * 0.6 / 400)


def test_pathological_uses_the_labels_given():
    dataset = TensorDataset(torch.zeros(8, 1))
    animals = ["cat", "dog", "cat", "eel", "dog", "fox", "eel", "fox"]
    partitions = make_partitions(dataset, 4, PathologicalPartitioner(2, labels=animals), seed=0)
    assert_each_example_once(partitions, 8)
    assert [len({animals[i] for i in part}) for part in as_lists(partitions)] == [2, 2, 2, 2]


@pytest.mark.parametrize("wrong", [0, -1, 2.0, 1.5, True, "3", None])
def test_pathological_refuses_what_is_no_positive_integer(wrong):
    with pytest.raises(ValueError, match=r"classes_per_client.*positive integer"):
        PathologicalPartitioner(wrong)


@pytest.mark.parametrize(
    ("class_sizes", "num_clients", "classes_per_client", "message"),
    [
        ([10, 10], 2, 3, "more than the 2 classes"),
        ([10, 10, 10, 10, 10], 2, 2, "makes 4 shards, too few for the 5 classes"),
        ([100, 100, 2], 5, 3, "needs 5 examples of each class at least, but class number 2 has 2"),
    ],
)
def test_pathological_says_why_a_split_is_impossible(class_sizes, num_clients, classes_per_client, message):
    with pytest.raises(ValueError, match=message):
        make_partitions(labelled(class_sizes), num_clients, PathologicalPartitioner(classes_per_client), seed=0)


# Dirichlet


@given(
    class_sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    num_clients=st.integers(1, 12),
    min_examples=st.integers(1, 6),
    log_alpha=st.one_of(st.floats(-8, 4), st.floats(-300, 300)),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=100)
def test_dirichlet_clients_have_every_example_once_and_the_minimum_each(
    class_sizes, num_clients, min_examples, log_alpha, seed
):
    assume(num_clients * min_examples <= sum(class_sizes))
    partitioner = DirichletPartitioner(10**log_alpha, min_examples)
    partitions = make_partitions(labelled(class_sizes), num_clients, partitioner, seed)
    assert len(partitions) == num_clients
    assert_each_example_once(partitions, sum(class_sizes))
    assert min(len(part) for part in partitions) >= min_examples


def test_dirichlet_keeps_the_minimum_where_one_client_draws_all_of_a_class():
    # One class, tiny alpha: one client draws all 50 examples, and nine take 4 each from it: 50 - 36 = 14.
    partitions = make_partitions(labelled([50]), 10, DirichletPartitioner(1e-9, min_examples=4), seed=1)
    assert_each_example_once(partitions, 50)
    assert sorted(len(part) for part in partitions) == [4] * 9 + [14]


def test_dirichlet_fills_up_to_the_last_example():
    partitions = make_partitions(labelled([7, 5]), 4, DirichletPartitioner(1e-6, min_examples=3), seed=0)
    assert [len(part) for part in partitions] == [3, 3, 3, 3]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_class_shares_have_the_distributions_moments(alpha):
    num_classes, per_class, num_clients = 400, 200, 4
    dataset = labelled([per_class] * num_classes)
    partitions = make_partitions(dataset, num_clients, DirichletPartitioner(alpha), seed=0)
    shares = torch.stack([torch.bincount(dataset.tensors[1][p], minlength=num_classes) for p in partitions]) / per_class
    # Dirichlet(alpha, ..., alpha) over K: mean 1/K, variance (1/K)(1 - 1/K) / (K alpha + 1).
    mean, variance = 1 / num_clients, (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    five_errors = 5 * math.sqrt(variance / num_classes)
    assert all(abs(float(share) - mean) < five_errors for share in shares.mean(dim=1))
    assert float(shares.var(dim=1).mean()) == pytest.approx(variance, rel=0.2)


def test_dirichlet_draws_each_class_on_its_own():
    # Were one draw used for all classes, the shares of two classes would be equal; independent, their correlation
    # over 200 clients is within 5 / sqrt(200) = 0.35 of 0.
    dataset = labelled([20000, 20000])
    partitions = make_partitions(dataset, 200, DirichletPartitioner(1.0), seed=0)
    counts = np.array([[classes_of(dataset, part)[c] for part in partitions] for c in (0, 1)])
    assert abs(np.corrcoef(counts)[0, 1]) < 0.35


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 39)])
def test_dirichlet_shares_are_random_subsets_of_their_class(first, second):
    # Large alpha: halves, 20 of 40: with one of them are 19 of the other 39. Five standard deviations of the share.
    share = together(DirichletPartitioner(1e9), 40, first, second, seeds=400)
    assert abs(share - 19 / 39) < 5 * math.sqrt(0.25 / 400)


def test_dirichlet_uses_the_labels_given():
    # Tiny alpha: a class goes to one client whole, so a client's examples follow the labels given.
    labels = ["a", "b"] * 10
    dataset, partitioner = TensorDataset(torch.zeros(20)), DirichletPartitioner(1e-9, labels=labels)
    for seed in range(20):
        parts = as_lists(make_partitions(dataset, 2, partitioner, seed))
        if sorted(len(part) for part in parts) == [10, 10]:
            assert {frozenset(labels[i] for i in part) for part in parts} == {frozenset("a"), frozenset("b")}
            return
    raise AssertionError("both classes went to one client in 20 draws of probability 1/2")


@pytest.mark.parametrize("alpha", [0, 0.0, -1.0, math.nan, math.inf])
def test_dirichlet_refuses_an_alpha_that_is_not_positive_and_finite(alpha):
    with pytest.raises(ValueError, match="positive and finite"):
        DirichletPartitioner(alpha)


@pytest.mark.parametrize("min_examples", [0, -3])
def test_dirichlet_refuses_a_minimum_below_one(min_examples):
    with pytest.raises(ValueError, match="at least 1"):
        DirichletPartitioner(0.5, min_examples)


def test_dirichlet_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="needs 12 examples; the training data has 11"):
        make_partitions(labelled([5, 6]), 4, DirichletPartitioner(0.5, min_examples=3), seed=0)


@pytest.mark.parametrize("partitioner", [PathologicalPartitioner(1), DirichletPartitioner(0.5)], ids=repr)
def test_partitioners_by_class_refuse_a_dataset_without_labels(partitioner):
    with pytest.raises(ValueError, match="labels of the training dataset cannot be found"):
        make_partitions(TensorDataset(torch.zeros(4, 1)), 2, partitioner, seed=0)


# Natural


@pytest.mark.parametrize(
    "ids",
    [
        [10, 2, 10, 7, 2],  # numbers are sorted as numbers: 2, 7, 10
        np.array([10, 2, 10, 7, 2]),
        torch.tensor([10, 2, 10, 7, 2]),
        ["carol", "alice", "carol", "bob", "alice"],
    ],
    ids=["ints", "numpy", "tensor", "strings"],
)
def test_natural_clients_are_numbered_in_the_order_of_the_sorted_ids(ids):
    partitions = make_partitions(TensorDataset(torch.zeros(5)), 3, NaturalPartitioner(ids), seed=0)
    assert as_lists(partitions) == [[1, 4], [3], [0, 2]]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_natural_partitions_group_the_ids_whatever_the_seed(ids, seed):
    groups = [[i for i, owner in enumerate(ids) if owner == client] for client in sorted(set(ids))]
    partitions = make_partitions(TensorDataset(torch.zeros(len(ids))), len(groups), NaturalPartitioner(ids), seed)
    assert as_lists(partitions) == groups


def test_natural_clients_are_the_parts_of_a_concatenation():
    parts = [TensorDataset(torch.zeros(n)) for n in (3, 1, 2)]
    dataset = ConcatDataset(parts)
    assert as_lists(make_partitions(dataset, 3, NaturalPartitioner(), seed=0)) == [[0, 1, 2], [3], [4, 5]]


def test_natural_ids_go_before_the_parts_of_a_concatenation():
    dataset = ConcatDataset([TensorDataset(torch.zeros(2)), TensorDataset(torch.zeros(2))])
    assert as_lists(make_partitions(dataset, 2, NaturalPartitioner([1, 0, 1, 0]), seed=0)) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("num_clients", [1, 3])
def test_natural_refuses_another_number_of_clients_and_names_the_right_one(num_clients):
    with pytest.raises(ValueError, match=r"has 2 clients.*pass `num_clients=2`"):
        make_partitions(TensorDataset(torch.zeros(4)), num_clients, NaturalPartitioner([0, 1, 1, 0]), seed=0)
    parts = ConcatDataset([TensorDataset(torch.zeros(2)), TensorDataset(torch.zeros(2))])
    with pytest.raises(ValueError, match="pass `num_clients=2`"):
        make_partitions(parts, num_clients, NaturalPartitioner(), seed=0)


@pytest.mark.parametrize("ids", [[0, 1, 0], [0, 1, 0, 1, 0]])
def test_natural_refuses_ids_that_are_not_one_for_each_example(ids):
    with pytest.raises(ValueError, match=f"has {len(ids)} ids for 4 training examples"):
        make_partitions(TensorDataset(torch.zeros(4)), 2, NaturalPartitioner(ids), seed=0)


def test_natural_refuses_a_dataset_that_is_no_concatenation():
    dataset = Subset(TensorDataset(torch.zeros(4)), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="the training dataset is a Subset"):
        make_partitions(dataset, 2, NaturalPartitioner(), seed=0)


def test_natural_refuses_an_empty_part():
    dataset = ConcatDataset([TensorDataset(torch.zeros(3)), TensorDataset(torch.zeros(0))])
    with pytest.raises(ValueError, match="leaves 1 of `num_clients=2` without an example, client 1 first"):
        make_partitions(dataset, 2, NaturalPartitioner(), seed=0)


# What every partitioner's result is checked for


class Given(Partitioner):
    """A user's own partitioner."""

    def __init__(self, parts):
        self.parts = parts

    def partition(self, dataset, num_clients, rng):
        return self.parts


@pytest.mark.parametrize("partitioner", [*RANDOM_PARTITIONERS, NaturalPartitioner(), Given([])], ids=repr)
def test_more_clients_than_examples_are_refused(partitioner):
    with pytest.raises(ValueError, match="`num_clients=5` is more than the 4 training examples"):
        make_partitions(labelled([2, 2]), 5, partitioner, seed=0)


def test_a_users_partitioner_is_run_and_its_parts_are_sorted():
    parts = make_partitions(labelled([2, 2]), 2, Given([[3, 0], np.array([2, 1], dtype=np.int32)]), seed=0)
    assert as_lists(parts) == [[0, 3], [1, 2]]
    assert all(part.dtype == torch.int64 for part in parts)


def test_a_users_partitioner_with_too_few_partitions_is_refused():
    with pytest.raises(ValueError, match=r"Given\(parts=<1 values>\) made 1 partitions for `num_clients=2`"):
        make_partitions(labelled([2, 2]), 2, Given([[0, 1, 2, 3]]), seed=0)


def test_a_users_partitioner_that_leaves_a_client_empty_is_refused():
    with pytest.raises(ValueError, match="leaves 2 of `num_clients=3` without an example, client 1 first"):
        make_partitions(labelled([2, 2]), 3, Given([[0, 1, 2, 3], [], []]), seed=0)


def test_repr_shows_the_constructor_call():
    assert repr(IIDPartitioner()) == "IIDPartitioner()"
    assert repr(PathologicalPartitioner(3)) == "PathologicalPartitioner(classes_per_client=3)"
    dirichlet = DirichletPartitioner(0.5, min_examples=2, labels=[0, 1])
    assert repr(dirichlet) == "DirichletPartitioner(alpha=0.5, min_examples=2, labels=<2 values>)"


@pytest.mark.parametrize("part", [[0, 60], [-1, 2], [0.5, 1.5], [True, False], [[0, 1], [2, 3]]])
def test_indices_of_a_users_partitioner_are_checked(part):
    class Own(Partitioner):
        def partition(self, dataset, num_clients, rng):
            return [np.array(part), np.array([5])]

    with pytest.raises(ValueError, match="Own.*must return"):
        make_partitions(TensorDataset(torch.zeros(60, 1)), 2, Own(), seed=0)


def test_natural_ids_of_two_columns_are_refused():
    with pytest.raises(ValueError, match=r"one-dimensional.*\(4, 2\)"):
        make_partitions(TensorDataset(torch.zeros(4, 1)), 2, NaturalPartitioner(np.zeros((4, 2))), seed=0)
