"""The look-back test: its error, its threshold, and what becomes of the look-back gradient (LBG)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import LookBack, Signs, SignSGD, TopK, lbp_error
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.payloads.sparse import Sparse

FAST = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)


def vector(*values, dtype=torch.float32):
    return Dense(torch.tensor(values, dtype=dtype))


def lbg(state, index=0):
    (kept,) = state["lbgs"][index]["payloads"]
    return Payload.from_state(kept).dense()


def encode_all(stage, updates, sizes=None):
    """Encode a run of updates on one client; return the results and the client's state."""
    state = stage.init()
    return [stage.encode(Dense(update, sizes), state) for update in updates], state


def squared_sine(a, b):
    """sin^2 of the angle, by Kahan's formula for the angle between unit vectors, not from the inner product."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return math.sin(2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))) ** 2


def drifting_updates(seed, rounds, size, dtype=torch.float64):
    """Updates that keep a direction for some rounds, with noise from weak to strong, then take another one."""
    rng = np.random.default_rng(seed)
    updates = []
    for index in range(rounds):
        if index % 4 == 0:
            direction = rng.normal(size=size)
        updates.append(rng.uniform(0.1, 3) * (direction + rng.uniform(0, 1.2) * rng.normal(size=size)))
    return [torch.tensor(update, dtype=dtype) for update in updates]


# The error


@pytest.mark.parametrize(
    ("degrees", "error"), [(0, 0.0), (30, 0.25), (45, 0.5), (60, 0.75), (90, 1.0), (120, 0.75), (180, 0.0)]
)
def test_the_error_is_the_squared_sine_of_the_angle(degrees, error):
    # l = 3 along the axis, g = 2 at the angle: <g, l> = 6 cos, |g|^2 = 4, |l|^2 = 9.
    dot = 6 * math.cos(math.radians(degrees))
    assert lbp_error(dot, 4.0, 9.0) == pytest.approx(error, abs=1e-12)


@given(seed=seeds, size=st.integers(2, 30), noise=st.floats(1e-3, 10))
@FAST
def test_the_error_of_random_vectors_equals_the_direct_angle_formula(seed, size, noise):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=size)
    b = a + noise * rng.normal(size=size)
    expected = squared_sine(a, b)
    assert lbp_error(float(a @ b), float(a @ a), float(b @ b)) == pytest.approx(expected, abs=1e-10)
    (_, second), _ = encode_all(LookBack(0.5), [torch.tensor(a), torch.tensor(b)])
    assert second.decision.errors[0] == pytest.approx(expected, abs=1e-10)
    single = [torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)]
    assert encode_all(LookBack(0.5), single)[0][1].decision.errors[0] == pytest.approx(expected, abs=1e-5)


def test_the_error_is_clamped_against_round_off():
    assert lbp_error(1.0 + 1e-9, 1.0, 1.0) == 0.0
    assert lbp_error(-(1.0 + 1e-9), 1.0, 1.0) == 0.0
    assert lbp_error(0.0, 1.0, 1.0) == 1.0


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e100, 1e150])
def test_the_error_does_not_under_or_overflow(scale):
    # g = (1, 1) and l = (1, 0), both times the scale: 45 degrees. The product of the norms is 2 scale^4.
    assert lbp_error(scale**2, 2 * scale**2, scale**2) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
@pytest.mark.parametrize("granularity", ["model", "layer"])
@given(seed=seeds)
@settings(deadline=None, max_examples=8)
def test_decisions_do_not_depend_on_the_scale_of_the_updates(granularity, scale, seed):
    stage, sizes = LookBack(0.4, granularity), (3, 9)
    updates = drifting_updates(seed, 10, sum(sizes), dtype=torch.float32)
    plain, _ = encode_all(stage, updates, sizes)
    errors = [error for result in plain for error in result.decision.errors]
    assume(all(abs(error - 0.4) > 1e-4 for error in errors))  # round-off may decide on the threshold itself
    scaled, _ = encode_all(stage, [update * scale for update in updates], sizes)
    for one, other in zip(plain, scaled):
        assert other.decision.recycled == one.decision.recycled
        assert other.decision.errors == pytest.approx(one.decision.errors, abs=1e-5)
        assert other.decision.coefficients == pytest.approx(one.decision.coefficients, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_an_update_of_another_scale_than_the_lbg_is_recycled_by_that_factor(scale):
    update = torch.tensor([3.0, -1.0, 2.0])
    (_, second), _ = encode_all(LookBack(0.1), [update, update * scale])
    assert second.decision.recycled == (True,)
    assert second.decision.errors[0] == pytest.approx(0.0, abs=1e-6)
    assert float(second.payload.values) == pytest.approx(scale, rel=1e-6)


# The threshold


def test_an_error_equal_to_the_threshold_recycles_and_the_next_smaller_threshold_does_not():
    # l = (1, 0), g = (1, 1): error = 1 - (1 / 2)(1 / 1) = 0.5 exactly.
    updates = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    (_, at), _ = encode_all(LookBack(0.5), updates)
    (_, below), _ = encode_all(LookBack(math.nextafter(0.5, 0)), updates)
    assert at.decision.errors == below.decision.errors == (0.5,)
    assert at.decision.recycled == (True,)
    assert below.decision.recycled == (False,)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("updates", [[[1.0, 2.0], [1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]], [[0.0, 0.0]] * 3])
def test_threshold_0_never_recycles(updates, granularity):
    results, _ = encode_all(LookBack(0, granularity), [torch.tensor(update) for update in updates])
    for result, update in zip(results, updates):
        assert result.decision.recycled == (False,)
        assert all(math.isnan(c) for c in result.decision.coefficients)
        assert result.payload.dense().tolist() == update
        framing = 8 * 3 if granularity == "layer" else 0
        assert result.payload.num_bits == 64 + framing


def test_threshold_0_refreshes_a_zero_update_after_an_ordinary_one():
    results, state = encode_all(LookBack(0.0), [torch.tensor([1.0, 2.0]), torch.zeros(2)])
    assert results[1].decision.recycled == (False,)
    assert lbg(state).tolist() == [0.0, 0.0]


@given(seed=seeds)
@FAST
def test_threshold_1_recycles_whenever_there_is_an_lbg(seed):
    rng = np.random.default_rng(seed)
    updates = [torch.tensor(rng.normal(size=6), dtype=torch.float32) for _ in range(5)]
    results, state = encode_all(LookBack(1), updates)
    assert [result.decision.recycled for result in results] == [(False,)] + [(True,)] * 4
    assert torch.equal(lbg(state), updates[0])


def test_threshold_1_recycles_an_orthogonal_update_with_coefficient_0():
    (_, second), _ = encode_all(LookBack(1.0), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])])
    assert second.decision.recycled == (True,)
    assert second.decision.errors == (1.0,)
    assert second.payload.values.tolist() == [0.0]


def test_the_smallest_positive_threshold_recycles_a_parallel_update():
    # <g, l> = 10, |g|^2 = 20, |l|^2 = 5: the quotients are exact, and so is the error 0.
    results, _ = encode_all(LookBack(5e-324), [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])])
    assert results[1].decision.recycled == (True,)
    assert results[1].decision.coefficients == (2.0,)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("update", [[1.0, -2.0], [0.0, 0.0]])
def test_the_first_update_is_sent_in_full(threshold, update):
    stage = LookBack(threshold)
    state = stage.init()
    encoded = stage.encode(vector(*update), state)
    payload, decision = encoded
    assert (encoded.needs_state, encoded.updates_state) == (False, True)
    assert isinstance(payload, Dense)
    assert payload.dense().tolist() == update
    assert decision.recycled == (False,)
    assert decision.errors == (1.0,)
    assert math.isnan(decision.coefficients[0])
    assert lbg(state).tolist() == update


# Zeros


def test_a_zero_update_is_recycled_with_coefficient_0():
    stage = LookBack(0.2)
    results, state = encode_all(stage, [torch.tensor([1.0, 2.0]), torch.zeros(2)])
    assert results[1].decision.recycled == (True,)
    assert results[1].decision.errors == (0.0,)
    assert results[1].decision.coefficients == (0.0,)
    assert results[1].decoded.dense().tolist() == [0.0, 0.0]
    assert lbg(state).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("threshold", [0.2, 1.0])
def test_a_zero_lbg_is_refreshed(threshold):
    results, state = encode_all(LookBack(threshold), [torch.zeros(2), torch.tensor([1.0, 2.0])])
    assert results[1].decision.recycled == (False,)
    assert results[1].decision.errors == (1.0,)
    assert lbg(state).tolist() == [1.0, 2.0]


# The coefficient and the LBG


def test_the_coefficient_is_the_projection_on_the_lbg():
    # <g, l> = 2 * 1 + 2.5 * 1 = 4.5, |l|^2 = 2, rho = 2.25; error = 1 - 4.5^2 / (10.25 * 2) = 0.0122.
    stage = LookBack(0.2)
    results, _ = encode_all(stage, [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.5])])
    payload, decision = results[1]
    assert isinstance(payload, Coefficients)
    assert payload.values.tolist() == [2.25]
    assert payload.num_bits == 32
    assert decision.coefficients == (2.25,)
    assert decision.errors[0] == pytest.approx(1 - 20.25 / 20.5, abs=1e-7)
    assert results[1].decoded.dense().tolist() == [2.25, 2.25]


def test_an_opposite_update_is_recycled_with_a_negative_coefficient():
    results, _ = encode_all(LookBack(0.2), [torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -6.0])])
    assert results[1].decision.coefficients == (-3.0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_coefficient_travels_in_the_updates_dtype(dtype):
    updates = [torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([1.1, 2.1], dtype=dtype)]
    results, _ = encode_all(LookBack(0.5), updates)
    assert results[1].payload.values.dtype == dtype
    assert results[1].payload.num_bits == 8 * dtype.itemsize


@given(seed=seeds, threshold=st.sampled_from([0.1, 0.3, 0.6]))
@FAST
def test_a_run_follows_the_algorithm_step_by_step(seed, threshold):
    # The algorithm of the paper in NumPy beside it, with the direct angle formula.
    stage, state, reference = LookBack(threshold), LookBack(threshold).init(), None
    for update in drifting_updates(seed, 12, 8):
        g = update.numpy().copy()
        error = 1.0 if reference is None else squared_sine(g, reference)
        assume(abs(error - threshold) > 1e-9)
        encoded = stage.encode(Dense(update), state)
        payload, decision = encoded
        assert (encoded.needs_state, encoded.updates_state) == (error <= threshold, error > threshold)
        assert decision.threshold == threshold
        assert decision.errors[0] == pytest.approx(error, abs=1e-10)
        assert decision.recycled == (error <= threshold,)
        assert payload.sizes == (8,)
        decoded = encoded.decoded.dense().numpy()
        if error <= threshold:
            rho = float(g @ reference) / float(reference @ reference)
            assert decision.coefficients[0] == pytest.approx(rho, rel=1e-12)
            np.testing.assert_allclose(decoded, rho * reference, rtol=1e-12)
        else:
            assert math.isnan(decision.coefficients[0])
            np.testing.assert_array_equal(decoded, g)
            reference = g
        np.testing.assert_array_equal(lbg(state).numpy(), reference)
        assert state["lbgs"][0]["gram"] == [[pytest.approx(float(reference @ reference), rel=1e-12)]]


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_the_encoder_keeps_a_copy_of_the_update(granularity):
    stage, buffer = LookBack(0.2, granularity), torch.empty(3)
    state = stage.init()
    # The second is orthogonal to the first: refreshed, in the storage of the first LBG. The third is recycled.
    for update, recycled in [([1.0, 2.0, 2.0], False), ([2.0, 1.0, -2.0], False), ([4.0, 2.0, -4.0], True)]:
        buffer.copy_(torch.tensor(update))
        encoded = stage.encode(Dense(buffer), state)
        assert encoded.decision.recycled == (recycled,)
        if recycled:
            buffer.fill_(77.0)
            assert encoded.decoded.dense().tolist() == update
        assert buffer.tolist() == update or recycled  # the input is not written to
        buffer.fill_(99.0)
    assert lbg(state).tolist() == [2.0, 1.0, -2.0]


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_the_decoder_keeps_a_copy_of_the_payload(granularity):
    stage, values = LookBack(0.2, granularity), torch.tensor([1.0, 2.0, 3.0])
    part = Dense(values)
    server = stage.init()
    stage.decode(Blocks([part]) if granularity == "layer" else part, server)
    values.fill_(99.0)
    assert lbg(server).tolist() == [1.0, 2.0, 3.0]


def test_what_the_server_sees_stays_while_the_state_advances():
    updates = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor([4.0, -2.0])]
    results, state = encode_all(LookBack(0.2), updates)
    before = repr(state)
    assert [result.decision.recycled for result in results] == [(False,), (True,), (False,)]
    assert [result.decoded.dense().tolist() for result in results] == [update.tolist() for update in updates]
    assert repr(state) == before
    assert (lbg(state).tolist(), state["lbgs"][0]["gram"], state["ages"]) == ([4.0, -2.0], [[20.0]], {0: 0})


def test_clients_do_not_share_state():
    stage = LookBack(0.2)
    one, other = stage.init(), stage.init()
    stage.encode(vector(1.0, 2.0), one)
    assert other == {"lbgs": {}, "ages": {}}
    assert not stage.encode(vector(1.0, 2.0), other).decision.recycled[0]


# Forms of the LBG


@pytest.mark.parametrize(("compressor", "kind"), [(TopK(0.3), Sparse), (SignSGD(), Signs)])
def test_the_lbg_is_kept_as_it_was_sent(compressor, kind):
    stage = LookBack(0.2)
    state = stage.init()
    compressed = compressor.encode(Dense(torch.arange(-9.0, 11.0)), {}).payload
    stage.encode(compressed, state)
    kept = Payload.from_state(state["lbgs"][0]["payloads"][0])
    assert type(kept) is kind
    assert kept.num_bits == compressed.num_bits
    assert torch.equal(kept.dense(), compressed.dense())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(kept.tensors(), compressed.tensors()))


def test_sparse_updates_are_compared_on_their_common_support():
    # l = (3, 4, 0, 0), g = (0, 4, 3, 0): <g, l> = 16, norms 25: error = 1 - 256 / 625.
    stage, state = LookBack(0.6), LookBack(0.6).init()

    def sparse(values, indices):
        return Sparse(torch.tensor(values), torch.tensor(indices, dtype=torch.int32), (4,))

    stage.encode(sparse([3.0, 4.0], [0, 1]), state)
    encoded = stage.encode(sparse([4.0, 3.0], [1, 2]), state)
    assert encoded.decision.errors[0] == pytest.approx(1 - 256 / 625, abs=1e-7)
    assert encoded.decision.coefficients[0] == pytest.approx(16 / 25, abs=1e-7)
    np.testing.assert_allclose(encoded.decoded.dense().numpy(), [3 * 0.64, 4 * 0.64, 0.0, 0.0], rtol=1e-6)


def test_an_lbg_may_change_its_number_of_entries():
    stage, state = LookBack(0.1), LookBack(0.1).init()
    for values, indices in [([1.0], [0]), ([1.0, 2.0], [1, 3]), ([5.0], [2])]:
        update = Sparse(torch.tensor(values), torch.tensor(indices, dtype=torch.int32), (4,))
        assert stage.encode(update, state).decision.recycled == (False,)
        assert torch.equal(lbg(state), update.dense())


# Layers


@pytest.mark.parametrize("compressor", [None, TopK(0.4), SignSGD()])
@given(seed=seeds, threshold=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@settings(deadline=None, max_examples=10)
def test_layer_granularity_equals_model_granularity_on_each_tensor(compressor, seed, threshold):
    sizes = (5, 1, 9, 4)
    layer, single = LookBack(threshold, "layer"), LookBack(threshold)
    layer_state, states = layer.init(), [single.init() for _ in sizes]
    for values in drifting_updates(seed, 9, sum(sizes)):
        update = Dense(values, sizes)
        if compressor is not None:
            update = compressor.encode(update, {}).payload
        encoded = layer.encode(update, layer_state)
        payload, decision = encoded
        results = [single.encode(part, state) for part, state in zip(update.split(), states)]
        assert decision.recycled == tuple(result.decision.recycled[0] for result in results)
        assert decision.errors == tuple(result.decision.errors[0] for result in results)
        np.testing.assert_equal(decision.coefficients, tuple(result.decision.coefficients[0] for result in results))
        # Each part with three bytes of framing, for all its numbers are below 128.
        assert payload.num_bits == sum(8 * 3 + result.payload.num_bits for result in results)
        decoded = [result.decoded.dense() for result in results]
        assert torch.equal(encoded.decoded.dense(), torch.cat(decoded))


def test_layers_are_tested_each_for_itself():
    # The first tensor is doubled (recycled with 2), the second turns by 90 degrees (refreshed), the third is zero.
    stage, sizes = LookBack(0.2, "layer"), (2, 2, 1)
    first, second = torch.tensor([1.0, 2.0, 1.0, 0.0, 5.0]), torch.tensor([2.0, 4.0, 0.0, 3.0, 0.0])
    results, state = encode_all(stage, [first, second], sizes)
    encoded = results[1]
    payload, decision = encoded
    assert (encoded.needs_state, encoded.updates_state) == (True, True)
    assert decision.recycled == (True, False, True)
    assert decision.errors == (0.0, 1.0, 0.0)
    assert [type(part) for part in payload.parts] == [Coefficients, Dense, Coefficients]
    assert [part.sizes for part in payload.parts] == [(2,), (2,), (1,)]
    assert payload.num_bits == 3 * 8 * 3 + 32 + 2 * 32 + 32  # three bytes of framing each
    assert encoded.decoded.dense().tolist() == [2.0, 4.0, 0.0, 3.0, 0.0]
    assert [lbg(state, i).tolist() for i in range(3)] == [[1.0, 2.0], [0.0, 3.0], [5.0]]


def test_model_granularity_makes_one_test_over_all_tensors():
    # <g, l> = 2 + 8 = 10, |l|^2 = 1 + 4 + 1 + 25 = 31, |g|^2 = 4 + 16 + 9 = 29.
    stage, sizes = LookBack(0.2), (2, 2, 1)
    first, second = torch.tensor([1.0, 2.0, 1.0, 0.0, 5.0]), torch.tensor([2.0, 4.0, 0.0, 3.0, 0.0])
    results, _ = encode_all(stage, [first, second], sizes)
    assert results[1].decision.errors[0] == pytest.approx(1 - 100 / (29 * 31), abs=1e-6)
    assert results[1].payload.sizes == sizes


# Settings


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 20, float("nan"), float("inf")])
def test_a_threshold_outside_its_range_is_refused_by_name_and_value(threshold):
    with pytest.raises(ValueError, match=r"LookBack\(threshold=") as info:
        LookBack(threshold)
    assert repr(threshold) in str(info.value)


@pytest.mark.parametrize("threshold", ["0.2", None, True, [0.2]])
def test_a_threshold_that_is_no_number_is_refused_by_name_and_value(threshold):
    with pytest.raises(TypeError, match=r"LookBack\(threshold=") as info:
        LookBack(threshold)
    assert repr(threshold) in str(info.value)


@pytest.mark.parametrize("granularity", ["tensor", "Layer", None])
def test_an_unknown_granularity_is_refused_by_name_and_value(granularity):
    with pytest.raises(ValueError, match=r"LookBack\(granularity=") as info:
        LookBack(0.2, granularity)
    assert repr(granularity) in str(info.value)


def test_the_representation_shows_the_settings():
    assert repr(LookBack(1, "layer")) == "LookBack(threshold=1.0, granularity='layer')"
    assert repr(LookBack()) == "LookBack(threshold=0.2, granularity='model')"


def test_a_coefficient_that_float32_cannot_hold_is_not_sent():
    # rho = 1e20 / 1e-25 = 1e45 is infinite in float32: the parallel update is sent in full.
    stage = LookBack(1.0)
    state = stage.init()
    stage.encode(Dense(torch.tensor([1e-25, 0.0])), state)
    encoded = stage.encode(Dense(torch.tensor([1e20, 0.0])), state)
    assert encoded.decision.recycled == (False,)
    assert encoded.payload.dense().tolist() == [pytest.approx(1e20), 0.0]


def test_an_lbg_of_blocks_is_a_copy():
    buffer = torch.tensor([1.0, 2.0, 3.0])
    blocks = Blocks([Dense(buffer[:2]), Dense(buffer[2:])])
    stage = LookBack(1.0)
    state = stage.init()
    stage.encode(blocks, state)
    buffer.zero_()
    assert lbg(state).tolist() == [1.0, 2.0, 3.0]
