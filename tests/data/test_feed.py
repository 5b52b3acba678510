"""Local batches are a pure function of (seed, round, client, batch), whoever loads them."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_lbgm.data import BatchPlan, ClientFeed, LocalBatch

# Three clients of 5, 3 and 4 of 12 examples.
PARTITIONS = [torch.tensor([0, 2, 4, 6, 8]), torch.tensor([1, 3, 5]), torch.tensor([7, 9, 10, 11])]


class Augmented(Dataset):
    """An example and three random numbers, of torch, NumPy and Python, as random transforms draw them."""

    def __init__(self, size=12):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


def mixup(examples):
    """A collate function that is random itself, and gives something other than tensors too."""
    weight = float(torch.rand(())) + float(np.random.rand()) + random.random()
    return {"x": torch.stack(examples), "mixed": weight * examples[0], "ids": [int(e[0]) for e in examples]}


def make_feed(dataset=None, num_workers=0, seed=3, plan=None, partitions=PARTITIONS, **loader_settings):
    loader = DataLoader(dataset if dataset is not None else Augmented(), num_workers=num_workers, **loader_settings)
    plan = BatchPlan(batch_size=2, local_epochs=2, shuffle=True) if plan is None else plan
    return ClientFeed(loader, plan, partitions, seed)


def plain(data):
    """Batches as built-ins, so that == compares every number exactly."""
    if isinstance(data, torch.Tensor):
        return data.tolist()
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return data


def play(feed, round_index=0, cohort=(0, 1, 2)):
    """Draw a round: the list of (size, data) of each client."""
    return {
        client_id: [(batch.size, plain(batch.data)) for batch in batches]
        for client_id, batches in feed.stream(round_index, cohort)
    }


def ids(batches):
    """The examples of each batch, of a feed with the default collate function."""
    return [[int(example[0]) for example in data] for _, data in batches]


def tensor_dataset():
    return TensorDataset(torch.arange(12.0).reshape(12, 1), torch.arange(12) % 3)


class SameTensors(Dataset):
    """The examples of :func:`tensor_dataset`, in a class that nothing is known of."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return tensor_dataset()[index]


KINDS = {
    "bulk": lambda **settings: make_feed(tensor_dataset(), **settings),
    "one by one": lambda **settings: make_feed(Augmented(), **settings),
    "custom collate": lambda **settings: make_feed(Augmented(), collate_fn=mixup, **settings),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def test_each_pass_of_a_client_has_each_of_its_examples_once():
    for client_id, batches in play(make_feed()).items():
        own, drawn = PARTITIONS[client_id].tolist(), ids(batches)
        # Two passes by 2: 5 examples are 3 batches a pass, 3 are 2, 4 are 2.
        per_pass = (3, 2, 2)[client_id]
        assert len(drawn) == 2 * per_pass
        for one_pass in (drawn[:per_pass], drawn[per_pass:]):
            assert sorted(index for batch in one_pass for index in batch) == own
        assert [size for size, _ in batches] == [len(batch) for batch in drawn]


@each_kind
def test_the_same_round_twice_has_the_same_batches(make):
    feed = make()
    assert play(feed, 4) == play(feed, 4) == play(make(), 4)


@each_kind
def test_a_clients_batches_do_not_depend_on_its_cohort_or_the_rounds_before(make):
    together = play(make(), 1, (0, 1, 2))
    feed = make()
    play(feed, 0, (2, 1))
    assert play(feed, 1, (2,)) == {2: together[2]}
    assert play(make(), 1, (2, 0)) == {2: together[2], 0: together[0]}


@each_kind
def test_batches_change_with_the_round_and_the_seed(make):
    # Equal shuffles of two passes by chance: for each client, at most 1 / (3!)^2; for all three below 1e-6.
    rounds = [play(make(seed=seed), t) for seed in (3, 4) for t in (0, 1, 2)]
    assert all(rounds[i] != rounds[j] for i in range(6) for j in range(i))


def test_clients_of_equal_size_have_orders_of_their_own():
    feed = make_feed(TensorDataset(torch.arange(60)), partitions=torch.arange(60).reshape(2, 30).unbind())
    first, second = (
        [index - 30 * client_id for _, (values,) in batches for index in values]
        for client_id, batches in play(feed, 0, (0, 1)).items()
    )
    assert first != second  # equal with probability 1/30!^2


def test_without_shuffling_the_order_is_the_partitions():
    feed = make_feed(plan=BatchPlan(batch_size=2))
    assert ids(play(feed)[0]) == [[0, 2], [4, 6], [8]]


def test_random_transforms_differ_between_steps_rounds_and_clients():
    # Full batch: the indices of a client are the same in each of its steps, so only the noise can differ.
    feed = make_feed(plan=BatchPlan(batch_size=9, local_steps=3))
    noise = []
    for round_index in (0, 1):
        for batches in play(feed, round_index).values():
            noise += [tuple(example[1:]) for _, data in batches for example in data]
    assert len(noise) == 2 * 3 * 12
    for source in zip(*noise):  # torch, NumPy, Python: no number twice
        assert len(set(source)) == len(source)


def test_what_the_consumer_does_to_the_generators_changes_no_batch():
    disturbed = {}
    for client_id, batches in make_feed(collate_fn=mixup).stream(0, (0, 1, 2)):
        disturbed[client_id] = []
        for batch in batches:
            disturbed[client_id].append((batch.size, plain(batch.data)))
            torch.manual_seed(batch.size)
            np.random.seed(batch.size)
            random.seed(batch.size)
    assert disturbed == play(make_feed(collate_fn=mixup))


def rng_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@each_kind
def test_drawing_leaves_the_global_generators_as_they_were(make):
    feed = make()
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    before = rng_states()
    stream = feed.stream(0, (0, 1, 2))
    for _, batches in stream:
        for _ in batches:
            assert rng_states() == before  # between any two batches too
    assert rng_states() == before


def test_reading_in_bulk_gives_the_batches_of_reading_one_by_one():
    bulk, single = make_feed(tensor_dataset()), make_feed(SameTensors())
    assert play(bulk, 2) == play(single, 2)
    for (_, left), (_, right) in zip(bulk.stream(0, (1,)), single.stream(0, (1,))):
        for a, b in zip(left, right):
            assert type(a.data) is type(b.data) is list
            assert [t.dtype for t in a.data] == [t.dtype for t in b.data]


def test_batches_are_loaded_only_as_they_are_drawn():
    loaded = []

    class Recording(Augmented):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    stream = make_feed(Recording(), plan=BatchPlan(batch_size=2)).stream(0, (0, 1))
    assert loaded == []
    _, batches = next(stream)
    assert loaded == []
    assert next(batches).size == 2
    assert loaded == [0, 2]
    _, batches = next(stream)  # the rest of client 0 is never loaded
    next(batches)
    assert loaded == [0, 2, 1, 3]


def test_a_dataset_that_loads_many_at_once_is_asked_for_many():
    asked = []

    class Many(Augmented):
        def __getitems__(self, indices):
            asked.append(indices)
            return (self[index] for index in indices)

    assert ids(play(make_feed(Many(), plan=BatchPlan(batch_size=2)), cohort=(1,))[1]) == [[1, 3], [5]]
    assert asked == [[1, 3], [5]]


def test_a_custom_collate_function_is_used_on_a_dataset_of_tensors():
    feed = make_feed(tensor_dataset(), plan=BatchPlan(batch_size=3), collate_fn=lambda examples: len(examples))
    assert play(feed, cohort=(0,)) == {0: [(3, 3), (2, 2)]}


def test_a_local_batch_is_the_collated_data_and_its_size():
    feed = make_feed(tensor_dataset(), plan=BatchPlan(batch_size=2))
    _, batches = next(feed.stream(0, (1,)))
    batch = next(batches)
    assert isinstance(batch, LocalBatch)
    assert batch.size == 2
    # Examples 1 and 3: inputs 1, 3 and classes 1 % 3, 3 % 3.
    assert plain(batch.data) == [[[1.0], [3.0]], [1, 0]]


def test_num_examples_is_the_size_of_the_partition():
    feed = make_feed()
    assert [feed.num_examples(k) for k in range(3)] == [5, 3, 4]


# With worker processes


def test_workers_give_the_batches_of_the_main_process():
    alone, shared = make_feed(collate_fn=mixup), make_feed(collate_fn=mixup, num_workers=2)
    for round_index, cohort in [(0, (0, 1, 2)), (1, (2, 0)), (0, (0, 1, 2))]:  # the last again, by the same workers
        assert play(shared, round_index, cohort) == play(alone, round_index, cohort)


def test_workers_leave_the_global_generators_as_they_were():
    feed = make_feed(num_workers=1)
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    before = rng_states()
    play(feed)
    assert rng_states() == before


def test_batches_not_taken_from_workers_are_skipped():
    feed, expected = make_feed(num_workers=2), play(make_feed())
    taken = {}
    for client_id, batches in feed.stream(0, (0, 1, 2)):
        number = {0: 1, 1: 0, 2: 4}[client_id]  # one of six, none of four, all four
        taken[client_id] = [(b.size, plain(b.data)) for b in itertools.islice(batches, number)]
    assert taken == {0: expected[0][:1], 1: [], 2: expected[2]}


def test_a_round_left_half_way_does_not_disturb_the_next_one():
    feed = make_feed(num_workers=2)
    stream = feed.stream(0, (0, 1, 2))
    _, batches = next(stream)
    next(batches)
    del batches, stream
    assert play(feed, 1) == play(make_feed(), 1)


_worker = None


def remember_worker(worker_id):
    global _worker
    _worker = worker_id


class FromWorker(Augmented):
    def __getitem__(self, index):
        return -1 if _worker is None else _worker


def test_the_users_worker_init_fn_is_run_in_each_worker():
    feed = make_feed(FromWorker(), num_workers=2, worker_init_fn=remember_worker, plan=BatchPlan(batch_size=1))
    values = [value for batches in play(feed).values() for _, data in batches for value in data]
    assert len(values) == 12
    assert set(values) == {0, 1}
    assert _worker is None  # not in this process
