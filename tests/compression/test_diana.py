"""Differences to a running mean: DIANA against its formula, at both ends, and what its mean tends to."""

import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lbgm import LBGMFederated
from lightning_lbgm.compression import (
    ATOMO,
    DIANA,
    QSGD,
    Context,
    ErrorFeedback,
    LookBack,
    PowerSGD,
    RandK,
    SignSGD,
    TopK,
    as_chain,
)
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.protocol.message import Message

seeds = st.integers(0, 2**32 - 1)
rates = st.sampled_from([0.05, 0.3, 0.5, 1.0])
LAYOUT = Layout([(4, 5), 6, (3, 2, 2, 2), ()])
SIZE = 51
CORRECTIONS = {
    "topk": TopK(0.3),
    "all": [TopK(1.0)],
    "sign": SignSGD(),
    "topk, sign": [TopK(0.4), SignSGD()],
    "qsgd": QSGD(7, bucket_size=8),
    "randk": RandK(0.3),
    "atomo": ATOMO(1),
    "powersgd": PowerSGD(1),
    "ef(topk)": ErrorFeedback(TopK(0.2)),
}


def noisy(seed, rounds, noise=0.5):
    """A constant and noise."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=SIZE)
    for _ in range(rounds):
        yield centre + noise * rng.normal(size=SIZE)


def dense(values, layout=LAYOUT, dtype=torch.float64):
    return Dense(torch.tensor(values, dtype=dtype), layout)


def context(index):
    return Context(index, {}, seed=0, path=(5,))


def largest(values, number):
    """The entries of the largest magnitudes, all others zero."""
    out = np.zeros_like(values)
    chosen = np.argsort(-np.abs(values))[:number]
    out[chosen] = values[chosen]
    return out


def across(payload):
    """What the server receives."""
    return Message.from_bytes(Message(5, payload).to_bytes(), LAYOUT).payload


# Against the formula


def test_four_rounds_by_hand():
    # One of two entries is sent, and half of it goes into the mean: (4, 2) sends 4, which is the mean. (4, 6) less
    # (4, 0) sends 6: the mean is (4, 3). (8, 2) less it is (4, -1) and sends 4: seen (8, 3), the mean is (6, 3).
    # (6, 3) less it is nothing.
    stage = DIANA(TopK(0.5), rate=0.5)
    state = stage.init()
    for g, sent, seen, mean in [
        ([4.0, 2.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]),
        ([4.0, 6.0], [0.0, 6.0], [4.0, 6.0], [4.0, 3.0]),
        ([8.0, 2.0], [4.0, 0.0], [8.0, 3.0], [6.0, 3.0]),
        ([6.0, 3.0], [0.0, 0.0], [6.0, 3.0], [6.0, 3.0]),
    ]:
        encoded = stage.encode(dense(g, [2]), state)
        assert encoded.payload.dense().tolist() == sent
        assert encoded.decoded.dense().tolist() == seen
        assert state["mean"].tolist() == mean


@given(seed=seeds, rate=rates)
@settings(deadline=None, max_examples=20)
def test_the_rounds_equal_a_reference_in_numpy(seed, rate):
    # h <- h + rate * c with c = TopK(g - h), and h + c is seen; what comes first is the mean.
    stage = DIANA(TopK(16 / 51), rate)
    state, mean = stage.init(), None
    for g in noisy(seed, 12):
        encoded = stage.encode(dense(g), state)
        if mean is None:
            c = seen = mean = largest(g, 16)
        else:
            c = largest(g - mean, 16)
            seen, mean = mean + c, mean + rate * c
        np.testing.assert_allclose(encoded.payload.dense().numpy(), c, atol=1e-12)
        np.testing.assert_allclose(encoded.decoded.dense().numpy(), seen, atol=1e-12)
        np.testing.assert_allclose(state["mean"].numpy(), mean, atol=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_what_is_seen_can_be_added_in_any_proportion(rate):
    stage = DIANA(TopK(0.4), rate)
    state = stage.init()
    for g in noisy(0, 4):
        seen = stage.encode(dense(g), state).decoded
        out = torch.ones(SIZE, dtype=torch.float64)
        seen.add_to(out, -2.0)
        np.testing.assert_allclose(out.numpy(), 1 - 2 * seen.dense().numpy(), atol=1e-12)


def test_a_rate_of_one_remembers_what_was_seen_last():
    stage = DIANA(TopK(0.4), rate=1.0)
    state = stage.init()
    for g in noisy(1, 5):
        encoded = stage.encode(dense(g), state)
        np.testing.assert_allclose(encoded.decoded.dense().numpy(), state["mean"], atol=1e-12)


# Both ends


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_see_and_remember_the_same_bit_for_bit(name, dtype):
    stage = DIANA(CORRECTIONS[name], rate=0.3)
    client, server = stage.init(), stage.init()
    for index, g in enumerate(noisy(2, 8)):
        before = client["mean"].clone() if index else torch.zeros(SIZE, dtype=dtype)
        encoded = stage.encode(dense(g, dtype=dtype), client, context(index))
        payload = encoded.payload
        decoded = stage.decode(across(payload), server, context(index))
        assert decoded.layout == LAYOUT
        assert decoded.dtype == dtype
        assert torch.equal(decoded.dense(), encoded.decoded.dense())
        assert torch.equal(client["mean"], server["mean"])
        # What crossed, on top of the mean of before.
        expected = before.double() + payload.dense().double()
        np.testing.assert_allclose(decoded.dense().double().numpy(), expected.numpy(), atol=1e-5)
        # The mean moves by a share of it; the first is taken as it is.
        moved = client["mean"].double() - before.double()
        np.testing.assert_allclose(moved.numpy(), (0.3 if index else 1.0) * payload.dense().double(), atol=1e-5)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_message_is_the_corrections_and_costs_not_a_bit_more(name):
    stage, alone = DIANA(CORRECTIONS[name], rate=0.4), as_chain(CORRECTIONS[name])
    state, alone_state, mean = stage.init(), alone.init(), np.zeros(SIZE)
    for index, g in enumerate(noisy(3, 6)):
        payload = stage.encode(dense(g, dtype=torch.float32), state, context(index)).payload
        difference = dense(g, dtype=torch.float32).values - torch.tensor(mean, dtype=torch.float32)
        expected = alone.encode(Dense(difference, LAYOUT), alone_state, context(index)).payload
        assert payload.num_bits == expected.num_bits == 8 * len(payload.to_bytes())
        assert payload.to_bytes() == expected.to_bytes()
        mean = state["mean"].numpy().copy()


@pytest.mark.parametrize("name", ["topk", "topk, sign", "qsgd"])
@given(seed=seeds, rate=rates)
@settings(deadline=None, max_examples=6)
def test_inside_error_feedback_what_was_seen_and_the_residual_sum_to_the_updates(name, seed, rate):
    stage = ErrorFeedback(DIANA(CORRECTIONS[name], rate))
    state, sent, total = stage.init(), np.zeros(SIZE), np.zeros(SIZE)
    for index, g in enumerate(noisy(seed, 15)):
        encoded = stage.encode(dense(g), state, context(index))
        sent += encoded.decoded.dense().numpy()
        total += g
        np.testing.assert_allclose(sent + state["residual"].numpy(), total, atol=1e-9)


# What the mean is good for


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_a_constant_update_is_seen_ever_more_nearly(rate):
    # Each round takes a tenth of the entries nearer by the rate: after 120 rounds each had its turn 12 times.
    stage, g = DIANA(TopK(0.1), rate), next(noisy(4, 1))
    state, lost = stage.init(), []
    for _ in range(120):
        seen = stage.encode(dense(g), state).decoded.dense().numpy()
        lost.append(np.linalg.norm(seen - g) / np.linalg.norm(g))
    assert lost[0] > 0.5  # what the correction alone would leave out in every round
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.85 * (1 - rate) ** 10 + 1e-12


def test_the_mean_tends_to_that_of_noisy_updates_with_an_unbiased_correction():
    # E h <- (1 - rate) E h + rate E g. What is left is noise: of the updates, sqrt(rate / 2) * 0.5 = 0.08 an entry,
    # and of the quantizer, whose steps are a third of the bucket's largest entry, about 1.5 in all, in its proportion.
    stage = DIANA(QSGD(3, bucket_size=8), rate=0.05)
    state, centre = stage.init(), np.random.default_rng(5).normal(size=SIZE)
    means = []
    for index, g in enumerate(noisy(5, 1500)):
        stage.encode(dense(g), state, context(index))
        if index >= 100:
            means.append(state["mean"].numpy().copy())
        if index == 400:
            assert np.sqrt(np.mean((state["mean"].numpy() - centre) ** 2)) < 0.2
    # The mean over 1400 rounds knows each entry to about sqrt(0.5 ** 2 + quantizer) / sqrt(1400) = 0.02.
    np.testing.assert_allclose(np.mean(means, axis=0), centre, atol=0.08)


def test_the_mean_is_that_of_noisy_updates_where_nothing_is_lost():
    # h is the exponential mean of all updates, with weights of the closed form; the first keeps what is left over.
    stage, rate = DIANA(TopK(1.0), rate=0.1), 0.1
    state, updates = stage.init(), list(noisy(6, 30))
    for g in updates:
        stage.encode(dense(g), state)
    weights = rate * (1 - rate) ** np.arange(29, -1, -1)
    weights[0] = (1 - rate) ** 29
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(state["mean"].numpy(), weights @ np.stack(updates), atol=1e-12)


# State


def test_a_new_client_has_no_mean_and_reads_none():
    stage = DIANA(TopK(0.5))
    state = stage.init()
    assert state["mean"] is None
    for index in range(3):
        encoded = stage.encode(dense([4.0, 2.0], [2]), state)
        assert (encoded.needs_state, encoded.updates_state) == (index > 0, True)
        assert encoded.decision is None


@pytest.mark.parametrize("correction", [TopK(0.3), LookBack(0.0)], ids=repr)
def test_a_forgotten_mean_is_begun_anew_and_the_corrections_past_with_it(correction):
    stage = DIANA(correction, rate=0.2)
    client, fresh, server = stage.init(), stage.init(), stage.init()
    *past, newest = noisy(7, 4)
    for g in past:
        stage.encode(dense(g), client)
    assert client["mean"] is not None
    stage.forget(client)
    assert client == fresh
    one, other = stage.encode(dense(newest), client), stage.encode(dense(newest), fresh)
    assert not one.needs_state
    assert one.payload.to_bytes() == other.payload.to_bytes()
    # A server that knows nothing takes it, and is in step from then on.
    assert torch.equal(stage.decode(across(one.payload), server).dense(), one.decoded.dense())
    assert torch.equal(server["mean"], client["mean"])


def test_what_the_correction_keeps_back_survives_what_is_forgotten():
    stage = DIANA(ErrorFeedback(TopK(0.5)))
    state = stage.init()
    stage.encode(dense([4.0, 2.0], [2]), state)  # 2 is kept back
    stage.forget(state)
    assert stage.encode(dense([1.0, 1.0], [2]), state).payload.dense().tolist() == [0.0, 3.0]


def test_the_mean_is_of_the_differences_dtype_and_not_the_messages_memory():
    stage = DIANA(TopK(1.0))
    server = stage.init()
    payload = dense([1.0, 2.0], [2], torch.float32)
    stage.decode(payload, server)
    payload.values.zero_()
    assert server["mean"].tolist() == [1.0, 2.0]
    assert server["mean"].dtype == torch.float32


def test_a_look_back_inside_decides_on_the_differences():
    # (1, 0) in full is the mean. (3, 0) less it is (2, 0): recycled by 2. The mean moves half of it.
    stage = DIANA(LookBack(0.1), rate=0.5)
    state = stage.init()
    assert stage.encode(dense([1.0, 0.0], [2]), state).decision.recycled == (False,)
    encoded = stage.encode(dense([3.0, 0.0], [2]), state)
    assert (encoded.decision.recycled, encoded.decision.coefficients) == ((True,), (2.0,))
    assert isinstance(encoded.payload, Coefficients)
    assert encoded.decoded.dense().tolist() == [3.0, 0.0]
    assert state["mean"].tolist() == [2.0, 0.0]


# Settings


@pytest.mark.parametrize(
    ("rate", "error"),
    [(0, ValueError), (1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("a", TypeError)],
)
def test_a_rate_that_is_no_share_is_refused_by_name_and_value(rate, error):
    with pytest.raises(error, match=r"DIANA\(rate=") as info:
        DIANA(TopK(0.1), rate)
    assert repr(rate) in str(info.value)


@pytest.mark.parametrize("rate", [True, None])
def test_a_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(TypeError, match=rf"DIANA\(rate=.*{rate}"):
        DIANA(TopK(0.1), rate)


@pytest.mark.parametrize("correction", [None, "TopK", [], (), 0.1, {}, TopK], ids=repr)
def test_a_correction_that_is_no_stage_is_refused_by_name_and_value(correction):
    with pytest.raises(TypeError, match=r"DIANA\(correction=") as info:
        DIANA(correction)
    assert repr(correction) in str(info.value)


def test_a_list_with_something_else_is_refused_by_value():
    with pytest.raises(TypeError, match="'topk'"):
        DIANA([TopK(0.1), "topk"])


def test_nothing_can_follow_and_the_representation_is_the_call():
    assert DIANA(TopK(0.1)).terminal
    with pytest.raises(ValueError, match="last stage"):
        as_chain([DIANA(TopK(0.1)), TopK(0.1)])
    assert repr(DIANA(TopK(0.1))) == "DIANA(correction=[TopK(fraction=0.1)], rate=0.05)"


# Whole runs


def run(fit, uplink, rounds, **kwargs):
    torch.manual_seed(0)
    recorder = Recorder()
    strategy = LBGMFederated(num_clients=4, uplink=uplink, seed=0)
    callbacks = [recorder, *kwargs.pop("callbacks", [])]
    trainer, _ = fit(strategy, module=TinyModule(), max_epochs=rounds, callbacks=callbacks, **kwargs)
    return trainer, recorder


def test_a_run_learns_at_the_corrections_cost(fit):
    trainer, recorder = run(fit, [ErrorFeedback(DIANA(TopK(0.2)))], 20)
    _, plain = run(fit, [ErrorFeedback(TopK(0.2))], 20)
    assert {client.outcome for report in recorder.reports for client in report.clients} == {"sent"}
    # Places take fewer or more bytes by where they lie: of 4 values in 21, a byte a place at the most.
    costs = [[client.uplink_bits for r in rec.reports for client in r.clients] for rec in (recorder, plain)]
    assert max(costs[0]) <= max(costs[1]) + 32
    assert trainer.strategy.ledger.savings > 0.6
    losses = [np.mean([client.loss for client in report.clients]) for report in recorder.reports]
    assert losses[-1] < 0.6 * losses[0]
    # The first round is that of the correction alone; then the mean takes part.
    assert torch.equal(recorder.params[0], plain.params[0])
    assert not torch.equal(recorder.params[2], plain.params[2])


def test_with_all_sent_a_run_is_federated_averaging(fit):
    _, recorder = run(fit, [DIANA(TopK(1.0), rate=0.3)], 5)
    _, plain = run(fit, [], 5)
    for one, other in zip(recorder.params, plain.params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_resuming_equals_the_unbroken_run_bitwise(fit, tmp_path):
    uplink = [ErrorFeedback(DIANA([TopK(0.4), QSGD(7)], rate=0.2))]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    unbroken, recorder = run(fit, uplink, 6, callbacks=[checkpoint], enable_checkpointing=True)
    resumed, resumed_recorder = run(fit, uplink, 6, ckpt_path=tmp_path / "step=3.ckpt")
    assert len(resumed_recorder.params) == 3
    assert all(torch.equal(a, b) for a, b in zip(recorder.params[3:], resumed_recorder.params, strict=True))
    assert unbroken.strategy.ledger == resumed.strategy.ledger
