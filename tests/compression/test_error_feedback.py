"""Error feedback: nothing of an update is lost, only delayed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import NO_CONTEXT, Encoded, ErrorFeedback, LookBack, SignSGD, Stage, TopK
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.coefficients import Coefficients

WRAPPED = {
    "topk": lambda: TopK(0.2),
    "sign": lambda: SignSGD(),
    "lookback": lambda: LookBack(0.5),
    "lookback by layer": lambda: LookBack(0.5, "layer"),
    "topk, lookback": lambda: [TopK(0.4), LookBack(0.5)],
    "sign, lookback by layer": lambda: [SignSGD(), LookBack(0.6, "layer")],
    "ef(topk)": lambda: ErrorFeedback(TopK(1.0)),
}
SIZES = (6, 1, 10)


def random_updates(seed, rounds):
    rng, size = np.random.default_rng(seed), sum(SIZES)
    direction = rng.normal(size=size)
    return [torch.tensor(direction + 0.5 * rng.normal(size=size)) for _ in range(rounds)]


@pytest.mark.parametrize("name", WRAPPED)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=8)
def test_what_was_decoded_and_the_residual_sum_to_the_updates(name, seed):
    stage = ErrorFeedback(WRAPPED[name]())
    state = stage.init()
    sent, total = torch.zeros(sum(SIZES), dtype=torch.float64), torch.zeros(sum(SIZES), dtype=torch.float64)
    for update in random_updates(seed, 25):
        encoded = stage.encode(Dense(update, SIZES), state)
        sent += encoded.decoded.dense()
        total += update
        np.testing.assert_allclose((sent + state["residual"]).numpy(), total.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["topk", "sign", "lookback", "topk, lookback"])
def test_the_mean_of_what_is_decoded_tends_to_a_constant_update(name):
    # Without feedback the mean of what is decoded keeps its bias; with it, the bias falls as 1 / rounds.
    rounds, update = 400, random_updates(1, 1)[0]
    stage = ErrorFeedback(WRAPPED[name]())
    state = stage.init()
    sent = torch.zeros_like(update)
    for _ in range(rounds):
        sent += stage.encode(Dense(update, SIZES), state).decoded.dense()
    assert float((sent / rounds - update).norm() / update.norm()) < 0.1


def test_the_residual_is_added_to_the_next_update_by_hand():
    # TopK(0.5) of 2 entries sends one. p1 = (3, 2): sends 3, keeps 2. p2 = (3, 4): sends 4, keeps 3. p3 = (6, 2).
    stage = ErrorFeedback(TopK(0.5))
    state = stage.init()
    for sent, residual in [([3.0, 0.0], [0.0, 2.0]), ([0.0, 4.0], [3.0, 0.0]), ([6.0, 0.0], [0.0, 2.0])]:
        payload = stage.encode(Dense(torch.tensor([3.0, 2.0])), state).payload
        assert payload.dense().tolist() == sent
        assert state["residual"].tolist() == residual


def test_around_look_back_the_residual_is_what_the_lbg_cannot_express():
    # l = (1, 0). p = (2, 1): error = 1 - 4 / 5 = 0.2 <= 0.5, rho = 2, residual (0, 1).
    # p = (1, 0) + (0, 1): error 0.5, rho = 1, residual (0, 1). p = (0, 1) + (0, 1): error 1, refreshed, residual 0.
    stage = ErrorFeedback(LookBack(0.5))
    state = stage.init()
    expected = [
        ([1.0, 0.0], False, [0.0, 0.0]),
        ([2.0, 1.0], True, [0.0, 1.0]),
        ([1.0, 0.0], True, [0.0, 1.0]),
        ([0.0, 1.0], False, [0.0, 0.0]),
    ]
    for update, recycled, residual in expected:
        encoded = stage.encode(Dense(torch.tensor(update)), state)
        payload, decision = encoded
        assert decision.recycled == (recycled,)
        assert isinstance(payload, Coefficients) == recycled
        assert (encoded.needs_state, encoded.updates_state) == (recycled, not recycled)
        assert state["residual"].tolist() == residual
    assert payload.dense().tolist() == [0.0, 2.0]  # with what was kept back


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_the_residual_of_a_recycled_update_is_orthogonal_to_the_lbg_and_as_long_as_the_error_says(seed):
    stage = ErrorFeedback(LookBack(0.7))
    state = stage.init()
    previous = torch.zeros(sum(SIZES), dtype=torch.float64)
    for update in random_updates(seed, 10):
        decision = stage.encode(Dense(update), state).decision
        residual, p = state["residual"], update + previous
        if decision.recycled[0]:
            lbg = Payload.from_state(state["stage"]["stages"][0]["lbgs"][0]["payloads"][0]).dense()
            assert float(residual @ lbg) == pytest.approx(0.0, abs=1e-9 * float(p.norm() * lbg.norm()))
            # |p - proj p|^2 = sin^2(alpha) |p|^2
            assert float(residual @ residual) == pytest.approx(decision.errors[0] * float(p @ p), rel=1e-9)
        else:
            assert not residual.any()
        previous = residual.clone()


@pytest.mark.parametrize("name", WRAPPED)
def test_the_callers_buffer_is_neither_written_to_nor_kept(name):
    stage, other = ErrorFeedback(WRAPPED[name]()), ErrorFeedback(WRAPPED[name]())
    state, other_state = stage.init(), other.init()
    buffer = torch.empty(sum(SIZES), dtype=torch.float64)
    for update in random_updates(3, 8):
        buffer.copy_(update)
        payload = stage.encode(Dense(buffer, SIZES), state).payload
        assert torch.equal(buffer, update)
        reused = [tensor.clone() for tensor in payload.tensors()]
        buffer.fill_(float("nan"))
        fresh = other.encode(Dense(update, SIZES), other_state).payload
        assert all(torch.equal(a, b) for a, b in zip(reused, fresh.tensors(), strict=True))
        assert torch.equal(state["residual"], other_state["residual"])


def test_error_feedback_sends_what_it_wraps_makes_of_the_sum_and_not_a_byte_more():
    for name in ("topk", "sign"):
        plain, wrapped = WRAPPED[name](), ErrorFeedback(WRAPPED[name]())
        state, residual = wrapped.init(), torch.zeros(sum(SIZES), dtype=torch.float64)
        for update in random_updates(0, 5):
            expected = plain.encode(Dense(update + residual, SIZES), {}).payload
            payload = wrapped.encode(Dense(update, SIZES), state).payload
            assert payload.to_bytes() == expected.to_bytes()
            assert payload.num_bits == expected.num_bits
            residual = update + residual - expected.dense()


def test_a_new_client_has_no_residual_and_its_own_state():
    stage = ErrorFeedback(LookBack(0.2))
    one, other = stage.init(), stage.init()
    assert one["residual"] is None
    stage.encode(Dense(torch.ones(3)), one)
    assert other["residual"] is None
    assert other["stage"] == {"stages": [{"lbgs": {}, "ages": {}}]}


def test_only_what_wraps_a_terminal_stage_is_terminal():
    assert ErrorFeedback(LookBack(0.2)).terminal
    assert ErrorFeedback([TopK(0.1), LookBack(0.2)]).terminal
    assert not ErrorFeedback(TopK(0.1)).terminal


@pytest.mark.parametrize("stage", [None, 0.1, "TopK", [], (), {}, TopK])
def test_what_is_no_stage_is_refused_by_name_and_value(stage):
    with pytest.raises(TypeError, match=r"ErrorFeedback\(stage=") as info:
        ErrorFeedback(stage)
    assert repr(stage) in str(info.value)


def test_a_list_with_something_else_is_refused_by_value():
    with pytest.raises(TypeError, match=r"'topk'"):
        ErrorFeedback([TopK(0.1), "topk"])


def test_the_representation_shows_what_is_wrapped():
    assert repr(ErrorFeedback(TopK(0.1))) == "ErrorFeedback(TopK(fraction=0.1))"
    assert (
        repr(ErrorFeedback([SignSGD(), LookBack(0.2)]))
        == "ErrorFeedback([SignSGD(), LookBack(threshold=0.2, granularity='model')])"
    )


class AsItIs(Stage):
    """Send the update's own memory."""

    def encode(self, update, state, context=NO_CONTEXT):
        return Encoded(Dense(update.dense(), update.layout))


@pytest.mark.parametrize("stage", [AsItIs(), [AsItIs(), AsItIs()], LookBack(1e-9), ErrorFeedback(AsItIs())], ids=repr)
def test_the_residual_is_not_written_over_what_is_sent(stage):
    stage = ErrorFeedback(stage)
    state = stage.init()
    for update in random_updates(0, 4):
        given_ = update.clone()
        encoded = stage.encode(Dense(update, SIZES), state)
        assert torch.equal(encoded.payload.dense(), given_)
        assert torch.equal(encoded.decoded.dense(), given_)
        assert torch.equal(update, given_)
        assert not state["residual"].any()
