"""A federation's round without a Trainer: clients' updates given by hand, and what becomes of them."""

import math

import pytest
import torch
from torch import nn

from lightning_lbgm.clients.base import ClientUpdate, LocalResult
from lightning_lbgm.compression import LookBack, TopK, as_chain
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.data.rounds import Round
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.server import Server
from lightning_lbgm.simulation.checkpoint import load, save
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.log_capture import LogCapture


class Feed:
    """Clients with k + 1 examples each."""

    def num_examples(self, client_id):
        return client_id + 1

    def num_steps(self, client_id):
        return 2

    def work(self, client_id):
        return 2


class Given:
    """Yield given updates instead of training."""

    def __init__(self, updates):
        self.capture = LogCapture()
        self.updates = updates

    def run(self, round_, start):
        for client_id in round_.cohort:
            update = self.updates[client_id]
            if isinstance(update, Exception):
                raise update
            loss = torch.tensor(10.0 * (client_id + 1))
            local = LocalResult(num_steps=2, num_examples=4, loss_sum=loss, metrics={"trained": 1.0})
            yield ClientUpdate(client_id, local, torch.tensor(update), {})


def federate(*stages, weighting="examples", **settings):
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[10.0, 20.0]]))
    flat = FlatParameters(module)
    chain = as_chain(list(stages))
    return Federation(flat, chain, Server(flat), Buffers(module, "average"), weighting, seed=0, **settings), module


def make_round(federation, cohort):
    return Round(federation.round_index, tuple(cohort), Feed())


def play(federation, updates, on_client_end=None, **settings):
    loss = federation.run_clients(make_round(federation, updates), Given(updates), on_client_end, **settings)
    report = federation.finish_round()
    federation.commit()
    return float(loss), report


def test_the_parameters_move_by_the_mean_weighted_by_examples():
    # Clients 0 and 2 have 1 and 3 examples: theta - (0.25 (4, 0) + 0.75 (0, 8)) = (9, 14).
    federation, module = federate()
    loss, report = play(federation, {0: [4.0, 0.0], 2: [0.0, 8.0]})
    assert module.weight.tolist() == [[9.0, 14.0]]
    assert loss == (10.0 + 30.0) / 8  # sums over examples seen
    assert report.update_norm == pytest.approx(math.sqrt(37))
    assert [client.uplink_bits for client in report.clients] == [64, 64]
    assert federation.ledger.uplink_bits == federation.ledger.dense_uplink_bits == 128
    assert federation.round_index == 1


def test_uniform_weights_count_clients_alike():
    federation, module = federate(weighting="uniform")
    play(federation, {0: [4.0, 0.0], 2: [0.0, 8.0]})
    assert module.weight.tolist() == [[8.0, 16.0]]


def test_a_client_whose_update_is_not_finite_is_left_out_and_sends_nothing():
    # Client 2's 3 of 4 examples are missing: client 0's update counts in full.
    federation, module = federate()
    loss, report = play(federation, {0: [4.0, 1.0], 2: [math.inf, 0.0]})
    assert module.weight.tolist() == [[6.0, 19.0]]
    assert [client.outcome for client in report.clients] == ["sent", "rejected"]
    assert [client.uplink_bits for client in report.clients] == [64, 0]
    assert loss == 10.0 / 4


def test_what_is_counted_and_what_is_used_is_the_message():
    # The larger of two entries is sent: a number of 32 bits, and where it stands.
    federation, module = federate(TopK(0.5))
    _, report = play(federation, {1: [3.0, 1.0]}, measure_errors=True)
    assert module.weight.tolist() == [[7.0, 20.0]]
    assert report.clients[0].squared_error == 1.0
    assert report.clients[0].uplink_bits > 32
    assert report.clients[0].dense_bits == 64
    assert report.error.norm == pytest.approx(1.0)
    assert report.error.exact_norm == pytest.approx(math.sqrt(10))


def test_a_client_is_recycled_in_its_second_round_and_told_of_with_its_metrics():
    federation, module = federate(LookBack(0.2))
    seen = []
    for scale in (1.0, 2.0):
        play(federation, {3: [scale, 0.0]}, lambda report, done, total: seen.append((report, done, total)))
    assert [report.outcome for report, _, _ in seen] == ["refreshed", "recycled"]
    assert [(done, total) for _, done, total in seen] == [(1, 1), (1, 1)]
    assert seen[0][0].metrics == {"trained": 1.0}
    assert module.weight.tolist() == [[7.0, 20.0]]


@pytest.mark.parametrize("capacity", [None, 1])
def test_of_more_clients_than_the_capacity_the_oldest_sends_in_full_again(capacity):
    federation, _ = federate(LookBack(1.0), capacity=capacity)
    outcomes = [play(federation, {k: [1.0, 0.0]})[1].clients[0].outcome for k in (0, 1, 0)]
    assert outcomes == ["refreshed", "refreshed", "refreshed" if capacity else "recycled"]


@pytest.mark.parametrize("where", ["clients", "after the server's step"])
def test_a_round_that_breaks_off_leaves_everything_as_before(where):
    federation, module = federate(LookBack(0.5))
    play(federation, {0: [1.0, 0.0], 1: [0.0, 1.0]})
    before, params, bits = repr(save(federation)), module.weight.clone(), federation.ledger.uplink_bits
    updates = {0: [0.0, 5.0], 1: [5.0, 0.0]}
    if where == "clients":
        with pytest.raises(RuntimeError, match="boom"):
            play(federation, {**updates, 2: RuntimeError("boom")})
    else:
        federation.run_clients(make_round(federation, updates), Given(updates))
        federation.finish_round()
        assert federation.round_index == 2
        assert federation.roll_back() == 0
    assert torch.equal(module.weight, params)
    assert repr(save(federation)) == before
    assert federation.ledger.uplink_bits == bits
    # Both are still known: the same directions are recycled.
    assert {c.outcome for c in play(federation, {0: [2.0, 0.0], 1: [0.0, 2.0]})[1].clients} == {"recycled"}


def test_a_saved_federation_goes_on_in_another_one():
    federation, module = federate(LookBack(0.5))
    play(federation, {0: [1.0, 0.0]})
    other, copy = federate(LookBack(0.5))
    copy.load_state_dict(module.state_dict())
    load(other, save(federation))
    for one in (federation, other):
        assert play(one, {0: [3.0, 0.0]})[1].clients[0].outcome == "recycled"
    assert torch.equal(copy.weight, module.weight)
    assert other.ledger == federation.ledger


def test_within_a_round_the_global_model_can_be_seen():
    federation, module = federate()
    updates = {0: [1.0, 1.0]}

    class Training(Given):
        def run(self, round_, start):
            with torch.no_grad():
                module.weight.fill_(99.0)
            yield from super().run(round_, start)

    federation.run_clients(make_round(federation, updates), Training(updates))
    assert module.weight.tolist() == [[99.0, 99.0]]
    with federation.global_model():
        assert module.weight.tolist() == [[10.0, 20.0]]
    assert module.weight.tolist() == [[99.0, 99.0]]
    federation.finish_round()
    assert module.weight.tolist() == [[9.0, 19.0]]
