"""Every stage at every scale: what is true of updates is true of them times 1e-30 and 1e30, in float32 and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uplinks import LAYOUT, SIZE, UPLINKS, updates

from lightning_lbgm.compression import Cast, Context, LookBack, RandK, RoundResult, SignSGD, as_chain
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.low_rank import LowRank
from lightning_lbgm.payloads.rounded import Rounded
from lightning_lbgm.payloads.scaled import Scaled
from lightning_lbgm.protocol.message import Message, MessageError

seeds = st.integers(0, 2**32 - 1)
# Powers of four, whose square roots are exact: 2^100 is 1.3e30.
SCALES = [2.0**-100, 2.0**-66, 2.0**-34, 2.0**34, 2.0**66, 2.0**100]


def rounds(chain, stream, dtype):
    """Yield what the server decodes of one client's updates, the update and the decision, round by round."""
    client, server, shared = chain.init(), chain.init(), chain.init_shared()
    params = torch.linspace(0.5, 1.5, SIZE, dtype=dtype)
    for index, update in enumerate(stream):
        context = Context(index, shared, seed=9, path=(5,))
        encoded = chain.encode(Dense(update.clone(), LAYOUT), client, context)
        decoded = encoded.decoded.dense().clone()
        received = chain.decode(encoded.payload, server, context).dense()
        assert torch.equal(received, decoded)
        yield decoded, update, encoded
        bits = (encoded.payload.num_bits,)
        decisions = (encoded.decision,)
        result = RoundResult(LAYOUT, params, decoded, bits, (8 * update.nbytes,), decisions)
        chain.end_round(shared, result, Context(index, shared, seed=9, path=(-1,)))


def scaled_rounds(name, dtype, seed, scale):
    """Yield what the server decodes of updates, of the same times ``scale``, the updates, and both decisions."""
    plain = rounds(as_chain(UPLINKS[name]), updates(seed, 8, dtype), dtype)
    other = rounds(as_chain(UPLINKS[name]), (scale * update for update in updates(seed, 8, dtype)), dtype)
    for (expected, update, one), (found, _, two) in zip(plain, other, strict=True):
        assert torch.isfinite(found).all()
        yield expected, found / scale, update, one.decision, two.decision


def error_of(decoded, update):
    return float((decoded - update).norm()) / (float(update.norm()) or 1.0)


@pytest.mark.parametrize("name", sorted(set(UPLINKS) - {"ef(cast)"}))
@given(seed=seeds, scale=st.sampled_from(SCALES))
@settings(max_examples=3)
def test_a_power_of_two_changes_no_digit_in_float64(name, seed, scale):
    for expected, found, update, one, two in scaled_rounds(name, torch.float64, seed, scale):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(update.norm()))
        if one is not None:
            assert two.recycled == one.recycled
            np.testing.assert_allclose(two.errors, one.errors, atol=1e-12)


@pytest.mark.parametrize("name", UPLINKS)
@given(seed=seeds, scale=st.sampled_from(SCALES))
@settings(max_examples=3)
def test_a_power_of_two_changes_round_off_alone_in_float32(name, seed, scale):
    # Sums are taken in float64 at the extremes: an entry may be rounded to the next level, and rows of one or three
    # entries, that depend on each other, get other coefficients.
    tolerance = 0.3 if "qsgd" in name or "row" in name else 2e-3
    for expected, found, update, one, two in scaled_rounds(name, torch.float32, seed, scale):
        assert error_of(found, update) == pytest.approx(error_of(expected, update), abs=tolerance)
        if one is not None:
            np.testing.assert_allclose(two.errors, one.errors, atol=tolerance)


@pytest.mark.parametrize("by", ["round", "tensor", "round and tensor", "entry"])
@pytest.mark.parametrize("name", UPLINKS)
@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=2)
def test_mixed_scales_stay_finite_and_the_error_told_is_true(name, by, seed, dtype):
    rng = np.random.default_rng(seed)
    exponents = rng.uniform(-30, 30, size={"round": (8, 1), "tensor": (1, 4), "entry": (1, SIZE)}.get(by, (8, 4)))
    scales = np.broadcast_to(10.0**exponents, (8, exponents.shape[1]))
    if scales.shape[1] == 4:
        scales = np.repeat(scales, LAYOUT.sizes, axis=1)
    stream = [torch.tensor(row, dtype=dtype) * update for row, update in zip(scales, updates(seed, 8, dtype))]
    looks_back_alone = [type(stage) for stage in as_chain(UPLINKS[name]).stages] == [LookBack]
    for decoded, update, encoded in rounds(as_chain(UPLINKS[name]), stream, dtype):
        assert torch.isfinite(decoded).all()
        decision = encoded.decision
        if decision is None or not decision.recycled or not all(decision.recycled):
            continue
        assert decoded.any() or not update.any() or max(decision.errors) == 1
        if looks_back_alone and len(decision.errors) == 1 and update.any():
            exact = update.double()
            error = float((decoded.double() - exact).square().sum() / exact.square().sum())
            assert decision.errors[0] == pytest.approx(error, abs=2e-3)


@pytest.mark.parametrize("stage", [LookBack(0.2), LookBack(0.2, rank=2), LookBack(0.2, rowwise=True)], ids=repr)
@pytest.mark.parametrize("second", [1e-30, 1e30])
def test_a_coefficient_that_its_dtype_cannot_hold_is_not_sent(stage, second):
    # 1e60 would decode to infinity and 1e-60 to zero, though the direction has been kept: the update goes in full.
    state = stage.init()
    first = torch.tensor([1.0, 2.0]) / second
    stage.encode(Dense(first, [(1, 2)]), state)
    payload, decision = stage.encode(Dense(torch.tensor([1.0, 2.0]) * second, [(1, 2)]), state)
    assert decision.recycled == (False,)
    assert decision.errors[0] == pytest.approx(0, abs=1e-4)
    assert payload.dense().tolist() == (torch.tensor([1.0, 2.0]) * second).tolist()


def test_float64_updates_whose_squares_underflow_or_overflow_are_sent_in_full_and_are_finite():
    for scale in (1e-200, 1e200):
        update = Dense(torch.tensor([3.0, 4.0], dtype=torch.float64) * scale)
        assert (update.is_finite(), update.is_zero()) == (True, False)
        for stage in (LookBack(1.0), LookBack(1.0, rank=2), LookBack(1.0, rowwise=True)):
            state = stage.init()
            for _ in range(3):
                payload, decision = stage.encode(update, state)
                assert decision.recycled == (False,)
                assert torch.equal(payload.dense(), update.dense())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_update_that_is_not_finite_is_not_called_finite(bad):
    for dtype in (torch.float32, torch.float64):
        assert not Dense(torch.tensor([1e30, bad, 0.0], dtype=dtype)).is_finite()
    assert not LowRank(torch.tensor([1e30, 1e30]), 1, 1).is_finite()  # finite factors, and 1e60 does not fit
    assert Dense(torch.zeros(3)).is_zero()
    assert not Dense(torch.tensor([0.0, bad])).is_zero()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1e6, 1e30, 3e38])
def test_a_cast_keeps_its_precision_beyond_the_range_of_the_format(scale):
    values = torch.tensor([1.0, -0.7, 0.3, 0.05]) * scale
    payload = as_chain([Cast("float16")]).encode(Dense(values), as_chain([Cast("float16")]).init()).payload
    assert isinstance(payload, Scaled)
    np.testing.assert_allclose(payload.dense().numpy(), values.numpy(), rtol=2**-11, atol=1e-45)
    assert payload.num_bits == 8 * len(payload.to_bytes()) == 8 * (2 + 1 + 1) + 4 * 16  # exponent, kind, dtype, values
    received = Message.from_bytes(Message(3, payload).to_bytes(), payload.layout).payload
    assert torch.equal(received.dense(), payload.dense())
    exact = payload.dense().double()
    assert payload.squared_norm() == pytest.approx(float(exact @ exact), rel=1e-6)
    assert payload.dot(Dense(values)) == pytest.approx(float(exact @ values.double()), rel=1e-6)
    assert Dense(values).dot(payload) == payload.dot(Dense(values))
    assert torch.equal(torch.cat([part.dense() for part in payload.split()]), payload.dense())


def test_an_exponent_that_the_dtype_does_not_hold_is_no_message():
    inside = Rounded(torch.ones(2, dtype=torch.float16), "float32", (2,))
    for exponent in (-127, 128, 32767):
        with pytest.raises(MessageError, match=str(exponent)):
            Message.from_bytes(Message(0, Scaled(inside, exponent)).to_bytes())


@pytest.mark.parametrize("fraction", [0.25, 1e-3])
def test_randk_scales_nothing_to_infinity(fraction):
    values = torch.full((4000,), torch.finfo(torch.float32).max)
    decoded = RandK(fraction).encode(Dense(values), {}).payload.dense()
    assert torch.isfinite(decoded).all()
    assert float(decoded.max()) > 0.99 * torch.finfo(torch.float32).max


def test_the_mean_magnitude_of_signs_does_not_overflow():
    decoded = SignSGD().encode(Dense(torch.tensor([3e38, -2e38, 1e38])), {}).payload.dense()
    assert decoded.tolist() == pytest.approx([2e38, -2e38, 2e38], rel=1e-6)
