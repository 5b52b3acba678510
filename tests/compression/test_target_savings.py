"""Thresholds that change: a function of the round, and steering to a wanted saving."""

import functools
import math

import pytest
import torch
from conftest import Recorder

from lightning_lbgm import LBGMFederated
from lightning_lbgm.compression import (
    NO_CONTEXT,
    Context,
    Decision,
    ErrorFeedback,
    LookBack,
    RoundResult,
    TargetSavings,
    TopK,
    as_chain,
)
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense

LAYOUT = Layout([(12, 10), 60, (8, 5)])
SIZE = 220


# A function of the round


def halving(round_index):
    return 0.8 / 2**round_index


def test_a_function_is_asked_with_the_index_of_the_round():
    # l = (1, 0), g = (1, 1): error 0.5, which is at most 0.8 / 2^t in round 0 alone, where there is no LBG otherwise.
    stage = LookBack(halving)
    decisions = []
    for round_index in (0, 1, 2):
        state = stage.init()
        stage.encode(Dense(torch.tensor([1.0, 0.0])), state)
        context = Context(round_index, {}, seed=0, path=(3,))
        decisions.append(stage.encode(Dense(torch.tensor([1.0, 1.0])), state, context).decision)
    assert [decision.threshold for decision in decisions] == [0.8, 0.4, 0.2]
    assert [decision.recycled for decision in decisions] == [(True,), (False,), (False,)]
    assert [decision.errors for decision in decisions] == [(0.5,)] * 3


def test_a_function_that_returns_0_sends_everything_and_one_that_returns_1_recycles_all_it_can():
    update = Dense(torch.tensor([1.0, 2.0]))
    for value, recycled in ((0, False), (0.0, False), (1, True), (1.0, True)):
        stage = LookBack(lambda round_index, value=value: value)
        state = stage.init()
        assert stage.encode(update, state).decision.recycled == (False,)
        assert stage.encode(update, state).decision.recycled == (recycled,)
        assert stage.encode(update, state).decision.threshold == value


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_constant_function_equals_the_number(granularity):
    generator = torch.Generator().manual_seed(0)
    number, function = LookBack(0.3, granularity), LookBack(lambda round_index: 0.3, granularity)
    states = number.init(), function.init()
    base = torch.randn(12, generator=generator)
    for index in range(12):
        update = Dense(base + 0.6 * torch.randn(12, generator=generator), (7, 5))
        results = [stage.encode(update, state, Context(index)) for stage, state in zip((number, function), states)]
        assert repr(results[0].decision) == repr(results[1].decision)
        assert results[0].payload.to_bytes() == results[1].payload.to_bytes()


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf"), None, "0.2", True, torch.tensor(0.2)])
def test_what_a_function_must_not_return_is_refused_by_name_value_and_round(value):
    stage = LookBack(lambda round_index: value if round_index == 7 else 0.2)
    state = stage.init()
    stage.encode(Dense(torch.ones(2)), state, Context(6))
    with pytest.raises(ValueError, match=r"LookBack\(threshold=") as info:
        stage.encode(Dense(torch.ones(2)), state, Context(7))
    assert repr(value) in str(info.value)
    assert "round 7" in str(info.value)


def test_a_function_is_refused_in_the_first_round_already_where_there_is_nothing_to_test():
    stage = LookBack(lambda round_index: 2.0)
    with pytest.raises(ValueError, match=r"2\.0 for round 0"):
        stage.encode(Dense(torch.ones(2)), stage.init(), NO_CONTEXT)


def test_the_representation_names_the_function_and_shows_the_target():
    assert "halving" in repr(LookBack(halving))
    assert " at 0x" not in repr(LookBack(halving))  # it would differ from run to run
    assert repr(LookBack(TargetSavings(0.9))).startswith("LookBack(threshold=TargetSavings(0.9, horizon=5)")


# Arguments of the target


@pytest.mark.parametrize("savings", [1, 1.0, -0.1, 90, float("nan"), float("inf")])
def test_a_saving_outside_its_range_is_refused_by_name_and_value(savings):
    with pytest.raises(ValueError, match=r"TargetSavings\(savings=") as info:
        TargetSavings(savings)
    assert repr(savings) in str(info.value)


@pytest.mark.parametrize("savings", ["0.9", None, True, [0.9]])
def test_a_saving_that_is_no_number_is_refused_by_name_and_value(savings):
    with pytest.raises(TypeError, match=r"TargetSavings\(savings=") as info:
        TargetSavings(savings)
    assert repr(savings) in str(info.value)


def test_a_horizon_that_is_no_positive_whole_number_is_refused_by_name_and_value():
    for horizon in (0, -3):
        with pytest.raises(ValueError, match=r"TargetSavings\(horizon=") as info:
            TargetSavings(0.5, horizon)
        assert repr(horizon) in str(info.value)
    for horizon in (2.5, "5", True, None):
        with pytest.raises(TypeError, match=r"TargetSavings\(horizon=") as info:
            TargetSavings(0.5, horizon)
        assert repr(horizon) in str(info.value)


# One step of the steering, by hand


def result(sent, errors, recycled, layout=(10,), dense=320):
    decisions = tuple(Decision((flag,), (error,), (0.0,), 0.5) for error, flag in zip(errors, recycled))
    values = torch.zeros(sum(layout))
    return RoundResult(Layout(layout), values, values, tuple(sent), (dense,) * len(sent), decisions)


def test_the_threshold_lets_as_many_send_in_full_as_the_budget_allows_by_hand():
    # Four clients, 320 bits each in full, half to be saved, made up for in 5 rounds.
    target = TargetSavings(0.5)
    state = target.init()
    # All send for the first time: nothing to go by yet.
    target.update(state, result([320] * 4, [1.0] * 4, [False] * 4))
    assert state["threshold"] == 1.0
    # All recycle. Sent 1408 of 2560: allowed are 640 + (1280 - 1408) / 5 = 614.4, one update: the largest error.
    target.update(state, result([32] * 4, [0.1, 0.4, 0.3, 0.2], [True] * 4))
    assert state["threshold"] == 0.3
    # One sent in full: 1824 of 3840: allowed are 640 + (1920 - 1824) / 5 = 659.2, two updates.
    target.update(state, result([320, 32, 32, 32], [0.6, 0.05, 0.2, 0.3], [False, True, True, True]))
    assert state["threshold"] == 0.2


def test_the_cost_of_a_full_update_is_what_a_compressor_before_makes_of_it_by_hand():
    # In full 80 of 320 bits. Round 0: sent 320 of 1280. Round 1: 80 + 3 * 32 = 176, in all 496 of 2560, where a fifth
    # of it is 512. Allowed are 256 + (512 - 496) / 5 = 259.2: three updates, and the fourth error is the threshold.
    target = TargetSavings(0.8)
    state = target.init()
    target.update(state, result([80] * 4, [1.0] * 4, [False] * 4))
    target.update(state, result([80, 32, 32, 32], [0.9, 0.1, 0.4, 0.6], [False, True, True, True]))
    assert state["threshold"] == 0.1


def test_with_room_for_all_nothing_is_recycled():
    target = TargetSavings(0.2)
    state = target.init()
    target.update(state, result([80] * 4, [1.0] * 4, [False] * 4))
    target.update(state, result([80] * 4, [0.9, 0.1, 0.4, 0.6], [False] * 4))
    assert state["threshold"] == 0.0


def test_with_a_budget_that_is_overdrawn_nobody_sends_in_full_in_the_next_round():
    # Sent 2560 of 2560, a tenth of it is 256: allowed are 128 + (256 - 2560) / 5 = -332.8. The next round's errors are
    # not known: they may be above all of this one's.
    target = TargetSavings(0.9)
    state = target.init()
    target.update(state, result([320] * 4, [1.0] * 4, [False] * 4))
    target.update(state, result([320] * 4, [0.5, 0.1, 0.4, 0.6], [False] * 4))
    assert state["threshold"] == 1.0


def test_the_clients_of_a_round_use_the_threshold_that_the_server_set_after_the_last():
    chain = as_chain([ErrorFeedback([TopK(1.0), LookBack(TargetSavings(0.5))])])
    shared = chain.init_shared()
    state = chain.init()
    chain.encode(Dense(torch.tensor([1.0, 0.0])), state, Context(0, shared))
    target = shared["stages"][0]["stages"][1]
    assert target == {"threshold": 1.0, "sent": 0, "dense": 0, "ratio": 1.0}
    target["threshold"] = 0.375
    decision = chain.encode(Dense(torch.tensor([1.0, 1.0])), state, Context(1, shared)).decision
    assert decision.threshold == 0.375
    assert decision.recycled == (False,)
    rounds = result([64], [0.5], [False], layout=(2,), dense=64)
    chain.end_round(shared, rounds, Context(1, shared))
    assert target["sent"] == target["dense"] == 64


# Steering a simulated run


def simulate(uplink, rounds=60, clients=20, cohort=None, drift=0.3, noise=0.5, seed=0):
    """Clients whose directions drift, with noisy updates of different length; uplink counted as a run counts it.

    Returns:
        The saving over the run, and of each round what was recycled, one flag a test.
    """
    chain = as_chain(uplink)
    shared, states = chain.init_shared(), {}
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(clients, SIZE, generator=generator)
    lengths = 0.5 + torch.rand(clients, generator=generator)
    sent = dense = 0
    recycled = []
    for index in range(rounds):
        directions = math.sqrt(1 - drift**2) * directions
        directions += drift * torch.randn(clients, SIZE, generator=generator)
        members = torch.randperm(clients, generator=generator)[:cohort].sort().values.tolist()
        bits, decisions, mean = [], [], torch.zeros(SIZE)
        for client in members:
            values = lengths[client] * (directions[client] + noise * torch.randn(SIZE, generator=generator))
            state = states.setdefault(client, chain.init())
            context = Context(index, shared, seed, (client,))
            encoded = chain.encode(Dense(values, LAYOUT), state, context)
            encoded.decoded.add_to(mean, 1 / len(members))
            bits.append(encoded.payload.num_bits)
            decisions.append(encoded.decision)
        full = (32 * SIZE,) * len(members)
        seen = RoundResult(LAYOUT, torch.ones(SIZE), mean, tuple(bits), full, tuple(decisions))
        chain.end_round(shared, seen, Context(index, shared, seed, (-1,)))
        sent, dense = sent + sum(bits), dense + sum(full)
        recycled.append([flag for decision in decisions for flag in decision.recycled])
    return 1 - sent / dense, recycled


UPLINKS = {
    "model": lambda target: [LookBack(target)],
    "layer": lambda target: [LookBack(target, "layer")],
    "rank 4": lambda target: [LookBack(target, rank=4)],
    "rank 4 by layer": lambda target: [LookBack(target, "layer", rank=4)],
    "error feedback": lambda target: [ErrorFeedback(LookBack(target))],
    "error feedback, rank 4": lambda target: [ErrorFeedback(LookBack(target, rank=4))],
}


@pytest.mark.parametrize("savings", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("name", UPLINKS)
def test_the_saving_of_a_run_is_the_one_wanted(name, savings):
    saving, recycled = simulate(UPLINKS[name](TargetSavings(savings)))
    assert saving == pytest.approx(savings, abs=0.02)
    assert not all(flag for flags in recycled[5:] for flag in flags)  # it does not stop sending in full


@pytest.mark.parametrize("savings", [0.8, 0.9])
@pytest.mark.parametrize("feedback", [False, True])
def test_the_saving_after_a_sparsifier_is_the_one_wanted(savings, feedback):
    stages = [TopK(0.3), LookBack(TargetSavings(savings))]
    saving, _ = simulate([ErrorFeedback(stages)] if feedback else stages)
    assert saving == pytest.approx(savings, abs=0.02)


@pytest.mark.parametrize("savings", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("name", ["model", "layer", "rank 4"])
def test_the_saving_with_partial_participation_is_the_one_wanted(name, savings):
    saving, _ = simulate(UPLINKS[name](TargetSavings(savings)), rounds=90, clients=24, cohort=8)
    assert saving == pytest.approx(savings, abs=0.02)


@pytest.mark.parametrize(("drift", "noise"), [(0.05, 0.1), (1.0, 0.0), (0.01, 3.0)])
def test_the_saving_is_the_one_wanted_whatever_the_updates_are_like(drift, noise):
    # Nearly constant, without any direction in common, and nearly all noise.
    saving, _ = simulate(UPLINKS["model"](TargetSavings(0.8)), drift=drift, noise=noise)
    assert saving == pytest.approx(0.8, abs=0.02)


def test_a_short_horizon_makes_up_for_the_first_round_sooner():
    # Round 0 goes in full and round 1 is recycled, 1 of 2. To save a fifth, with horizon 1, the next rounds go in full:
    # 1 of 5 is saved after round 4. With horizon 50, some 0.8 of each round are sent, and 1.8 of 6 are saved.
    near, far = (simulate(UPLINKS["model"](TargetSavings(0.2, horizon=horizon)), rounds=6)[0] for horizon in (1, 50))
    assert near == pytest.approx(0.2, abs=0.03)
    assert 0.27 < far < 0.4


def test_nothing_is_recycled_where_a_compressor_before_saves_more_than_wanted():
    # Without errors to go by, round 1 recycles what there is.
    saving, recycled = simulate([TopK(0.3), LookBack(TargetSavings(0.5))], rounds=20)
    alone, _ = simulate([TopK(0.3), LookBack(0.0)], rounds=20)
    assert not any(flag for flags in recycled[2:] for flag in flags)
    assert saving == pytest.approx(alone, abs=0.02)
    assert saving > 0.6


def test_the_clients_that_turned_most_are_those_that_send_in_full():
    chain = as_chain([LookBack(TargetSavings(0.75))])
    shared, states = chain.init_shared(), [chain.init() for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, SIZE, generator=generator)
    counts = [0] * 8
    for index in range(60):
        # Clients 0 and 1 take another direction each round, the rest keep theirs up to some noise.
        directions[:2] = torch.randn(2, SIZE, generator=generator)
        bits, decisions = [], []
        for client, state in enumerate(states):
            values = directions[client] + 0.3 * torch.randn(SIZE, generator=generator)
            encoded = chain.encode(Dense(values, LAYOUT), state, Context(index, shared, 0, (client,)))
            bits.append(encoded.payload.num_bits)
            decisions.append(encoded.decision)
            counts[client] += not encoded.decision.recycled[0] and index > 0
        mean = torch.zeros(SIZE)
        seen = RoundResult(LAYOUT, mean, mean, tuple(bits), (32 * SIZE,) * 8, tuple(decisions))
        chain.end_round(shared, seen, Context(index, shared, 0, (-1,)))
    assert min(counts[:2]) >= 40, counts
    assert max(counts[2:]) <= 10, counts


# Through the Trainer


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_run_through_the_trainer_saves_what_is_wanted(fit, granularity):
    recorder = Recorder()
    uplink = [LookBack(TargetSavings(0.7), granularity)]
    strategy = LBGMFederated(num_clients=6, uplink=uplink, local_steps=2, seed=0)
    trainer, _ = fit(strategy, batch_size=4, shuffle=True, max_epochs=60, callbacks=[recorder])
    # A layer has 18 or 3 parameters, so that a coefficient and the framing of a layer take a share of it.
    assert float(trainer.callback_metrics["comm/savings"]) == pytest.approx(0.7, abs=0.03)
    sent = sum(client.uplink_bits for report in recorder.reports for client in report.clients)
    dense = 60 * 6 * 21 * 32
    assert float(trainer.callback_metrics["comm/savings"]) == pytest.approx(1 - sent / dense, abs=1e-6)
    # All clients of a round have the same threshold, and it is told in the metrics.
    for report, metrics in zip(recorder.reports, recorder.callback_metrics):
        (threshold,) = {client.decision.threshold for client in report.clients}
        assert metrics["lbgm/threshold"] == pytest.approx(threshold, abs=1e-6)
    assert len({metrics["lbgm/threshold"] for metrics in recorder.callback_metrics}) > 10


def test_a_resumed_run_is_steered_on(fit, tmp_path):
    def run(max_epochs, **kwargs):
        recorder = Recorder()
        strategy = LBGMFederated(num_clients=4, uplink=[LookBack(TargetSavings(0.6))], local_steps=2, seed=0)
        trainer, _ = fit(strategy, batch_size=4, shuffle=True, max_epochs=max_epochs, callbacks=[recorder], **kwargs)
        return trainer, recorder

    _, unbroken = run(12)
    trainer, _ = run(5)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, resumed = run(12, ckpt_path=tmp_path / "a.ckpt")
    thresholds = [[report.threshold for report in recorder.reports] for recorder in (unbroken, resumed)]
    assert thresholds[0][5:] == thresholds[1]
    assert all(torch.equal(a, b) for a, b in zip(unbroken.params[5:], resumed.params, strict=True))


def test_a_function_of_the_round_through_the_trainer_is_told_in_the_metrics(fit):
    recorder = Recorder()
    strategy = LBGMFederated(num_clients=4, uplink=[LookBack(functools.partial(max, 0))], seed=0)
    with pytest.raises(ValueError, match="returned 2 for round 2"):
        fit(strategy, max_epochs=3, callbacks=[recorder])
    assert [metrics["lbgm/threshold"] for metrics in recorder.callback_metrics] == [0.0, 1.0]
    assert [report.recycled_fraction for report in recorder.reports] == [0.0, 1.0]
