"""The order of a client's local batches, and reading batches in bulk from tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

from lightning_lbgm.data import BatchPlan, bulk_reader

PARTITION = torch.tensor([10, 11, 12, 13, 14])


def drawn(plan, partition=PARTITION, seed=0):
    return [batch.tolist() for batch in plan.batches(partition, torch.Generator().manual_seed(seed))]


def test_local_steps_cycle_through_the_examples():
    # Passes of 5 examples by 2: sizes 2, 2, 1; the fourth step starts again.
    assert drawn(BatchPlan(batch_size=2, local_steps=5)) == [[10, 11], [12, 13], [14], [10, 11], [12, 13]]


def test_fewer_local_steps_than_a_pass_see_the_start_only():
    assert drawn(BatchPlan(batch_size=2, local_steps=1)) == [[10, 11]]


def test_local_steps_go_before_local_epochs():
    assert BatchPlan(batch_size=2, local_steps=4, local_epochs=7).num_steps(5) == 4


def test_local_epochs_are_whole_passes():
    one_pass = [[10, 11], [12, 13], [14]]
    assert drawn(BatchPlan(batch_size=2)) == one_pass
    assert drawn(BatchPlan(batch_size=2, local_epochs=3)) == 3 * one_pass


def test_drop_last_leaves_out_the_smaller_batch_of_each_pass():
    assert drawn(BatchPlan(batch_size=2, local_epochs=2, drop_last=True)) == 2 * [[10, 11], [12, 13]]


def test_drop_last_keeps_the_only_batch():
    assert drawn(BatchPlan(batch_size=8, drop_last=True)) == [PARTITION.tolist()]


@pytest.mark.parametrize("batch_size", [5, 6, 10**9])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_size_of_at_least_n_is_full_batch(batch_size, shuffle):
    batches = drawn(BatchPlan(batch_size=batch_size, local_steps=3, shuffle=shuffle))
    assert [sorted(batch) for batch in batches] == 3 * [PARTITION.tolist()]


def test_shuffled_passes_differ_from_each_other_and_between_generators():
    partition, plan = torch.arange(100), BatchPlan(batch_size=10, local_epochs=2, shuffle=True)
    first = drawn(plan, partition, seed=0)
    assert first[:10] != first[10:]  # equal with probability 1/100!
    assert first == drawn(plan, partition, seed=0)
    assert first != drawn(plan, partition, seed=1)
    assert partition.tolist() == list(range(100))  # the partition itself keeps its order


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 45),
    local_steps=st.one_of(st.none(), st.integers(1, 30)),
    local_epochs=st.integers(1, 4),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=100)
def test_batches_are_whole_passes_over_distinct_examples(
    n, batch_size, local_steps, local_epochs, shuffle, drop_last, seed
):
    plan = BatchPlan(batch_size, local_steps, local_epochs, shuffle, drop_last)
    partition = torch.arange(1000, 1000 + n)
    batches = drawn(plan, partition, seed)
    # A DataLoader's length: floor or ceiling of n / B; but one step where a client has fewer than B examples.
    per_pass = max(1, n // batch_size) if drop_last else math.ceil(n / batch_size)
    num_steps = local_steps if local_steps is not None else local_epochs * per_pass
    assert plan.steps_per_pass(n) == per_pass
    assert len(batches) == plan.num_steps(n) == num_steps
    for start in range(0, num_steps, per_pass):
        one_pass = batches[start : start + per_pass]
        seen = [index for batch in one_pass for index in batch]
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(partition.tolist())
        assert all(len(batch) == min(batch_size, n) for batch in one_pass[:-1])
        if not shuffle:
            assert seen == partition.tolist()[: len(seen)]
        if len(one_pass) == per_pass:
            # All, or all but the rest that drop_last leaves out.
            assert len(seen) == (n - n % batch_size if drop_last and n >= batch_size else n)


def test_a_shuffled_order_is_uniform():
    # All 6 orders of 3 examples: each has probability 1/6; five standard deviations of the count's binomial.
    generator = torch.Generator().manual_seed(0)
    plan = BatchPlan(batch_size=1, shuffle=True)
    orders = [tuple(int(b) for b in plan.batches(torch.arange(3), generator)) for _ in range(1200)]
    tolerance = 5 * math.sqrt(1200 * (1 / 6) * (5 / 6))
    assert len(set(orders)) == 6
    assert all(abs(orders.count(order) - 200) < tolerance for order in set(orders))


def tensors(n, offset=0):
    """Examples of three tensors: a matrix each, a number each, a class each."""
    values = torch.arange(n) + offset
    return TensorDataset(values.float().reshape(n, 1, 1).expand(n, 2, 3) * 2, values.double(), values % 3)


def nested_dataset():
    parts = ConcatDataset([tensors(4), Subset(tensors(9, offset=100), [8, 0, 5, 5]), tensors(3, offset=50)])
    return ConcatDataset([Subset(parts, np.array([10, 0, 4, 7, 3])), tensors(2, offset=30), parts])


DATASETS = {
    "tensors": tensors(12),
    "subset of a list": Subset(tensors(12), [3, 1, 11, 1]),
    "subset of an array": Subset(tensors(12), np.array([3, 1, 11])),
    "subset of a range": Subset(tensors(12), range(2, 9)),
    "concatenation": ConcatDataset([tensors(4), tensors(1, offset=20), tensors(6, offset=40)]),
    "concatenation with an empty part": ConcatDataset([tensors(0), tensors(4), tensors(0), tensors(2, offset=9)]),
    "nested": nested_dataset(),
}


@pytest.mark.parametrize("name", DATASETS)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_bulk_reader_gives_what_default_collate_gives(name, data):
    dataset = DATASETS[name]
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=20))
    expected = default_collate([dataset[i] for i in indices])
    found = bulk_reader(dataset)(torch.tensor(indices))
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    for bulk, collated in zip(found, expected):
        assert bulk.dtype == collated.dtype
        assert bulk.shape == collated.shape
        assert torch.equal(bulk, collated)


def test_a_batch_read_in_bulk_is_a_copy():
    dataset = tensors(4)
    bulk_reader(dataset)(torch.tensor([0, 1]))[1].fill_(-1)
    assert dataset.tensors[1].tolist() == [0, 1, 2, 3]


class Augmented(TensorDataset):
    def __getitem__(self, index):
        return tuple(tensor[index] + 1 for tensor in self.tensors)


class PickySubset(Subset):
    def __getitem__(self, index):
        return self.dataset[self.indices[index]][0] * 2

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Listed(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.tensor(index)


@pytest.mark.parametrize(
    "dataset",
    [
        Augmented(torch.zeros(2)),
        PickySubset(tensors(2), [0, 1]),
        Listed(),
        Subset(Augmented(torch.zeros(2)), [0, 1]),
        ConcatDataset([tensors(2), Augmented(torch.zeros(2))]),
        Subset(ConcatDataset([tensors(2), Subset(Listed(), [0])]), [0, 2]),
    ],
    ids=["tensor subclass", "subset subclass", "other", "below a subset", "one part of two", "deep"],
)
def test_a_dataset_with_its_own_way_of_loading_is_not_read_in_bulk(dataset):
    assert bulk_reader(dataset) is None


def test_negative_indices_of_a_subset_count_from_the_end():
    parts = ConcatDataset([TensorDataset(torch.arange(3.0)), TensorDataset(torch.arange(10.0, 14.0))])
    read = bulk_reader(Subset(parts, [-1, 0, -5]))
    assert read(torch.tensor([0, 1, 2]))[0].tolist() == [13.0, 0.0, 2.0]
