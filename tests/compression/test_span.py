"""The span of the last updates: projection, the Gram matrix, and look-back of any rank against NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import (
    ATOMO,
    QSGD,
    Cast,
    Context,
    LookBack,
    Quantized,
    SignSGD,
    TopK,
    as_chain,
    lbp_error,
)
from lightning_lbgm.compression.span import Span, new_basis, project
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.payloads.sparse import Sparse

FAST = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
EPS32, EPS64 = 2.0**-23, 2.0**-52
SPAN = Span()


def least_squares(rows, g):
    """The error and the projection on the span of the rows, by NumPy's least squares in float64."""
    scale = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(scale > 0, scale, 1)  # the span is the same
    c = np.linalg.lstsq(unit.T, g, rcond=1e-10)[0]
    projection = c @ unit
    residual = g - projection
    return float(residual @ residual / (g @ g)), projection


def by_products(rows, g, eps=EPS64):
    """What ``project`` makes of the inner products; the projection is put together here."""
    error, coefficients = project((rows @ rows.T).tolist(), (rows @ g).tolist(), float(g @ g), eps)
    return error, np.array(coefficients)


def noisy_updates(seed, rounds, size, noise=0.6):
    """Updates near a plane that turns every six rounds."""
    rng = np.random.default_rng(seed)
    updates = []
    for index in range(rounds):
        if index % 6 == 0:
            plane = rng.normal(size=(2, size))
        updates.append(rng.uniform(0.3, 3) * (rng.normal(size=2) @ plane + noise * rng.normal(size=size)))
    return updates


def kept(state, index=0):
    return [Payload.from_state(payload).dense() for payload in state["lbgs"][index]["payloads"]]


# The projection


@given(seed=seeds, rank=st.integers(1, 8), size=st.integers(8, 30), noise=st.floats(0, 10))
@FAST
def test_the_projection_equals_least_squares(seed, rank, size, noise):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(rank, size))
    g = rng.normal(size=rank) @ rows + noise * rng.normal(size=size)
    assume(np.linalg.cond(rows) < 1e4 and np.linalg.norm(g) > 1e-3)
    expected, projection = least_squares(rows, g)
    error, coefficients = by_products(rows, g)
    assert error == pytest.approx(expected, abs=1e-7)
    np.testing.assert_allclose(coefficients @ rows, projection, atol=1e-6 * np.linalg.norm(g))


def test_the_projection_by_hand():
    # l1 = (1, 0, 0), l2 = (1, 1, 0), g = (2, 3, 6): P g = (2, 3, 0) = -l1 + 3 l2, error 36 / 49.
    error, coefficients = project([[1.0, 1.0], [1.0, 2.0]], [2.0, 5.0], 49.0)
    assert error == pytest.approx(36 / 49, abs=1e-12)
    assert coefficients == pytest.approx([-1.0, 3.0], abs=1e-12)


@given(
    seed=seeds,
    dot=st.floats(-1e10, 1e10),
    update_squared_norm=st.floats(1e-20, 1e20),
    lbg_squared_norm=st.floats(1e-20, 1e20),
)
@FAST
def test_rank_1_is_the_papers_formula_bit_for_bit(seed, dot, update_squared_norm, lbg_squared_norm):
    error, coefficients = project([[lbg_squared_norm]], [dot], update_squared_norm)
    assert coefficients == [dot / lbg_squared_norm]
    sine = 1.0 - (dot / update_squared_norm) * (dot / lbg_squared_norm)
    assert error == lbp_error(dot, update_squared_norm, lbg_squared_norm) == min(1.0, max(0.0, sine))


def test_one_zero_vector_spans_nothing():
    assert project([[0.0]], [0.0], 4.0) == (1.0, [0.0])


@given(seed=seeds, size=st.integers(4, 20), zeros=st.integers(1, 3))
@FAST
def test_zero_vectors_do_no_harm_and_get_no_weight(seed, size, zeros):
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.normal(size=(2, size)), np.zeros((zeros, size))])
    rows = rows[rng.permutation(len(rows))]
    g = rng.normal(size=size)
    expected, projection = least_squares(rows, g)
    error, coefficients = by_products(rows, g)
    assert error == pytest.approx(expected, abs=1e-7)
    np.testing.assert_allclose(coefficients @ rows, projection, atol=1e-6 * np.linalg.norm(g))
    assert not coefficients[~rows.any(axis=1)].any()


def test_a_span_of_zeros_alone_is_empty():
    assert project([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], 4.0) == (1.0, [0.0, 0.0])


@given(seed=seeds, size=st.integers(6, 20), factor=st.sampled_from([1.0, -2.0, 1e3]))
@FAST
def test_dependent_vectors_do_no_harm(seed, size, factor):
    # Three vectors of a plane, the last one twice: the Gram matrix is singular.
    rng = np.random.default_rng(seed)
    plane = rng.normal(size=(2, size))
    rows = np.stack([plane[0], plane[1], plane[0] + plane[1], factor * (plane[0] + plane[1])])
    g = rng.normal(size=size) + plane[0]
    assume(np.linalg.cond(plane) < 1e2)
    expected, projection = least_squares(plane, g)
    error, coefficients = by_products(rows, g)
    assert error == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(coefficients @ rows, projection, atol=1e-5 * np.linalg.norm(g))
    # Of all coefficients of the unit vectors that give it, those of smallest norm: what the pseudo-inverse gives.
    norms = np.linalg.norm(rows, axis=1)
    smallest = np.linalg.pinv((rows / norms[:, None]).T, rcond=1e-6) @ g
    np.testing.assert_allclose(coefficients * norms, smallest, atol=1e-5 * np.linalg.norm(g))


@given(seed=seeds, size=st.integers(6, 20), exponent=st.floats(1, 12))
@example(seed=29, size=7, exponent=3.25)  # coefficients of 260, whose round-off put the error off by 0.0034
@example(seed=9999997, size=14, exponent=2.0)  # leaving the second direction out explains less than l1 alone
@FAST
def test_nearly_dependent_vectors_in_float32_give_a_true_error_and_bounded_coefficients(seed, size, exponent):
    # l2 = l1 + a little: what float32's inner products can tell apart is used, what they cannot is left out. Either way
    # the error told is that of the update decoded (to 0.001 for products good to one rounding), and hardly more than
    # what l1 alone leaves: a direction v of eigenvalue lambda <= 16 * 2 eps is left out, which has a share of at most
    # sqrt(lambda) in <g, l1>, so up to sqrt(2 * lambda) = 0.0028 of what l1 explains.
    rng = np.random.default_rng(seed)
    l1 = rng.normal(size=size)
    rows = torch.tensor(np.stack([l1, l1 + 10**-exponent * rng.normal(size=size)]), dtype=torch.float32)
    g = torch.tensor(l1 + rng.normal(size=size), dtype=torch.float32)
    basis = new_basis()
    for row in rows:
        SPAN.append(basis, Dense(row), SPAN.dots(basis, Dense(row)), 2)
    error, coefficients = project(basis["gram"], SPAN.dots(basis, Dense(g)), Dense(g).squared_norm(), EPS32)
    decoded = np.array(coefficients) @ rows.double().numpy()
    residual = g.double().numpy() - decoded
    true = residual @ residual / float(g.double() @ g.double())
    assert error == pytest.approx(true, abs=2e-3)
    one = rows[0].double().numpy()
    alone = 1 - (g.double().numpy() @ one) ** 2 / (one @ one) / float(g.double() @ g.double())
    assert error <= alone + 2e-3 + 2.8e-3


@given(seed=seeds, rank=st.integers(2, 6), size=st.integers(10, 20))
@FAST
def test_rows_of_very_different_scales_count_alike(seed, rank, size):
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(rank, size))
    g = rng.normal(size=rank) @ unit + rng.normal(size=size)
    assume(np.linalg.cond(unit) < 1e2)
    scales = 10.0 ** rng.uniform(-15, 15, size=(rank, 1))
    scales[0], scales[1] = 1e-15, 1e15
    scale = 10.0 ** rng.uniform(-15, 15)
    expected, projection = least_squares(unit, g)
    error, coefficients = by_products(scales * unit, scale * g)
    assert error == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(
        coefficients @ (scales * unit), scale * projection, atol=1e-7 * scale * np.linalg.norm(g)
    )


@given(seed=seeds, rank=st.integers(1, 6))
@FAST
def test_the_error_is_0_within_the_span_1_across_it_and_never_outside(seed, rank):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(rank + 1, rank + 1)))[0]
    rows = rng.uniform(0.5, 2, size=(rank, 1)) * q[:rank]
    inside, _ = by_products(rows, rng.normal(size=rank) @ rows)
    across, _ = by_products(rows, q[rank])
    assert 0 <= inside == pytest.approx(0, abs=1e-9)
    assert 1 >= across == pytest.approx(1, abs=1e-9)


# The Gram matrix


@pytest.mark.parametrize("rank", [1, 2, 5])
@given(seed=seeds, size=st.integers(1, 12))
@settings(deadline=None, max_examples=15)
def test_the_gram_matrix_stays_that_of_the_vectors_kept(rank, seed, size):
    rng = np.random.default_rng(seed)
    basis, vectors = new_basis(), []
    for _ in range(4 * rank + 3):
        vectors.append(rng.normal(size=size) * 10.0 ** rng.integers(-3, 4) * rng.integers(0, 5))
        update = Dense(torch.tensor(vectors[-1]))
        SPAN.append(basis, update, SPAN.dots(basis, update), rank)
        last = np.stack(vectors[-rank:])
        held = [Payload.from_state(payload).dense().numpy() for payload in basis["payloads"]]
        np.testing.assert_array_equal(np.stack(held), last)
        np.testing.assert_allclose(basis["gram"], last @ last.T, rtol=1e-12, atol=1e-12 * (last**2).sum())


def test_a_copy_is_taken_and_what_was_there_is_not_written_to():
    basis, buffer = new_basis(), torch.empty(3)
    first = None
    for number in range(5):
        buffer.fill_(number)
        update = Dense(buffer.clone())
        SPAN.append(basis, update, SPAN.dots(basis, update), 2)
        update.values.fill_(99.0)
        first = first or dict(basis["payloads"][0])
    assert [Payload.from_state(p).dense().tolist() for p in basis["payloads"]] == [[3.0] * 3, [4.0] * 3]
    # A round that breaks off puts it back.
    assert Payload.from_state(first).dense().tolist() == [0.0] * 3


def test_tensors_of_the_same_shapes_that_mean_something_else_take_the_place_of_the_evicted():
    # Five levels of 2 bits in buckets of four, with two scales: 4 + 1 entries, then 3 + 2, from entry 1 of a bucket on.
    stage, state = LookBack(0.0), LookBack(0.0).init()
    codes, scales = torch.tensor([0b10101010, 0b10], dtype=torch.uint8), torch.tensor([3.0, 5.0])
    for phase, expected in ((0, [3.0] * 4 + [5.0]), (1, [3.0] * 3 + [5.0] * 2), (0, [3.0] * 4 + [5.0])):
        stage.encode(Quantized(codes, scales, 2, 4, phase, (5,)), state)
        assert kept(state)[0].tolist() == expected


# Look-back of any rank


@pytest.mark.parametrize(("rank", "threshold"), [(1, 0.4), (2, 0.3), (3, 0.25), (8, 0.15)])
@given(seed=seeds)
@settings(deadline=None, max_examples=12)
def test_a_run_follows_a_reference_that_keeps_the_last_updates_sent_in_full(rank, threshold, seed):
    stage, memory = LookBack(threshold, rank=rank), []
    state = stage.init()
    for g in noisy_updates(seed, 24, 14):
        expected, projection = least_squares(np.stack(memory), g) if memory else (1.0, None)
        assume(abs(expected - threshold) > 1e-6)
        encoded = stage.encode(Dense(torch.tensor(g)), state)
        payload, decision = encoded
        decoded = encoded.decoded.dense().numpy()
        assert decision.errors[0] == pytest.approx(expected, abs=1e-7)
        assert decision.recycled == (expected <= threshold,)
        if decision.recycled[0]:
            assert isinstance(payload, Coefficients)
            assert payload.num_bits == 64 * len(memory)  # float64 here
            assert (encoded.needs_state, encoded.updates_state) == (True, False)
            np.testing.assert_allclose(decoded, projection, atol=1e-6 * np.linalg.norm(g))
            residual = g - decoded
            assert residual @ residual / (g @ g) == pytest.approx(decision.errors[0], abs=1e-7)
            assert decision.coefficients == (float(payload.values[-1]),)  # that of the newest
        else:
            np.testing.assert_array_equal(decoded, g)
            assert math.isnan(decision.coefficients[0])
            assert encoded.updates_state
            memory = [*memory, g][-rank:]
        np.testing.assert_array_equal(np.stack([lbg.numpy() for lbg in kept(state)]), np.stack(memory))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_runs_above_both_recycle_and_refresh(rank):
    threshold = {1: 0.4, 2: 0.3, 4: 0.25}[rank]
    state = LookBack(threshold, rank=rank).init()
    flags = [
        LookBack(threshold, rank=rank).encode(Dense(torch.tensor(g)), state).decision.recycled[0]
        for seed in range(4)
        for g in noisy_updates(seed, 24, 14)
    ]
    assert flags.count(True) >= 10
    assert flags.count(False) >= 10


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_coefficient_of_32_bits_is_sent_for_each_look_back_gradient(rank):
    stage, generator = LookBack(1.0, rank=rank, max_age=1), torch.Generator().manual_seed(0)
    state = stage.init()
    sizes = []
    for _ in range(2 * rank + 4):
        encoded = stage.encode(Dense(torch.randn(50, generator=generator)), state)
        sizes.append(encoded.payload.num_bits)
    # In turn: sent in full, and recycled by as many LBGs as there are until then, at most `rank`.
    expected = [bits for full in range(rank + 2) for bits in (32 * 50, 32 * min(full + 1, rank))]
    assert sizes == expected


@given(seed=seeds, rank=st.integers(2, 6), scale=st.sampled_from([1e-15, 1e-5, 1.0, 1e15]))
@settings(deadline=None, max_examples=20)
def test_in_float32_the_residual_is_as_long_as_the_error_says(seed, rank, scale):
    # Each update of a scale of its own, and the LBGs alike in pairs, as where training has nearly converged.
    rng = np.random.default_rng(seed)
    stage = LookBack(0.9, rank=rank)
    state = stage.init()
    base = rng.normal(size=40)
    for index in range(16):
        noise = 10.0 ** rng.uniform(-5, 1)
        g = torch.tensor((base + noise * rng.normal(size=40)) * scale * 10.0 ** rng.uniform(-2, 2), dtype=torch.float32)
        stage.threshold = 0.0 if index % 3 == 0 else 0.9
        encoded = stage.encode(Dense(g), state)
        decoded = encoded.decoded.dense().double().numpy() / scale
        if encoded.decision.recycled[0]:
            exact = g.double().numpy() / scale
            residual = exact - decoded
            assert residual @ residual / (exact @ exact) == pytest.approx(encoded.decision.errors[0], abs=5e-3)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_rank_1_equals_the_papers_algorithm_bit_for_bit(granularity, dtype, seed):
    # The algorithm with one LBG a test, written out with torch's own inner product.
    stage, sizes = LookBack(0.4, granularity), (5, 1, 8)
    state = stage.init()
    lbgs = {}
    for g in noisy_updates(seed, 20, 14, noise=0.4):
        update = torch.tensor(g, dtype=dtype)
        encoded = stage.encode(Dense(update, sizes), state)
        parts = update.split(sizes) if granularity == "layer" else [update]
        expected = []
        for index, part in enumerate(parts):
            lbg, lbg_norm = lbgs.get(index, (None, None))
            error, rho = 1.0, math.nan
            squared_norm = float(torch.dot(part, part))
            if lbg is not None:
                dot = float(torch.dot(part, lbg))
                error = min(1.0, max(0.0, 1.0 - (dot / squared_norm) * (dot / lbg_norm)))
                if error <= 0.4:
                    rho = dot / lbg_norm
            if math.isnan(rho):
                lbgs[index] = part.clone(), squared_norm
            expected.append((error, rho))
        assert encoded.decision.errors == tuple(error for error, _ in expected)
        assert repr(encoded.decision.coefficients) == repr(tuple(rho for _, rho in expected))
        sent = encoded.payload.parts if granularity == "layer" else [encoded.payload]
        for index, (part, payload, (_, rho)) in enumerate(zip(parts, sent, expected)):
            values = part if math.isnan(rho) else torch.tensor([rho], dtype=dtype)
            assert torch.equal(payload.values, values)
            (lbg,) = kept(state, index)
            assert torch.equal(lbg, lbgs[index][0])


# Age


def test_after_max_age_rounds_of_recycling_the_update_goes_in_full():
    stage = LookBack(0.5, max_age=2)
    state = stage.init()
    update = Dense(torch.tensor([1.0, 2.0]))
    recycled, ages = [], []
    for _ in range(8):
        recycled.append(stage.encode(update, state).decision.recycled[0])
        ages.append(state["ages"][0])
    assert recycled == [False, True, True, False, True, True, False, True]
    assert ages == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_update_that_turned_starts_the_age_anew():
    stage = LookBack(0.1, max_age=2)
    state = stage.init()
    updates = [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]]
    recycled = [stage.encode(Dense(torch.tensor(update)), state).decision.recycled[0] for update in updates]
    assert recycled == [False, True, False, True, True, False]


def test_each_layer_has_an_age_of_its_own():
    stage = LookBack(0.1, "layer", max_age=1)
    state = stage.init()
    # The first layer turns in round 1, so its turn to be refreshed by age comes a round after the second one's.
    updates = [[1.0, 0.0, 5.0], [0.0, 1.0, 6.0], [0.0, 2.0, 7.0], [0.0, 3.0, 8.0]]
    recycled = [stage.encode(Dense(torch.tensor(update), (2, 1)), state).decision.recycled for update in updates]
    assert recycled == [(False, False), (False, True), (True, False), (False, True)]


def test_age_holds_for_zero_updates_too():
    stage = LookBack(0.5, max_age=1)
    state = stage.init()
    updates = [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    results = [stage.encode(Dense(torch.tensor(update)), state) for update in updates]
    assert [result.decision.recycled[0] for result in results] == [False, True, False, False]
    assert results[3].decision.errors == (1.0,)  # the LBG is zero now


# Memory and compressed forms


def stored_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(stored_bytes, value.values()))
    return sum(map(stored_bytes, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize(
    ("compressors", "share"),
    [
        ([TopK(0.01)], 0.03),
        ([TopK(0.01), SignSGD()], 0.015),
        ([SignSGD()], 0.04),
        ([ATOMO(2)], 0.05),
        ([QSGD(7)], 0.26),
        ([], 1.01),
    ],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_look_back_gradients_take_the_memory_of_what_was_sent(granularity, compressors, share, rank):
    chain = as_chain([*compressors, LookBack(0.0, granularity, rank=rank)])
    state, layout = chain.init(), Layout([(300, 330), 600, 400])
    generator = torch.Generator().manual_seed(0)
    for _ in range(rank + 2):
        chain.encode(Dense(torch.randn(layout.size, generator=generator), layout), state)
    assert layout.size == 100_000
    assert len(kept(state["stages"][-1])) == rank
    assert 0 < stored_bytes(state) < share * rank * 4 * layout.size


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize(
    ("compressor", "threshold"),
    [(TopK(0.4), 0.5), (SignSGD(), 0.65), (ATOMO(1), 0.65), (QSGD(7, bucket_size=8), 0.4), (Cast(), 0.4)],
    ids=["topk", "sign", "atomo", "qsgd", "cast"],
)
def test_the_test_on_compressed_forms_equals_that_on_the_decoded_vectors(compressor, threshold, granularity, rank):
    layout = Layout([(7, 3), 3, (2, 2, 3)])
    stage = LookBack(threshold, granularity, rank=rank)
    compressed_state, dense_state, compressor_state = stage.init(), stage.init(), compressor.init()
    outcomes = []
    for index, g in enumerate(noisy_updates(1, 30, layout.size, noise=0.3)):
        update = Dense(torch.tensor(g, dtype=torch.float32), layout)
        compressed = compressor.encode(update, compressor_state, Context(index, seed=0)).payload
        one = stage.encode(compressed, compressed_state)
        other = stage.encode(Dense(compressed.dense().clone(), layout), dense_state)
        assert one.decision.recycled == other.decision.recycled
        assert one.decision.errors == pytest.approx(other.decision.errors, abs=1e-5)
        decoded = [one.decoded, other.decoded]
        np.testing.assert_allclose(*(d.dense().numpy() for d in decoded), rtol=1e-3, atol=1e-3)
        outcomes += one.decision.recycled
    assert outcomes.count(True) >= 5
    assert outcomes.count(False) >= 5
    kinds = {type(Payload.from_state(p)) for basis in compressed_state["lbgs"].values() for p in basis["payloads"]}
    assert kinds != {Dense}


@pytest.mark.parametrize(
    "compressors",
    [
        [],
        [TopK(0.05)],
        [SignSGD()],
        [ATOMO(2)],
        [QSGD(7)],
        [Cast()],
        [TopK(0.05), SignSGD()],
        [TopK(0.05), Cast()],
        [TopK(0.05), QSGD(7)],
        [ATOMO(2), Cast()],
    ],
    ids=str,
)
def test_in_full_means_as_compressed_by_the_stages_before_by_layer_too(compressors):
    # Beside the body, each of the 3 tensors may cost framing, a scale, and what rounding up to bytes takes: 32 bytes.
    layout = Layout([(60, 33), 20, (4, 5, 5, 5)])
    update = Dense(torch.randn(layout.size, generator=torch.Generator().manual_seed(0)), layout)
    context = Context(0, {}, seed=0)
    before, by_layer = as_chain(compressors), as_chain([*compressors, LookBack(0.2, "layer")])
    alone = before.encode(update, before.init(), context).payload
    full = by_layer.encode(update, by_layer.init(), context).payload
    assert full.num_bits <= alone.num_bits + 3 * 8 * 32
    np.testing.assert_array_equal(full.dense().numpy(), alone.dense().numpy())


def test_the_lbg_after_topk_is_sparse_and_a_layer_without_an_entry_is_refreshed_for_nothing():
    chain = as_chain([TopK(0.25), LookBack(0.5, "layer")])
    state = chain.init()
    first = chain.encode(Dense(torch.tensor([9.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), (4, 4)), state)
    assert isinstance(first.payload, Blocks)
    assert [type(part) for part in first.payload.parts] == [Sparse, Sparse]
    assert [part.indices.tolist() for part in first.payload.parts] == [[0, 1], []]
    assert first.payload.num_bits == 8 * (3 + 4 + 1 + 8) + 8 * (3 + 4)


# Settings


@pytest.mark.parametrize("argument", ["rank", "max_age"])
def test_a_count_that_is_none_is_refused_by_name_and_value(argument):
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"LookBack\({argument}=") as info:
            LookBack(**{argument: value})
        assert repr(value) in str(info.value)
    for value in (1.5, "2", True):
        with pytest.raises(TypeError, match=rf"LookBack\({argument}=") as info:
            LookBack(**{argument: value})
        assert repr(value) in str(info.value)


def test_the_representation_shows_rank_and_max_age_where_set():
    assert repr(LookBack(0.5, rank=8)) == "LookBack(threshold=0.5, granularity='model', rank=8)"
    assert repr(LookBack(0.5, max_age=3)) == "LookBack(threshold=0.5, granularity='model', max_age=3)"
