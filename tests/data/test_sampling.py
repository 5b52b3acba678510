"""What a DataLoader's sampler says: which examples are the training set, and the order of a client's own."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_lbgm.data import (
    BatchPlan,
    ClientFeed,
    IIDPartitioner,
    NaturalPartitioner,
    Partitioner,
    PathologicalPartitioner,
    make_partitions,
    plan_from_loader,
    read_loader,
)

DATA = TensorDataset(torch.arange(24), torch.arange(24) % 3)
TWELVE = TensorDataset(torch.arange(12))


class EvenAndOdd(Partitioner):
    """Deal the places of the training set in turn to two clients."""

    def partition(self, dataset, num_clients, rng):
        return [np.arange(k, len(dataset), num_clients) for k in range(num_clients)]


def play(loader, round_index=0, num_clients=2, partitioner=None, seed=3, **steps):
    """Return the examples of each client's batches in a round."""
    dataset, plan = read_loader(loader, steps.get("local_epochs"), steps.get("local_steps"), seed)
    partitions = make_partitions(dataset, num_clients, partitioner or EvenAndOdd(), seed)
    feed = ClientFeed(loader, plan, partitions, seed, dataset)
    return [
        [batch.data[0].tolist() for batch in batches] for _, batches in feed.stream(round_index, range(num_clients))
    ]


def flat(batches):
    return [index for batch in batches for index in batch]


def with_sampler(sampler, dataset=DATA, **settings):
    return DataLoader(dataset, **{"batch_size": 4, "sampler": sampler, **settings})


# The plan


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("written_out", [False, True])
def test_the_plan_has_the_loaders_settings(shuffle, drop_last, written_out):
    if written_out:
        sampler = RandomSampler(DATA) if shuffle else SequentialSampler(DATA)
        loader = DataLoader(DATA, batch_sampler=BatchSampler(sampler, 5, drop_last))
    else:
        loader = DataLoader(DATA, batch_size=5, shuffle=shuffle, drop_last=drop_last)
    assert plan_from_loader(loader, local_epochs=3, local_steps=None) == BatchPlan(5, None, 3, shuffle, drop_last)
    assert plan_from_loader(loader, local_epochs=None, local_steps=7) == BatchPlan(5, 7, 1, shuffle, drop_last)
    assert plan_from_loader(loader, None, None) == BatchPlan(5, None, 1, shuffle, drop_last)
    dataset, plan = read_loader(loader, None, None)
    assert dataset is DATA
    assert plan == BatchPlan(5, None, 1, shuffle, drop_last)


class OwnBatchSampler(BatchSampler):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        DataLoader(DATA, batch_sampler=OwnBatchSampler(SequentialSampler(DATA), 2, drop_last=False)),
        DataLoader(DATA, batch_size=None),
    ],
    ids=["list", "subclass", "no batch size"],
)
def test_a_loader_without_a_batch_size_is_refused(loader):
    with pytest.raises(ValueError, match=r"batch size of a client's local steps is unknown.*num_clients=None"):
        plan_from_loader(loader, 1, None)


# Samplers that pick a fixed set


class Backwards(Sampler):
    """An order of one's own that is always the same."""

    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices[::-1])

    def __len__(self):
        return len(self.indices)


class PairsTogether(Sampler):
    """Shuffles pairs (2i, 2i + 1) whose members stay together, of the first n examples."""

    def __init__(self, n, generator=None):
        self.n, self.generator = n, generator

    def __iter__(self):
        for pair in torch.randperm(self.n // 2, generator=self.generator).tolist():
            yield from (2 * pair, 2 * pair + 1)

    def __len__(self):
        return self.n


FIXED = {
    "subset": SubsetRandomSampler([3, 1, 20, 7, 5, 22]),
    "list": [3, 1, 20, 7, 5, 22],
    "own order": Backwards([3, 1, 20, 7, 5, 22]),
    "repeats": SubsetRandomSampler([3, 3, 5, 7]),
    "first of a shorter source": RandomSampler(range(6)),
    "in order of a shorter source": SequentialSampler(range(6)),
    "own shuffle": PairsTogether(8),
    "own shuffle with a generator": PairsTogether(8, torch.Generator()),
    "a process's share": DistributedSampler(DATA, num_replicas=3, rank=1, shuffle=False),
    "zero weights": WeightedRandomSampler([1.0, 0.0, 1.0, 1.0], 30),
}


@pytest.mark.parametrize("sampler", FIXED.values(), ids=FIXED.keys())
def test_what_the_sampler_picks_is_what_is_dealt(sampler):
    expected = [0, 2, 3] if isinstance(sampler, WeightedRandomSampler) else sorted(sampler)
    loader = with_sampler(sampler)
    dataset, _ = read_loader(loader, None, None)
    assert sorted(dataset[i][0].item() for i in range(len(dataset))) == expected
    drawn = flat(play(loader)[0]) + flat(play(loader)[1])
    assert set(drawn) == set(expected)
    if not isinstance(sampler, WeightedRandomSampler):
        assert sorted(drawn) == expected


def test_a_batch_sampler_written_out_has_its_sampler_honoured():
    loader = DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(6)), 2, drop_last=False))
    assert sorted(flat(play(loader)[0]) + flat(play(loader)[1])) == [0, 1, 2, 3, 4, 5]


def test_a_subset_is_shuffled_and_an_order_of_ones_own_is_kept():
    subset = with_sampler(SubsetRandomSampler(range(20)), batch_size=19)
    orders = [flat(play(subset, t, num_clients=1, local_epochs=2)[0]) for t in (0, 1)]
    assert orders[0][:20] != orders[0][20:]
    own = play(with_sampler(Backwards([3, 1, 20, 7, 5, 22]), batch_size=2))
    # 22 5 7 20 1 3, dealt in turn.
    assert own == [[[22, 7], [1]], [[5, 20], [3]]]


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_an_order_that_changes_is_that_of_the_sampler_among_the_clients_own(generator):
    # Of one client all 24 come, pairs together; every round and pass in another order, and the same when repeated.
    loader = with_sampler(PairsTogether(24, generator), batch_size=2)
    rounds = [play(loader, t, num_clients=1, local_epochs=2)[0] for t in (0, 1, 0)]
    for batches in rounds:
        assert len(batches) == 24
        assert all(second == first + 1 and first % 2 == 0 for first, second in batches)
    passes = [rounds[0][:12], rounds[0][12:], rounds[1][:12], rounds[1][12:]]
    assert all(passes[i] != passes[j] for i in range(4) for j in range(i))
    assert rounds[0] == rounds[2]
    # Two clients: the order of the first elements of the pairs and that of the second are the same one.
    even, odd = play(loader, 0)
    assert [index + 1 for index in flat(even)] == flat(odd)


def test_repeats_in_an_order_that_changes_come_as_often_as_they_are_given():
    class Twice(PairsTogether):
        def __iter__(self):
            for index in super().__iter__():
                yield from (index, index)

    drawn = play(with_sampler(Twice(6)), 1)
    assert sorted(flat(drawn[0]) + flat(drawn[1])) == sorted([*range(6)] * 2)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_distributed_sampler_of_this_world_splits_over_processes_what_is_dealt(shuffle):
    loader = with_sampler(DistributedSampler(DATA, num_replicas=4, rank=2, shuffle=shuffle))
    dataset, plan = read_loader(loader, None, None, world_size=4)
    assert dataset is DATA
    assert plan.shuffle is shuffle


# Samplers that draw


def counts(sampler, rounds=200, **settings):
    drawn = [play(with_sampler(sampler, TWELVE, batch_size=100), t, **settings) for t in range(rounds)]
    return [np.bincount([i for clients in drawn for i in flat(clients[k])], minlength=12) for k in (0, 1)]


def test_weights_are_those_of_the_clients_own_examples():
    # Clients have the even and the odd examples. Weights 1 and 3 in turn within each.
    weights = torch.tensor([1.0, 1.0, 3.0, 3.0] * 3)
    even, odd = counts(WeightedRandomSampler(weights, 12))
    # A pass is as long as the client's share of 12 draws, 6; of 1200 draws each 12th or a quarter: within 5 deviations.
    for count, own in ((even, [0, 2, 4, 6, 8, 10]), (odd, [1, 3, 5, 7, 9, 11])):
        assert count.sum() == 1200
        for index in own:
            share = float(weights[index]) / 12
            assert abs(count[index] - 1200 * share) < 5 * (1200 * share * (1 - share)) ** 0.5
        assert count[own].sum() == 1200


@pytest.mark.parametrize(
    "make", [lambda: WeightedRandomSampler(torch.ones(12), 6), lambda: RandomSampler(TWELVE, True)]
)
def test_draws_are_a_pure_function_of_seed_round_and_client(make):
    torch.manual_seed(0)
    first = [play(with_sampler(make(), TWELVE), t) for t in (0, 1)]
    torch.manual_seed(5)
    again = [play(with_sampler(make(), TWELVE), t) for t in (1, 0)][::-1]
    assert first == again
    assert first[0] != first[1]
    assert play(with_sampler(make(), TWELVE), 0, seed=4) != first[0]


@pytest.mark.parametrize(
    ("sampler", "lengths"),
    [
        (WeightedRandomSampler(torch.ones(12), 24), (16, 8)),
        (RandomSampler(TWELVE, replacement=True, num_samples=3), (2, 1)),
        (RandomSampler(TWELVE, num_samples=6), (4, 2)),
        (RandomSampler(TWELVE, num_samples=1), (1, 1)),  # at least one
        (RandomSampler(TWELVE, num_samples=18), (12, 6)),
    ],
)
def test_a_pass_is_the_clients_share_of_the_draws(sampler, lengths):
    partitioner = NaturalPartitioner([0, 0, 1] * 4)  # 8 and 4 of 12
    clients = play(with_sampler(sampler, TWELVE), partitioner=partitioner)
    assert tuple(len(flat(batches)) for batches in clients) == lengths
    twice = play(with_sampler(sampler, TWELVE), partitioner=partitioner, local_epochs=2)
    assert tuple(len(flat(batches)) for batches in twice) == tuple(2 * n for n in lengths)
    assert set(flat(clients[0])) <= {0, 1, 3, 4, 6, 7, 9, 10}


def test_without_replacement_no_example_comes_again_before_all_have_come():
    first, second = play(with_sampler(RandomSampler(TWELVE, num_samples=20), TWELVE, batch_size=100))
    for drawn in (flat(first), flat(second)):  # 10 of 6
        assert len(set(drawn[:6])) == 6
        assert len(set(drawn[6:])) == 4
    weighted = WeightedRandomSampler(torch.arange(1.0, 13.0), 12, replacement=False)
    assert sorted(flat(play(with_sampler(weighted, TWELVE))[0])) == [0, 2, 4, 6, 8, 10]


def test_steps_are_counted_by_the_draws():
    loader = with_sampler(WeightedRandomSampler(torch.ones(12), 24), TWELVE, batch_size=5)
    dataset, plan = read_loader(loader, None, None)
    feed = ClientFeed(loader, plan, make_partitions(dataset, 2, IIDPartitioner(), 0), 0, dataset)
    assert [feed.num_examples(k) for k in (0, 1)] == [6, 6]
    assert [feed.num_steps(k) for k in (0, 1)] == [3, 3]  # 12 draws by 5
    assert [len(list(batches)) for _, batches in feed.stream(0, (0, 1))] == [3, 3]


# What is refused


class Imbalanced(Sampler):
    """Draws with replacement."""

    def __iter__(self):
        return iter(torch.randint(24, (24,)).tolist())


class OwnRandomness(Sampler):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.source = iter([rng.permutation(24) for _ in range(9)])

    def __iter__(self):
        return iter(next(self.source).tolist())


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 1


class Pairs(Sampler):
    def __iter__(self):
        return iter([(0, "crop"), (1, "flip")])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Imbalanced(), "Imbalanced picks other examples each time.*WeightedRandomSampler.*num_clients=None"),
        (OwnRandomness(), "OwnRandomness gives other indices.*resumed"),
        (Endless(), "Endless does not end"),
        (Pairs(), "Pairs must give indices"),
        (DistributedSampler(DATA, num_replicas=3, rank=1), "DistributedSampler picks other examples each time"),
        (SubsetRandomSampler([0, 24]), "indices from 0 to 24.*examples 0 to 23"),
        (SequentialSampler(range(25)), "indices from 0 to 24"),
        (WeightedRandomSampler([1.0, 0.0, 2.0], 3, replacement=False), "only 2 examples with a weight above 0"),
    ],
)
def test_samplers_that_cannot_be_restricted_to_clients_are_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        read_loader(with_sampler(sampler), None, None)


def test_a_sampler_whose_examples_change_later_is_refused_then():
    class Changing(PairsTogether):
        start = 0

        def __iter__(self):
            return iter([self.start + index for index in super().__iter__()])

    sampler = Changing(8)
    loader = with_sampler(sampler)
    dataset, plan = read_loader(loader, None, None)
    feed = ClientFeed(loader, plan, make_partitions(dataset, 2, IIDPartitioner(), 0), 0, dataset)
    list(feed._order(0, 0))
    sampler.start = 1
    with pytest.raises(ValueError, match="other examples in round 1"):
        feed._order(1, 0)


# Labels and ids are of the whole dataset


def test_labels_and_ids_are_restricted_to_what_is_picked():
    labels = [0] * 12 + [1] * 12
    loader = with_sampler(SubsetRandomSampler([20, 2, 3, 21]), TensorDataset(torch.arange(24)))
    first, second = play(loader, partitioner=PathologicalPartitioner(1, labels=labels))
    assert sorted([sorted(flat(first)), sorted(flat(second))]) == [[2, 3], [20, 21]]
    ids = ["held out"] * 24
    ids[20], ids[2], ids[3], ids[21] = "b", "a", "b", "a"
    assert [sorted(flat(b)) for b in play(loader, partitioner=NaturalPartitioner(ids))] == [[2, 21], [3, 20]]


def test_labels_on_the_dataset_are_those_of_what_is_picked():
    loader = with_sampler(SubsetRandomSampler([0, 3, 1, 4]))  # classes 0 0 1 1
    parts = play(loader, partitioner=PathologicalPartitioner(1))
    assert sorted(sorted(flat(part)) for part in parts) == [[0, 3], [1, 4]]


@pytest.mark.parametrize(
    "partitioner",
    [PathologicalPartitioner(1, labels=[0, 1, 0, 1]), NaturalPartitioner([0, 1, 0, 1])],
    ids=["labels", "ids"],
)
def test_labels_of_the_picked_examples_alone_are_refused(partitioner):
    loader = with_sampler(SubsetRandomSampler([20, 2, 3, 21]))
    with pytest.raises(ValueError, match=r"shape \(4,\).*24 examples.*picks 4: give one for each of the 24"):
        play(loader, partitioner=partitioner)


def test_the_position_of_a_missing_label_is_that_in_what_was_given():
    labels = [0] * 24
    labels[5] = labels[21] = None  # 5 is held out
    loader = with_sampler(SubsetRandomSampler([20, 2, 3, 21]))
    with pytest.raises(ValueError, match="1 of 4 are missing.*position 21"):
        play(loader, partitioner=PathologicalPartitioner(1, labels=labels))


def test_parts_of_a_concatenation_stay_clients_within_a_subset():
    parts = ConcatDataset([TensorDataset(torch.arange(a, b)) for a, b in ((0, 4), (4, 10), (10, 24))])
    drawn = play(with_sampler(SubsetRandomSampler([12, 1, 3, 23]), parts), partitioner=NaturalPartitioner())
    assert [sorted(flat(batches)) for batches in drawn] == [[1, 3], [12, 23]]  # the second part has no example
    nested = Subset(Subset(parts, [0, 5, 11, -1]), [3, 1, 0])
    assert [p.tolist() for p in make_partitions(nested, 3, NaturalPartitioner(), 0)] == [[2], [1], [0]]


def test_the_fingerprint_is_of_the_datasets_examples():
    def fingerprint(sampler):
        dataset, plan = read_loader(with_sampler(sampler), None, None)
        return ClientFeed(with_sampler(sampler), plan, [torch.tensor([0]), torch.tensor([1])], 0, dataset).fingerprint()

    assert fingerprint(SubsetRandomSampler([4, 7])) == fingerprint(SubsetRandomSampler([4, 7, 9]))
    assert fingerprint(SubsetRandomSampler([4, 7])) != fingerprint(SubsetRandomSampler([4, 8]))
