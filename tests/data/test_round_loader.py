"""One item of the loader is one communication round."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm.data import BatchPlan, ClientFeed, Round, RoundLoader, sample_cohort

SIZES = (1, 2, 3, 4, 5, 6)


def make_feed(plan=None, seed=9):
    dataset = TensorDataset(torch.arange(sum(SIZES)))
    return ClientFeed(DataLoader(dataset), plan or BatchPlan(batch_size=2), torch.arange(21).split(SIZES), seed)


def test_a_round_knows_the_examples_and_the_steps_of_its_cohort():
    round_ = Round(7, (1, 4, 5), make_feed(BatchPlan(batch_size=2, local_epochs=3)))
    assert round_.index == 7
    assert round_.cohort == (1, 4, 5)
    assert round_.num_examples == (2, 5, 6)
    assert round_.num_steps == (3, 9, 9)  # three passes of ceil(n / 2) batches
    assert Round(0, (1, 4), make_feed(BatchPlan(batch_size=2, local_steps=5))).num_steps == (5, 5)


def test_a_round_streams_its_clients_in_order_with_so_many_steps():
    round_ = Round(0, (2, 0, 4), make_feed())
    drawn = [(client_id, [batch.data[0].tolist() for batch in batches]) for client_id, batches in round_.clients()]
    # Client k holds the numbers from 0 + 1 + ... + k: 3..5, 0, 10..14.
    assert drawn == [(2, [[3, 4], [5]]), (0, [[0]]), (4, [[10, 11], [12, 13], [14]])]
    assert tuple(len(batches) for _, batches in drawn) == round_.num_steps


def test_a_round_streams_the_same_again():
    round_ = Round(3, (1, 5), make_feed(BatchPlan(batch_size=2, shuffle=True)))
    first, second = ([(k, [b.data[0].tolist() for b in batches]) for k, batches in round_.clients()] for _ in range(2))
    assert first == second


def test_the_repr_of_a_round_has_no_data():
    assert repr(Round(2, (0, 1, 3), make_feed())) == "Round(index=2, cohort_size=3)"


@pytest.mark.parametrize("rounds_per_epoch", [1, 4])
def test_the_loader_is_as_long_as_an_epoch(rounds_per_epoch):
    loader = RoundLoader(make_feed(), 2, rounds_per_epoch, lambda: 0)
    assert len(loader) == rounds_per_epoch
    assert len(list(loader)) == rounds_per_epoch


def test_each_round_has_the_cohort_of_its_index():
    indices = iter([0, 1, 5])
    rounds = list(RoundLoader(make_feed(seed=9), 3, 3, lambda: next(indices)))
    assert [round_.index for round_ in rounds] == [0, 1, 5]
    assert [round_.cohort for round_ in rounds] == [sample_cohort(6, 3, seed=9, round_index=t) for t in (0, 1, 5)]


def test_the_next_round_is_asked_only_when_it_is_drawn():
    done = [10]
    loader = RoundLoader(make_feed(), 2, 3, lambda: done[0])
    rounds = iter(loader)
    done[0] = 20  # a checkpoint loaded after the iterator was made
    assert next(rounds).index == 20
    done[0] = 33
    assert next(rounds).index == 33
    assert next(rounds).index == 33  # it does not count by itself
    assert next(rounds, None) is None


def test_the_state_is_the_round_to_come_and_loading_it_changes_nothing():
    done = [4]
    loader = RoundLoader(make_feed(), 2, 1, lambda: done[0])
    assert loader.state_dict() == {"next_round": 4}
    loader.load_state_dict({"next_round": 99})
    assert loader.state_dict() == {"next_round": 4}
    assert next(iter(loader)).index == 4
