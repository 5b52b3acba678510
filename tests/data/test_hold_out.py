"""Examples that clients are evaluated on: held out of their training examples, or dealt like these."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_lbgm.data import (
    BatchPlan,
    ClientFeed,
    DirichletPartitioner,
    FeaturePartitioner,
    IIDPartitioner,
    LoaderFeed,
    NaturalPartitioner,
    PathologicalPartitioner,
    QuantityPartitioner,
    SampledSubset,
    ShardPartitioner,
    make_partitions,
)
from lightning_lbgm.data.evaluation import choose_clients, dealt_data, given_data
from lightning_lbgm.data.hold_out import hold_out, hold_out_of_loader, hold_out_of_partitions
from lightning_lbgm.data.like_training import deal_by_labels


def numbers(n):
    """Examples that are their own index, and labels 0, 1, 2, 0, 1, 2, ..."""
    return TensorDataset(torch.arange(n), torch.arange(n) % 3)


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(0, 20))
def test_a_split_is_disjoint_covers_all_and_leaves_both_sides_something(n, share, seed, client_id):
    examples = torch.arange(100, 100 + n)
    train, held_out = hold_out(examples, share, seed, client_id)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(n))
    assert len(held_out) == (0 if n == 1 else min(max(round(share * n), 1), n - 1))
    again = hold_out(examples, share, seed, client_id)
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], held_out)


def test_other_seeds_and_clients_hold_out_other_examples():
    examples = torch.arange(1000)
    first, others = hold_out(examples, 0.2, 0, 0)[1], [hold_out(examples, 0.2, *at)[1] for at in ((1, 0), (0, 1))]
    assert all(not torch.equal(first, other) for other in others)
    # Drawn at random: neither the first nor the last fifth, but all over.
    assert all(
        len(first) == 200 and 15 < int(((first >= k) & (first < k + 100)).sum()) < 25 + 10 for k in (0, 400, 900)
    )


def test_an_example_that_comes_twice_is_on_one_side_only():
    # Positions 0 to 5 are the examples 7, 8, 7, 9, 8, 7 of the whole dataset.
    subset = SampledSubset(numbers(10), [7, 8, 7, 9, 8, 7])
    (train,), (held_out,) = hold_out_of_partitions([torch.arange(6)], subset, 0.4, seed=3)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(6))
    assert set(subset.positions[train].tolist()) & set(subset.positions[held_out].tolist()) == set()


# A loader for each client


def examples_of(loader):
    return [x for batch in loader for x in batch[0].tolist()]


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True, "drop_last": True, "generator": torch.Generator()},
        {"batch_size": 3, "sampler": SubsetRandomSampler([2, 3, 5, 7, 11, 13])},
        {"batch_sampler": BatchSampler(RandomSampler(range(20)), 4, drop_last=False)},
    ],
    ids=["in order", "shuffled", "a part", "batch sampler"],
)
def test_a_clients_loader_is_split_and_keeps_its_settings(settings):
    loader = DataLoader(numbers(20), **settings)
    train, held_out = hold_out_of_loader(loader, "a", 0.25, seed=0, client_id=1)
    given_examples = [2, 3, 5, 7, 11, 13] if "sampler" in settings else list(range(20))
    out = examples_of(held_out)
    assert out == sorted(out)
    assert len(out) == round(0.25 * len(given_examples))
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):  # `drop_last` leaves out others each time
        one_pass = examples_of(train)
        seen |= set(one_pass)
    assert seen == set(given_examples) - set(out)
    assert train.batch_sampler.drop_last == loader.batch_sampler.drop_last
    assert train.batch_size == loader.batch_sampler.batch_size
    in_order = one_pass == sorted(one_pass)
    assert in_order == ("batch_size" in settings and len(settings) == 1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class OwnLoader(DataLoader):
    def __iter__(self):
        return super().__iter__()


LOADERS = {
    "is a list, not a `DataLoader`": [1, 2],
    "is an `IterableDataset`": DataLoader(Stream()),
    "has a `__iter__` of its own": OwnLoader(numbers(4)),
    "has a batch sampler of its own or `batch_size=None`": DataLoader(numbers(4), batch_size=None),
    "has a WeightedRandomSampler": DataLoader(numbers(4), sampler=WeightedRandomSampler([1.0] * 4, 4)),
    "draws with replacement": DataLoader(numbers(4), sampler=RandomSampler(range(4), replacement=True)),
}


@pytest.mark.parametrize(("words", "loader"), LOADERS.items())
def test_a_loader_that_cannot_be_split_is_refused(words, loader):
    with pytest.raises(ValueError, match=rf"(?s)client 'a'.*{re.escape(words)}.*`ClientEvaluation\(data="):
        hold_out_of_loader(loader, "a", 0.2, 0, 0)


def test_an_only_example_is_not_held_out():
    loader = DataLoader(numbers(1))
    assert hold_out_of_loader(loader, "a", 0.5, 0, 0) == (loader, None)


# A validation set


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 80), st.integers(0, 3))
def test_a_client_gets_the_share_of_each_label_that_it_has_in_training(num_clients, num_labels, n, seed):
    rng = np.random.default_rng(seed)
    known = np.concatenate([np.arange(num_labels), rng.integers(num_labels, size=60)])
    partitions = [torch.from_numpy(p) for p in np.array_split(rng.permutation(len(known)), num_clients)]
    labels = rng.integers(num_labels, size=n)
    parts = deal_by_labels(labels, known, partitions, rng)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for client_id, part in enumerate(parts):
        for label in range(num_labels):
            share = (known[partitions[client_id]] == label).sum() / (known == label).sum()
            wanted = share * (labels == label).sum()
            assert abs((labels[part] == label).sum() - wanted) <= 1


def fed(train, num_clients, partitioner, **settings):
    loader = DataLoader(train, batch_size=4, **settings)
    return ClientFeed(loader, BatchPlan(4), make_partitions(train, num_clients, partitioner, 0), 0)


def dealt(data, keys, partitioner, train, num_clients=3):
    evaluation = given_data(data, keys, fed(train, num_clients, partitioner), partitioner, 0)
    return {k: [x for b in evaluation.batches(k) for x in b.data[0].tolist()] for k in evaluation.clients}


def test_natural_clients_get_their_own_validation_examples():
    partitioner = NaturalPartitioner(["b", "a", "c", "c", "a", "b"])
    found = dealt(numbers(5), ["c", "c", "a", "c", "a"], partitioner, numbers(6))
    assert found == {0: [2, 4], 2: [0, 1, 3]}  # "b" has none


def test_each_part_of_a_concatenated_validation_set_is_a_natural_client():
    train, val = (ConcatDataset([Subset(numbers(9), range(*ends)) for ends in parts]) for parts in PARTS)
    assert dealt(val, None, NaturalPartitioner(), train) == {0: [0, 1], 1: [2], 2: [3, 4, 5]}


PARTS = ([(0, 2), (2, 5), (5, 9)], [(0, 2), (2, 3), (3, 6)])


def test_pathological_clients_are_evaluated_on_their_classes():
    partitioner, train = PathologicalPartitioner(1), numbers(30)
    classes = [{int(x) % 3 for x in part} for part in make_partitions(train, 3, partitioner, 0)]
    found = dealt(numbers(12), None, partitioner, train)
    assert [{x % 3 for x in found[k]} for k in range(3)] == classes
    assert sorted(itertools.chain.from_iterable(found.values())) == list(range(12))


def test_clients_with_shards_are_evaluated_on_their_mix_and_others_on_their_share():
    train = numbers(60)
    for partitioner in (ShardPartitioner(1), QuantityPartitioner(0.5)):
        parts = make_partitions(train, 3, partitioner, 0)
        found = dealt(numbers(30), None, partitioner, train)
        assert sorted(itertools.chain.from_iterable(found.values())) == list(range(30))
        for client_id, part in enumerate(parts):
            assert abs(len(found.get(client_id, [])) - len(part) / 2) <= 3  # half as many examples, rounded by label
            if isinstance(partitioner, ShardPartitioner):
                assert {int(x) % 3 for x in found[client_id]} == {int(x) % 3 for x in part}


def test_a_validation_set_is_not_dealt_by_a_feature():
    with pytest.raises(ValueError, match=r"(?s)by a feature.*`ClientEvaluation\(split=0.2\)`, or pass a dataset"):
        dealt(numbers(12), None, FeaturePartitioner(range(30), 0.5), numbers(30))


def test_an_iid_validation_set_is_dealt_evenly_with_its_own_batches():
    train = numbers(9)
    evaluation = given_data(
        DataLoader(numbers(8), batch_size=2), None, fed(train, 3, IIDPartitioner()), None or IIDPartitioner(), 0
    )
    sizes = [[batch.size for batch in evaluation.batches(k)] for k in range(3)]
    assert sizes == [[2, 1], [2, 1], [2]]


class Plain(Dataset):
    """Shows no labels."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


NATURAL = NaturalPartitioner(["b", "a", "c", "c", "a", "b"])
REFUSED = {
    "pass one for each of its examples as `ClientEvaluation\\(data=..., keys": (numbers(3), None, NATURAL),
    "has the shape \\(2,\\) for 3": (numbers(3), ["a", "b"], NATURAL),
    "1 of 3 ids are of no client, .*'x'.* at position 1": (numbers(3), ["a", "x", "b"], NATURAL),
    "ids of the validation set are of another type": (numbers(3), [1, 2, 3], NATURAL),
    "needs none: leave them out": (numbers(3), [0, 0, 0], IIDPartitioner()),
    "label 3, which no client has": (numbers(4), [0, 1, 2, 3], PathologicalPartitioner(1)),
    "labels of the validation set are needed": (Plain(), None, DirichletPartitioner(1.0)),
    "labels of the validation set are of another type": (numbers(2), ["a", "b"], DirichletPartitioner(1.0)),
    "cannot deal the validation set.*`ConcatDataset`": (
        numbers(3),
        None,
        NaturalPartitioner(),
    ),
    "must be a Dataset or DataLoader, or a list": (3, None, IIDPartitioner()),
    "`IterableDataset`|Stream does not have": (Stream(), None, IIDPartitioner()),
    "has 1 entries for 3 clients": ([numbers(3)], None, IIDPartitioner()),
    "goes with one dataset that is dealt": ([numbers(3)] * 3, [1], IIDPartitioner()),
    "got the client 7: clients have the ids 0 to 2": ({7: numbers(3)}, None, IIDPartitioner()),
    "batch size is not known": ([Stream()] * 3, None, IIDPartitioner()),
}


@pytest.mark.parametrize(("words", "given_args"), REFUSED.items())
def test_data_that_does_not_go_with_the_clients_is_refused(words, given_args):
    data, keys, partitioner = given_args
    train = ConcatDataset([numbers(3), numbers(3), numbers(3)]) if "ConcatDataset" in words else numbers(6)
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}"):
        dealt(data, keys, partitioner, train)


def test_clients_with_loaders_of_their_own_need_data_of_their_own():
    feed = LoaderFeed([DataLoader(numbers(4), batch_size=2)] * 2, ["x", "y"], 1, None, 0)
    with pytest.raises(ValueError, match="no rule to deal one validation set by"):
        given_data(numbers(4), None, feed, IIDPartitioner(), 0)
    evaluation = given_data({"y": numbers(3)}, None, feed, IIDPartitioner(), 0)
    assert evaluation.clients == (1,)
    assert [batch.data[0].tolist() for batch in evaluation.batches(1)] == [[0, 1], [2]]


# Whom to evaluate


def test_clients_are_chosen_by_number_id_or_name():
    loaders = [DataLoader(numbers(4))] * 9
    feed = LoaderFeed(loaders, list("abcdefghi"), 1, None, 0)
    evaluation = given_data(loaders, None, feed, IIDPartitioner(), 0)
    assert choose_clients(None, evaluation, feed, 0) == tuple(range(9))
    assert choose_clients(["c", 0, "a"], evaluation, feed, 0) == (0, 2)
    drawn = {choose_clients(4, evaluation, feed, seed) for seed in range(10)}
    assert all(len(set(d)) == 4 and list(d) == sorted(d) for d in drawn)
    assert len(drawn) > 5
    assert choose_clients(4, evaluation, feed, 3) == choose_clients(4, evaluation, feed, 3)
    for wrong, words in ((10, "more than the 9"), (["z"], "got the client 'z'"), ([9], "ids 0 to 8")):
        with pytest.raises(ValueError, match=words):
            choose_clients(wrong, evaluation, feed, 0)
    some = given_data({0: numbers(2)}, None, feed, IIDPartitioner(), 0)
    with pytest.raises(ValueError, match="client 4 has no evaluation data"):
        choose_clients([4], some, feed, 0)
    nobody = dealt_data(DataLoader(numbers(2)), [torch.tensor([], dtype=torch.int64)], 0, numbers(2))
    with pytest.raises(ValueError, match="none has two examples"):
        choose_clients(None, nobody, feed, 0)


class Noisy(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor(float(index)) + torch.rand(())


@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_draw_the_same_in_each_evaluation_with_workers_and_without(workers):
    partitions = [torch.tensor([1, 4, 6]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 9])]
    evaluation = dealt_data(DataLoader(Noisy(), batch_size=2, num_workers=workers), partitions, 5, Noisy())
    assert evaluation.clients == (0, 2)
    values = lambda batches: torch.cat([batch.data for batch in batches])  # noqa: E731
    streamed = {k: values(batches) for k, batches in evaluation.stream([0, 2])}
    assert streamed[0].floor().tolist() == [1, 4, 6]
    for k, found in streamed.items():
        assert torch.equal(values(evaluation.batches(k)), found)
    assert torch.equal({k: values(batches) for k, batches in evaluation.stream([2])}[2], streamed[2])
