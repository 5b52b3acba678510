"""Look-back row by row: each row of a matrix with coefficients of its own, against NumPy's least squares."""

import math

import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lbgm import LBGMFederated
from lightning_lbgm.compression import ErrorFeedback, LookBack, TopK, as_chain
from lightning_lbgm.compression.row_span import RowCombination, _row_products
from lightning_lbgm.core.layout import Layout, matrix_shape
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.protocol.message import Message, MessageError

seeds = st.integers(0, 2**32 - 1)

# A matrix of 4 rows, a vector, a kernel of 3 filters of 2 x 2 x 2, a number: 4 + 1 + 3 + 1 rows.
LAYOUT = Layout([(4, 5), 6, (3, 2, 2, 2), ()])
WIDTHS = 4 * [5] + [6] + 3 * [8] + [1]
STARTS = [0, 5, 10, 15, 20, 26, 34, 42, 50]
SIZE, ROWS = 51, 9
# Rows by layer: those of the matrix, of the vector, of the kernel, of the number.
LAYERS = [range(4), range(4, 5), range(5, 8), range(8, 9)]


def row(vector, index):
    return vector[..., STARTS[index] : STARTS[index] + WIDTHS[index]]


def drifting(seed, rounds, noise=0.3):
    """Updates whose rows each lie near a plane of their own, in scales of their own; the planes turn now and then."""
    rng = np.random.default_rng(seed)
    for index in range(rounds):
        if index % 7 == 0:
            planes = rng.normal(size=(2, SIZE)) * 10.0 ** rng.uniform(-1, 1, size=(2, 1))
        mixture = np.repeat(rng.normal(size=(2, ROWS)), WIDTHS, axis=1)
        yield (mixture * planes).sum(0) + rng.uniform(0, noise) * rng.normal(size=SIZE)


def project_rows(past, g, rows=range(ROWS)):
    """The part of ``g`` that each row finds in the span of the same row of the past, by least squares."""
    out = np.zeros_like(g)
    for index in rows:
        matrix = row(past, index)
        lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
        unit = matrix / np.where(lengths > 0, lengths, 1)  # the span is the same
        row(out, index)[:] = np.linalg.lstsq(unit.T, row(g, index), rcond=1e-10)[0] @ unit
    return out


def share(residual, g):
    return float(residual @ residual / (g @ g))


def dense_of(encoded):
    return encoded.decoded.dense().double().numpy()


def gram_of(vectors):
    """Inner products of each row of all pairs, ``(R, r, r)``."""
    return np.stack([row(vectors, index) @ row(vectors, index).T for index in range(ROWS)])


def kept(state, index=0):
    return np.stack([payload["values"].double().numpy() for payload in state["lbgs"][index]["payloads"]])


# Against NumPy


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@given(seed=seeds)
@settings(deadline=None, max_examples=6)
def test_the_test_and_what_is_decoded_equal_least_squares_of_each_row(rank, seed):
    stage = LookBack(0.3, rank=rank, rowwise=True)
    state, past = stage.init(), []
    for g in drifting(seed, 20):
        encoded = stage.encode(Dense(torch.tensor(g), LAYOUT), state)
        decoded, (recycled,) = dense_of(encoded), encoded.decision.recycled
        error, projection = 1.0, None
        if past:
            projection = project_rows(np.stack(past[-rank:]), g)
            error = share(g - projection, g)
        assert encoded.decision.errors[0] == pytest.approx(error, abs=1e-6)
        if abs(error - 0.3) > 1e-5:
            assert recycled == (error <= 0.3)
        if recycled:
            np.testing.assert_allclose(decoded, projection, atol=1e-5 * np.linalg.norm(g))
        else:
            np.testing.assert_array_equal(decoded, g)
            past.append(g)


def test_the_runs_above_both_recycle_and_refresh():
    for rank in (1, 2, 3, 4):
        stage = LookBack(0.3, rank=rank, rowwise=True)
        state, recycled = stage.init(), []
        for g in drifting(0, 20):
            recycled += stage.encode(Dense(torch.tensor(g), LAYOUT), state).decision.recycled
        assert 3 <= recycled.count(True) <= 17


@given(seed=seeds, rank=st.integers(1, 3))
@settings(deadline=None, max_examples=10)
def test_by_layer_each_tensor_is_tested_alone_on_its_rows(seed, rank):
    stage = LookBack(0.3, "layer", rank=rank, rowwise=True)
    state, past = stage.init(), [[] for _ in LAYERS]
    for g in drifting(seed, 15):
        encoded = stage.encode(Dense(torch.tensor(g), LAYOUT), state)
        decoded = dense_of(encoded)
        assert isinstance(encoded.payload, Blocks)
        assert len(encoded.decision.errors) == len(LAYERS)
        for layer, rows in enumerate(LAYERS):
            span = slice(STARTS[rows[0]], STARTS[rows[-1]] + WIDTHS[rows[-1]])
            error, projection = 1.0, None
            if past[layer]:
                projection = project_rows(np.stack(past[layer][-rank:]), g, rows)[span]
                error = share(g[span] - projection, g[span])
            assert encoded.decision.errors[layer] == pytest.approx(error, abs=1e-6)
            if encoded.decision.recycled[layer]:
                assert error <= 0.3 + 1e-6
                np.testing.assert_allclose(decoded[span], projection, atol=1e-5 * np.linalg.norm(g[span]))
                assert encoded.payload.parts[layer].values.numel() == len(rows) * len(past[layer][-rank:])
            else:
                np.testing.assert_array_equal(decoded[span], g[span])
                past[layer].append(g)


def test_by_hand():
    # Rows (1, 0) and (0, 2) in full. Then (3, 0) and (0, -2): coefficients 3 and -1, error 0. Then (3, 3) and (0, 0):
    # the first row finds (3, 0) of itself, so 9 of 18 are left over. Then (3, 4): 16 of 25.
    stage = LookBack(0.51, rowwise=True)
    state = stage.init()
    for g, error, sent, decoded in [
        ([1.0, 0.0, 0.0, 2.0], 1.0, [1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, 2.0]),
        ([3.0, 0.0, 0.0, -2.0], 0.0, [3.0, -1.0], [3.0, 0.0, 0.0, -2.0]),
        ([3.0, 3.0, 0.0, 0.0], 0.5, [3.0, 0.0], [3.0, 0.0, 0.0, 0.0]),
        ([3.0, 4.0, 0.0, 0.0], 0.64, [3.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]),
    ]:
        encoded = stage.encode(Dense(torch.tensor(g, dtype=torch.float64), [(2, 2)]), state)
        assert encoded.decision.errors[0] == pytest.approx(error, abs=1e-12)
        assert encoded.payload.values.tolist() == pytest.approx(sent, abs=1e-12)
        assert dense_of(encoded).tolist() == pytest.approx(decoded, abs=1e-12)


@given(seed=seeds, rank=st.integers(1, 4))
@settings(deadline=None, max_examples=15)
def test_the_error_is_never_larger_than_that_of_whole_updates(seed, rank):
    # At a threshold of 0 everything goes in full, so both have the same look-back gradients.
    whole, rows = LookBack(0.0, rank=rank), LookBack(0.0, rank=rank, rowwise=True)
    states = whole.init(), rows.init()
    smaller = 0
    for g in drifting(seed, 10):
        update = Dense(torch.tensor(g), LAYOUT)
        one, other = (stage.encode(update, state) for stage, state in zip((whole, rows), states))
        assert other.decision.errors[0] <= one.decision.errors[0] + 1e-9
        smaller += other.decision.errors[0] < 0.9 * one.decision.errors[0]
    assert smaller >= 5


@given(seed=seeds, rank=st.integers(1, 4))
@settings(deadline=None, max_examples=10)
def test_of_one_vector_the_rows_are_the_whole(seed, rank):
    whole, rows = LookBack(0.2, rank=rank), LookBack(0.2, rank=rank, rowwise=True)
    states = whole.init(), rows.init()
    for g in drifting(seed, 20):
        update = Dense(torch.tensor(g[:20]))
        one, other = whole.encode(update, states[0]), rows.encode(update, states[1])
        assert other.decision.errors == pytest.approx(one.decision.errors, abs=1e-7)
        assert other.payload.num_bits == one.payload.num_bits
        decoded = dense_of(one), dense_of(other)
        np.testing.assert_allclose(*decoded, atol=1e-6 * np.linalg.norm(g[:20]))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_state_holds_the_true_inner_products_after_many_evictions(rank):
    stage = LookBack(0.0, rank=rank, rowwise=True)
    state, past = stage.init(), []
    for g in drifting(3, 5 * rank):
        past.append(g)
        stage.encode(Dense(torch.tensor(g), LAYOUT), state)
        newest = np.stack(past[-rank:])
        np.testing.assert_array_equal(kept(state), newest)
        gram = state["lbgs"][0]["gram"]
        assert gram.dtype == torch.float64
        np.testing.assert_allclose(gram.numpy(), gram_of(newest), rtol=1e-9, atol=1e-9)


@given(seed=seeds, layout=st.sampled_from([[100_001], [(3, 9000), (7, 5), 11], [(300, 700), (), (0, 4)]]))
@settings(max_examples=10)
def test_the_inner_products_of_float32_rows_are_good_to_its_roundings(seed, layout):
    layout, rng = Layout(layout), np.random.default_rng(seed)
    one, *others = torch.tensor(rng.normal(size=(4, layout.size)) ** 3, dtype=torch.float32)
    found = _row_products(one, others, layout).numpy()
    matrices = [matrix_shape(shape) for shape in layout.shapes]
    assert found.shape == (sum(rows for rows, _ in matrices), 3)

    def rows_of(vector):
        parts = np.split(vector.double().numpy(), np.cumsum(layout.sizes)[:-1])
        return [row for part, shape in zip(parts, matrices) for row in part.reshape(shape)]

    for index, row in enumerate(rows_of(one)):
        for column, other in enumerate(others):
            exact, size = row @ rows_of(other)[index], np.linalg.norm(row) * np.linalg.norm(rows_of(other)[index])
            assert found[index, column] == pytest.approx(exact, abs=2e-6 * size + 1e-30)


# Coefficients and their bits


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.float64, 64)])
def test_an_update_costs_a_number_for_each_row_and_look_back_gradient(dtype, width):
    stage = LookBack(1.0, rank=3, max_age=1, rowwise=True)
    state, bits = stage.init(), []
    for g in drifting(0, 10):
        encoded = stage.encode(Dense(torch.tensor(g, dtype=dtype), LAYOUT), state)
        bits.append(encoded.payload.num_bits)
    # In full and recycled in turn, by 1, 2 and then always 3 look-back gradients, of 9 rows each.
    assert bits[0::2] == 5 * [51 * width]
    assert bits[1::2] == [count * 9 * width for count in (1, 2, 3, 3, 3)]


def test_coefficients_are_sent_row_by_row():
    # l1 has the rows (1, 0) and (0, 1), l2 the rows (0, 1) and (1, 0), g the rows (2, 3) and (5, 4).
    stage = LookBack(0.1, rank=2, rowwise=True)
    state = stage.init()
    for values in ([1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]):
        assert not stage.encode(Dense(torch.tensor(values), [(2, 2)]), state).decision.recycled[0]
    encoded = stage.encode(Dense(torch.tensor([2.0, 3.0, 5.0, 4.0]), [(2, 2)]), state)
    assert encoded.payload.values.tolist() == pytest.approx([2.0, 3.0, 4.0, 5.0], abs=1e-4)
    assert dense_of(encoded).tolist() == pytest.approx([2.0, 3.0, 5.0, 4.0], abs=1e-4)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 17, 19])
def test_a_number_of_coefficients_that_does_not_fit_is_refused(granularity, count):
    # Two look-back gradients of 9 rows: 18 numbers; by layer, the first tensor has 4 rows, so 8.
    wanted = 18 if granularity == "model" else 8
    if count == wanted:
        count += 1
    stage = LookBack(0.0, granularity, rank=3, rowwise=True)
    state = stage.init()
    for g in drifting(0, 2):
        payload = stage.encode(Dense(torch.tensor(g), LAYOUT), stage.init()).payload
        stage.decode(payload, state)
    values = torch.ones(count, dtype=torch.float64)
    if granularity == "model":
        bad = Coefficients(values, LAYOUT)
    else:
        rest = [Dense(torch.ones(size, dtype=torch.float64)) for size in LAYOUT.sizes[1:]]
        bad = Blocks([Coefficients(values, [LAYOUT.shapes[0]]), *rest], LAYOUT)
    before = kept(state)
    with pytest.raises(MessageError, match=rf"\b{count} look-back coefficients, not {wanted}\."):
        stage.decode(bad, state)
    np.testing.assert_array_equal(kept(state), before)


def test_coefficients_before_any_look_back_gradient_are_refused():
    stage = LookBack(0.5, rowwise=True)
    with pytest.raises(MessageError, match=r"\b9 look-back coefficients, not 0\."):
        stage.decode(Coefficients(torch.ones(9), LAYOUT), stage.init())


def test_coefficients_that_float32_cannot_hold_are_not_sent():
    # The second row would need 1e24 / 1e-16 = 1e40, more than float32 has; the first one needs 1.
    stage = LookBack(1.0, rowwise=True)
    state = stage.init()
    for second, recycled in [(1e-16, False), (2e-16, True), (1e24, False), (2e24, True)]:
        encoded = stage.encode(Dense(torch.tensor([1.0, 1.0, second, second], dtype=torch.float32), [(2, 2)]), state)
        assert encoded.decision.recycled == (recycled,)
        assert torch.isfinite(encoded.payload.values).all()
        assert np.isfinite(dense_of(encoded)).all()


# Rows that are zero, alike, or of very different lengths


@given(seed=seeds, rank=st.integers(1, 4))
@settings(deadline=None, max_examples=15)
def test_zero_and_dependent_rows_do_no_harm(seed, rank):
    # Row 0 is always zero, row 1 now and then; row 2 keeps to a line, so its look-back gradients are dependent.
    rng = np.random.default_rng(seed)
    stage = LookBack(0.5, rank=rank, rowwise=True)
    state, past = stage.init(), []
    line = rng.normal(size=5)
    for index, g in enumerate(drifting(seed, 16)):
        row(g, 0)[:] = 0
        row(g, 1)[:] *= index % 3 > 0
        row(g, 2)[:] = rng.normal() * line
        encoded = stage.encode(Dense(torch.tensor(g), LAYOUT), state)
        decoded = dense_of(encoded)
        assert np.isfinite(decoded).all()
        assert not row(decoded, 0).any()
        if past:
            expected = share(g - project_rows(np.stack(past[-rank:]), g), g)
            assert encoded.decision.errors[0] == pytest.approx(expected, abs=1e-5)
        if encoded.decision.recycled[0]:
            np.testing.assert_allclose(row(decoded, 2), row(g, 2), atol=1e-5 * np.linalg.norm(g))
            assert share(g - decoded, g) == pytest.approx(encoded.decision.errors[0], abs=1e-6)
        else:
            past.append(g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds, rank=st.integers(1, 4))
@settings(deadline=None, max_examples=15)
def test_whatever_the_rows_scales_the_residual_is_as_long_as_the_error_says(dtype, seed, rank):
    # Each row of each update has a scale of its own, and one of two updates in a row is nearly the other.
    rng = np.random.default_rng(seed)
    stage = LookBack(0.0, rank=rank, rowwise=True)
    state = stage.init()
    scales = np.repeat(10.0 ** rng.uniform(-12, 12, size=ROWS), WIDTHS)
    base = rng.normal(size=SIZE)
    for index in range(14):
        noise = 10.0 ** rng.uniform(-5, 0.5)
        g = (base + noise * rng.normal(size=SIZE)) * scales * np.repeat(10.0 ** rng.uniform(-2, 2, size=ROWS), WIDTHS)
        update = torch.tensor(g, dtype=dtype)
        stage.threshold = 0.0 if index % 2 == 0 else 1.0
        encoded = stage.encode(Dense(update, LAYOUT), state)
        decoded = dense_of(encoded)
        assert np.isfinite(decoded).all()
        assert encoded.decision.recycled[0] == bool(index % 2)
        if index % 2:
            residual = update.double().numpy() - decoded
            assert share(residual, update.double().numpy()) == pytest.approx(encoded.decision.errors[0], abs=5e-3)


@given(seed=seeds, exponent=st.sampled_from([-12, -6, 6, 12]))
@settings(deadline=None, max_examples=10)
def test_a_long_row_does_not_blur_a_short_one(seed, exponent):
    # Of two rows that both lie in their spans, each is found to its own rounding.
    rng = np.random.default_rng(seed)
    stage = LookBack(0.0, rank=2, rowwise=True)
    state, scales = stage.init(), np.array([[1.0], [10.0**exponent]])
    one, other = (rng.normal(size=(2, 6)) * scales for _ in range(2))
    for values in (one, other):
        stage.encode(Dense(torch.tensor(values.ravel()), [(2, 6)]), state)
    g = rng.normal(size=(2, 1)) * one + rng.normal(size=(2, 1)) * other
    stage.threshold = 1.0
    decoded = dense_of(stage.encode(Dense(torch.tensor(g.ravel()), [(2, 6)]), state)).reshape(2, 6)
    np.testing.assert_allclose(decoded / scales, g / scales, atol=1e-6)


@pytest.mark.parametrize("length", [1e-30, 1e-24, 2.6e-23, 1e-21, 1e-12, 1.0, 1e12, 1e17, 1e20, 1e25])
@pytest.mark.parametrize("rank", [1, 2])
def test_rows_whose_squares_float32_cannot_hold_do_not_deceive_the_test(rank, length):
    # The second row of the look-back gradient is that much longer; both rows keep their direction but for an entry. Of
    # each, sin^2 = 1 - <g, l>^2 / (|g|^2 |l|^2) = 1 - 1019^2 / (1000 * 1399) is left over. A row so short that it
    # counts for nothing may be left over as a whole.
    stage, layout = LookBack(0.5, rank=rank, rowwise=True), [(2, 1000)]
    state, lbg, g = stage.init(), torch.ones(2, 1000), torch.ones(2, 1000)
    lbg[:, 0] *= 20
    lbg[1] *= length
    stage.encode(Dense(lbg.reshape(-1), layout), state)
    encoded = stage.encode(Dense(g.reshape(-1), layout), state)
    of_a_row = 1 - 1019**2 / (1000 * 1399)
    (error,), (recycled,) = encoded.decision.errors, encoded.decision.recycled
    if length < 1e-20:
        assert of_a_row - 5e-3 <= error <= (of_a_row + 1) / 2 + 5e-3
    else:
        assert error == pytest.approx(of_a_row, abs=5e-3)
    assert recycled == (error <= 0.5)
    residual = g.reshape(-1).double().numpy() - dense_of(encoded)
    assert residual @ residual / 2000 == pytest.approx(error if recycled else 0.0, abs=5e-3)


def test_look_back_gradients_that_are_all_zero_are_refreshed():
    stage = LookBack(1.0, rank=2, rowwise=True)
    state = stage.init()
    for values in (torch.zeros(SIZE), torch.ones(SIZE)):
        decision = stage.encode(Dense(values, LAYOUT), state).decision
        assert (decision.recycled, decision.errors) == ((False,), (1.0,))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_zero_update_is_recycled_by_zeros(rank):
    stage = LookBack(0.2, rank=rank, rowwise=True)
    state = stage.init()
    for g in drifting(0, 2):
        stage.threshold = 0.0
        stage.encode(Dense(torch.tensor(g), LAYOUT), state)
    stage.threshold = 0.2
    encoded = stage.encode(Dense(torch.zeros(SIZE, dtype=torch.float64), LAYOUT), state)
    assert (encoded.decision.recycled, encoded.decision.errors) == ((True,), (0.0,))
    assert encoded.payload.values.tolist() == [0.0] * (9 * min(rank, 2))
    assert not dense_of(encoded).any()


@pytest.mark.parametrize("layout", [[0, (2, 3)], [(2, 3), (0, 4)], [(2, 0), (2, 3), 0]], ids=repr)
def test_parameter_tensors_without_entries_do_no_harm(layout):
    for granularity in ("model", "layer"):
        stage = LookBack(0.5, granularity, rank=2, rowwise=True)
        client, server = stage.init(), stage.init()
        for factor in (1.0, 2.0, -3.0):
            update = Dense(factor * torch.arange(1.0, 7.0), layout)
            encoded = stage.encode(update, client)
            received = Message.from_bytes(Message(0, encoded.payload).to_bytes(), Layout(layout)).payload
            decoded = stage.decode(received, server).dense()
            np.testing.assert_allclose(decoded.numpy(), update.values.numpy(), rtol=1e-5)
        assert True in encoded.decision.recycled


# What coefficients decode to


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.3])
def test_adding_a_combination_equals_adding_what_it_decodes_to(sparse, alpha):
    rng = np.random.default_rng(0)
    vectors = torch.tensor(rng.normal(size=(3, SIZE)))
    bases = [Dense(vector, LAYOUT) for vector in vectors]
    if sparse:
        bases = [TopK(0.4).encode(base, {}).payload for base in bases]
        vectors = torch.stack([base.dense() for base in bases])
    factors = rng.normal(size=(ROWS, 3))
    expected = sum(np.repeat(factors[:, k], WIDTHS) * vectors[k].numpy() for k in range(3))
    combination = RowCombination(bases, torch.tensor(factors))
    np.testing.assert_allclose(combination.dense().numpy(), expected, atol=1e-12)
    start = torch.tensor(rng.normal(size=SIZE))
    out = start.clone()
    combination.add_to(out, alpha)
    np.testing.assert_allclose(out.numpy(), start.numpy() + alpha * expected, atol=1e-12)
    for base, vector in zip(bases, vectors):
        assert torch.equal(base.dense(), vector)


def test_a_combination_is_neither_sent_nor_stored():
    combination = RowCombination([Dense(torch.ones(SIZE), LAYOUT)], torch.ones(ROWS, 1))
    for attempt in (combination.to_state, combination.to_bytes, lambda: combination.num_bits):
        with pytest.raises(TypeError):
            attempt()


@given(seed=seeds)
@settings(deadline=None, max_examples=8)
def test_after_topk_the_rows_are_those_of_what_was_decoded(seed):
    chain, plain = as_chain([TopK(0.4), LookBack(0.6, rank=2, rowwise=True)]), LookBack(0.6, rank=2, rowwise=True)
    state, plain_state = chain.init(), plain.init()
    for g in drifting(seed, 15):
        update = Dense(torch.tensor(g), LAYOUT)
        one = chain.encode(update, state)
        other = plain.encode(Dense(TopK(0.4).encode(update, {}).payload.dense().clone(), LAYOUT), plain_state)
        assert one.decision.errors == pytest.approx(other.decision.errors, abs=1e-9)
        assert one.decision.recycled == other.decision.recycled
    assert {payload["kind"] for payload in state["stages"][1]["lbgs"][0]["payloads"]} == {"Sparse"}


def test_inside_error_feedback_what_was_decoded_and_the_residual_sum_to_the_updates():
    stage = ErrorFeedback(LookBack(0.4, rank=2, rowwise=True))
    state, sent, total, recycled = stage.init(), np.zeros(SIZE), np.zeros(SIZE), []
    for g in drifting(1, 25):
        encoded = stage.encode(Dense(torch.tensor(g), LAYOUT), state)
        recycled += encoded.decision.recycled
        sent += encoded.decoded.dense().numpy()
        total += g
        np.testing.assert_allclose(sent + state["residual"].numpy(), total, atol=1e-9)
    assert True in recycled


def test_a_forgotten_past_is_told_in_full():
    stage = LookBack(1.0, rank=2, rowwise=True)
    state, (first, second) = stage.init(), drifting(0, 2)
    stage.encode(Dense(torch.tensor(first), LAYOUT), state)
    assert stage.encode(Dense(torch.tensor(second), LAYOUT), state).needs_state
    stage.forget(state)
    assert state == stage.init()
    encoded = stage.encode(Dense(torch.tensor(second), LAYOUT), state)
    assert (encoded.needs_state, encoded.updates_state, encoded.payload.num_bits) == (False, True, 64 * SIZE)


# Settings, and a whole run


def test_the_representation_shows_rowwise_where_set():
    assert repr(LookBack(0.5)) == "LookBack(threshold=0.5, granularity='model')"
    assert repr(LookBack(0.5, rowwise=False)) == "LookBack(threshold=0.5, granularity='model')"
    assert repr(LookBack(0.5, rowwise=True)) == "LookBack(threshold=0.5, granularity='model', rowwise=True)"
    assert repr(LookBack(0.5, rank=2, rowwise=True)).endswith("granularity='model', rank=2, rowwise=True)")


@pytest.mark.parametrize("rank", [1, 3])
def test_a_run_saves_uplink_and_learns(fit, rank):
    def run(uplink):
        torch.manual_seed(0)
        recorder = Recorder()
        strategy = LBGMFederated(num_clients=4, uplink=uplink, seed=0)
        module = TinyModule(net=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        trainer, _ = fit(strategy, module=module, max_epochs=25, val=True, callbacks=[recorder])
        return trainer, recorder

    trainer, recorder = run([LookBack(0.3, rank=rank, rowwise=True)])
    plain, _ = run([])
    outcomes = [client.outcome for report in recorder.reports for client in report.clients]
    assert set(outcomes) == {"refreshed", "recycled"}
    # 83 numbers in full; 8 + 1 + 3 + 1 = 13 rows, times as many look-back gradients as there are by then.
    recycled = {client.uplink_bits for r in recorder.reports for client in r.clients if client.outcome == "recycled"}
    assert recycled <= {13 * 32 * count for count in range(1, rank + 1)}
    assert 13 * 32 * rank in recycled or rank > 1
    refreshed = {client.uplink_bits for r in recorder.reports for client in r.clients if client.outcome == "refreshed"}
    assert refreshed == {83 * 32}
    assert trainer.strategy.ledger.savings > 0.4
    losses = [float(np.mean([client.loss for client in report.clients])) for report in recorder.reports]
    assert losses[-1] < 0.6 * losses[0]
    assert float(trainer.callback_metrics["val/acc"]) >= float(plain.callback_metrics["val/acc"]) - 0.1
    assert not math.isnan(float(trainer.callback_metrics["lbgm/lbp_error_mean"]))


def test_coefficients_that_cost_more_than_the_update_are_not_sent():
    # 6 rows of 2 numbers, as in a low-rank adapter: of 2 LBGs that is 12 coefficients for 12 numbers, of 3 it is 18.
    chain = as_chain(LookBack(0.5, rank=3, rowwise=True, max_age=1))
    state, layout = chain.init(), Layout([(6, 2)])
    across, along = torch.tensor([1.0, 0.0]).repeat(6), torch.tensor([0.0, 1.0]).repeat(6)
    updates = [across, along, across + along, across - along, 2 * across + along]
    sent = [chain.encode(Dense(update, layout), state) for update in updates]
    assert [encoded.decision.recycled for encoded in sent] == [(False,), (False,), (True,), (False,), (False,)]
    assert [encoded.payload.num_bits for encoded in sent] == [12 * 32] * 5
