"""Matrices as products of thin ones: ATOMO, PowerSGD and the algebra of their payload, against NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import (
    ATOMO,
    QSGD,
    Cast,
    Context,
    ErrorFeedback,
    LookBack,
    PowerSGD,
    RandK,
    SignSGD,
    TopK,
    as_chain,
)
from lightning_lbgm.compression.methods.atomo import keep_probabilities
from lightning_lbgm.core.layout import matrix_shape
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.low_rank import LowRank

seeds = st.integers(0, 2**32 - 1)
# Tall, a vector, a kernel that is wide as a matrix (4, 12), a scalar, and a matrix that factors would not make smaller.
SHAPES = [(9, 6), (7,), (4, 3, 2, 2), (), (2, 2)]
MATRICES = {0: (9, 6), 2: (4, 12)}
SIZES = [math.prod(shape) for shape in SHAPES]
M = sum(SIZES)  # 54 + 7 + 48 + 1 + 4


def pieces(values):
    """The update's parameter tensors as matrices, in NumPy and float64; a vector is one row."""
    parts = np.split(np.asarray(values, dtype=np.float64), np.cumsum(SIZES)[:-1])
    return [part.reshape(MATRICES.get(index, (1, -1))) for index, part in enumerate(parts)]


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def random_update(seed, dtype=torch.float64):
    return torch.tensor(np.random.default_rng(seed).normal(size=M), dtype=dtype)


def encode(stages, values, context=None, layout=SHAPES, state=None):
    chain = as_chain(stages)
    arguments = () if context is None else (context,)
    return chain.encode(Dense(values, layout), chain.init() if state is None else state, *arguments).payload


# ATOMO, the largest components


@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, torch.float64), (2, torch.float64), (1, torch.float32), (2, torch.float32)]
)
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_atomo_sends_the_truncated_svd_of_each_matrix_and_vectors_whole(rank, dtype, seed):
    values = random_update(seed, dtype)
    payload = encode([ATOMO(rank)], values)
    assert payload.dense().dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for index, (part, matrix) in enumerate(zip(payload.parts, pieces(values))):
        expected = truncated(matrix, rank) if index in MATRICES else matrix
        np.testing.assert_allclose(part.dense().numpy(), expected.reshape(-1), atol=tolerance)
        assert isinstance(part, LowRank if index in MATRICES else Dense)
        if index not in MATRICES:
            assert part.dense().tolist() == matrix.reshape(-1).tolist()
    assert payload.layout.shapes == tuple(SHAPES)


@given(rows=st.integers(1, 14), columns=st.integers(1, 14), rank=st.integers(1, 4), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_the_error_of_atomo_is_that_of_eckart_and_young(rows, columns, rank, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    payload = encode([ATOMO(rank)], torch.tensor(matrix.reshape(-1)), layout=[(rows, columns)])
    error = float((payload.dense() - torch.tensor(matrix.reshape(-1))).norm()) ** 2
    if rank * (rows + columns) >= rows * columns:
        assert error == 0.0
        assert isinstance(payload.parts[0], Dense)
    else:
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert error == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-8, abs=1e-12)
        assert payload.parts[0].rank == rank


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e15])
def test_atomo_holds_at_any_scale(scale):
    values = random_update(0, torch.float32) * scale
    decoded = encode([ATOMO(1)], values).dense().double()
    expected = np.concatenate(
        [(truncated(m, 1) if i in MATRICES else m).reshape(-1) for i, m in enumerate(pieces(values))]
    )
    assert float((decoded - torch.tensor(expected)).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("sampling", ["top", "unbiased"])
def test_atomo_of_zero_and_of_few_components_is_exact(sampling):
    assert encode([ATOMO(1, sampling)], torch.zeros(M)).dense().tolist() == [0.0] * M
    # Of rank 1 and of rank 2: with a budget of two both are kept for sure.
    rng = np.random.default_rng(0)
    one = np.outer(rng.normal(size=9), rng.normal(size=6))
    two = rng.normal(size=(4, 2)) @ rng.normal(size=(2, 12))
    values = torch.tensor(np.concatenate([one.reshape(-1), rng.normal(size=7), two.reshape(-1), rng.normal(size=5)]))
    for index in range(5):
        decoded = encode([ATOMO(2, sampling)], values, Context(index, seed=0)).dense()
        np.testing.assert_allclose(decoded.numpy(), values.numpy(), atol=1e-6)


def test_kernels_are_matrices_of_their_output_channels():
    assert matrix_shape((4, 3, 2, 2)) == (4, 12)
    payload = encode([ATOMO(1)], random_update(1))
    assert (payload.parts[2].rows, payload.parts[2].columns) == (4, 12)
    assert payload.parts[2].layout.shapes == ((4, 3, 2, 2),)


# ATOMO at random


def atoms(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return s, [np.outer(u[:, i], vt[i]) * s[i] for i in range(len(s))]


def water_filled(weights, budget):
    """Probabilities min(1, c w) with the sum min(budget, number of weights above 0), c by bisection."""
    weights = np.asarray(weights, dtype=np.float64)
    positive = weights > 0
    if positive.sum() <= budget:
        return positive.astype(np.float64)
    low, high = 0.0, budget / weights[positive].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * weights).sum() < budget else (low, middle)
    return np.minimum(1, high * weights)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_mean_of_atomo_at_random_is_the_update(rank):
    values, draws = random_update(7), 2000
    payloads = [encode([ATOMO(rank, "unbiased")], values, Context(index, seed=0)) for index in range(draws)]
    mean = torch.stack([payload.dense() for payload in payloads]).mean(0)
    kept = {index: [payload.parts[index].rank for payload in payloads] for index in MATRICES}
    for index, (matrix, found) in enumerate(zip(pieces(values), np.split(mean.numpy(), np.cumsum(SIZES)[:-1]))):
        if index not in MATRICES:
            np.testing.assert_allclose(found, matrix.reshape(-1), rtol=1e-12)
            continue
        s, components = atoms(matrix)
        p = water_filled(s, rank)
        # Atoms are kept independently, each with probability p and divided by it.
        variance = sum(component**2 * (1 - q) / q for component, q in zip(components, p))
        assert np.all(np.abs(found.reshape(matrix.shape) - matrix) <= 5 * np.sqrt(variance / draws) + 1e-12)
        assert np.mean(kept[index]) == pytest.approx(rank, abs=5 * math.sqrt(float((p * (1 - p)).sum()) / draws))
        assert len(set(kept[index])) > 1  # the number is random, none included


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12),
    budget=st.integers(1, 14),
)
@settings(deadline=None, max_examples=200)
def test_keep_probabilities_are_the_water_filling_ones(weights, budget):
    weights = sorted(weights, reverse=True)
    probabilities = keep_probabilities(torch.tensor(weights, dtype=torch.float64), budget)
    np.testing.assert_allclose(probabilities.numpy(), water_filled(weights, budget), rtol=1e-9, atol=1e-12)
    assert bool(((probabilities >= 0) & (probabilities <= 1)).all())
    assert float(probabilities.sum()) == pytest.approx(min(budget, sum(weight > 0 for weight in weights)), rel=1e-9)
    assert ((probabilities > 0).numpy() == (np.array(weights) > 0)).all()


@given(weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=8), budget=st.integers(1, 3), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_no_other_probabilities_of_that_sum_have_a_smaller_variance(weights, budget, seed):
    weights = np.array(sorted(weights, reverse=True))
    best = keep_probabilities(torch.tensor(weights), budget).numpy()
    variance = float((weights**2 / best).sum())
    rng = np.random.default_rng(seed)
    for _ in range(20):
        # A step between two of them, within the bounds.
        i, j = rng.choice(len(weights), 2, replace=False)
        step = rng.uniform(0, min(1 - best[i], best[j] * 0.99))
        other = best.copy()
        other[i] += step
        other[j] -= step
        assert float((weights**2 / other).sum()) >= variance * (1 - 1e-9)


def test_atomo_at_random_draws_alike_for_the_same_round_and_client_alone():
    values = random_update(3)

    def decoded(*args, **kwargs):
        return encode([ATOMO(2, "unbiased")], values, Context(*args, **kwargs)).dense()

    first = [decoded(index, seed=1) for index in range(10)]
    assert all(torch.equal(one, decoded(index, seed=1)) for index, one in enumerate(first))
    assert not all(torch.equal(one, decoded(index, seed=2)) for index, one in enumerate(first))
    assert not all(torch.equal(one, decoded(index, seed=1, path=(5,))) for index, one in enumerate(first))
    assert len({tuple(one.tolist()) for one in first}) > 1


# PowerSGD


def power_iteration(matrices, start):
    """Reference: left factor from QR of A Q, right factor A^T P, kept for the next round."""
    right = start
    for matrix in matrices:
        left = np.linalg.qr(matrix @ right)[0]
        right = matrix.T @ left
        yield left @ right.T, right


@pytest.mark.parametrize("rank", [1, 2])
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_powersgd_is_power_iteration_that_goes_on_over_the_rounds(rank, seed):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(5, M)) + 2 * rng.normal(size=M)
    starts = {index: rng.normal(size=(shape[1], rank)) for index, shape in MATRICES.items()}
    chain = as_chain([PowerSGD(rank)])
    state = chain.init()
    state["stages"][0]["right"] = {index: torch.tensor(start) for index, start in starts.items()}
    found = [chain.encode(Dense(torch.tensor(update), SHAPES), state).payload for update in updates]
    for index, start in starts.items():
        matrices = [pieces(update)[index] for update in updates]
        for payload, (expected, right) in zip(found, power_iteration(matrices, start)):  # noqa: B007
            part = payload.parts[index]
            np.testing.assert_allclose(part.dense().numpy(), expected.reshape(-1), atol=1e-9)
        np.testing.assert_allclose(state["stages"][0]["right"][index].abs().numpy(), np.abs(right), atol=1e-9)
    for update, payload in zip(updates, found):
        for index in (1, 3, 4):
            assert payload.parts[index].dense().tolist() == pieces(update)[index].reshape(-1).tolist()


@given(seed=seeds, rank=st.integers(1, 2))
@settings(deadline=None, max_examples=15)
def test_powersgd_converges_to_the_best_approximation_of_a_constant_matrix(seed, rank):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(9, 6)))
    v, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    singular = np.array([8.0, 4.0, 1.0, 0.5, 0.2, 0.1])
    matrix = (u * singular) @ v.T
    values = torch.tensor(matrix.reshape(-1))
    chain = as_chain([PowerSGD(rank)])
    state, errors = chain.init(), []
    for index in range(40):
        decoded = chain.encode(Dense(values, [(9, 6)]), state, Context(index, seed=seed)).payload.dense()
        errors.append(float((decoded - values).norm()))
    best = math.sqrt(float((singular[rank:] ** 2).sum()))  # Eckart and Young
    assert errors[-1] == pytest.approx(best, rel=1e-6)
    assert all(error >= best * (1 - 1e-9) for error in errors)
    # From the start of another round, without the state, it is not there yet.
    cold = encode([PowerSGD(rank)], values, Context(0, seed=seed), [(9, 6)]).dense()
    assert float((cold - values).norm()) == pytest.approx(errors[0], rel=1e-9)
    assert errors[0] > best * (1 + 1e-9)


def test_the_state_of_powersgd_is_one_right_factor_a_matrix():
    chain = as_chain([PowerSGD(2)])
    state = chain.init()
    payload = chain.encode(Dense(random_update(0), SHAPES), state).payload
    right = state["stages"][0]["right"]
    assert {index: tuple(factor.shape) for index, factor in right.items()} == {0: (6, 2), 2: (12, 2)}
    sent = payload.parts[0].factors()[1]
    torch.testing.assert_close(right[0] / right[0].norm(dim=0), sent / sent.norm(dim=0))  # however they are scaled
    payload.parts[0].body.values.zero_()
    assert bool(right[0].any())  # the state is its own
    other = chain.init()
    chain.encode(Dense(random_update(0), SHAPES), other, Context(seed=1))
    assert not torch.equal(other["stages"][0]["right"][0], right[0])


def test_powersgd_is_seeded_by_the_round_and_the_client():
    values = random_update(2)
    one = encode([PowerSGD(1)], values, Context(0, seed=1)).dense()
    assert torch.equal(one, encode([PowerSGD(1)], values, Context(0, seed=1)).dense())
    assert not torch.equal(one, encode([PowerSGD(1)], values, Context(0, seed=1, path=(3,))).dense())


def test_powersgd_recovers_from_zero_and_rank_deficient_matrices():
    chain = as_chain([PowerSGD(2)])
    rng = np.random.default_rng(0)
    state = chain.init()

    def error(matrix, rounds=1):
        for _ in range(rounds):
            values = torch.tensor(matrix.reshape(-1), dtype=torch.float32)
            decoded = chain.encode(Dense(values, [(9, 6)]), state, Context(seed=0)).payload.dense()
            assert bool(torch.isfinite(decoded).all())
        return float((decoded - values).norm())

    single = np.outer(rng.normal(size=9), rng.normal(size=6))
    pair = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 6))
    full = rng.normal(size=(9, 6))
    best = math.sqrt(float((np.linalg.svd(full, compute_uv=False)[2:] ** 2).sum()))
    assert error(np.zeros((9, 6))) == 0.0
    assert error(single) < 1e-4
    assert error(pair, 4) < 1e-4
    assert error(np.zeros((9, 6)), 2) == 0.0
    assert error(pair, 2) < 1e-4
    assert error(single) < 1e-4
    assert error(full, 60) == pytest.approx(best, rel=1e-3)


# The payload


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(0, 3), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_low_rank_decodes_and_multiplies_as_its_matrix(rows, columns, rank, seed):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(rows, rank)), rng.normal(size=(columns, rank))
    other_rank = int(rng.integers(1, 4))
    other_left, other_right = rng.normal(size=(rows, other_rank)), rng.normal(size=(columns, other_rank))
    vector = rng.normal(size=rows * columns)
    payload = LowRank.of(torch.tensor(left), torch.tensor(right))
    other = LowRank.of(torch.tensor(other_left), torch.tensor(other_right))
    matrix = (left @ right.T).reshape(-1)
    other_matrix = (other_left @ other_right.T).reshape(-1)
    layout = [(rows, columns)]
    np.testing.assert_allclose(payload.dense().numpy(), matrix, atol=1e-12)
    assert payload.rank == rank

    dense = Dense(torch.tensor(vector), layout)
    sparse = encode([TopK(0.4)], torch.tensor(vector), layout=layout)
    signs = encode([SignSGD()], torch.tensor(vector), layout=layout)
    random = encode([RandK(0.5)], torch.tensor(vector), layout=layout)
    transposed = LowRank.of(torch.tensor(other_right), torch.tensor(other_left), layout)
    pairs = [
        (payload, matrix),
        (other, other_matrix),
        (dense, vector),
        (transposed, (other_right @ other_left.T).reshape(-1)),
    ]
    pairs += [(item, item.dense().numpy()) for item in (sparse, signs, random)]
    for item, decoded in pairs:
        assert payload.dot(item) == pytest.approx(float(matrix @ decoded), rel=1e-9, abs=1e-9)
        assert item.dot(payload) == pytest.approx(float(matrix @ decoded), rel=1e-9, abs=1e-9)
    assert payload.squared_norm() == pytest.approx(float(matrix @ matrix), rel=1e-9, abs=1e-9)

    out = torch.tensor(vector)
    payload.add_to(out, -0.5)
    np.testing.assert_allclose(out.numpy(), vector - 0.5 * matrix, atol=1e-12)


@pytest.mark.parametrize("stages", [[ATOMO(1), QSGD(15)], [ATOMO(1), Cast()], [PowerSGD(1), Cast()]], ids=repr)
def test_factors_that_are_encoded_further_multiply_as_what_they_decode_to(stages):
    a = encode(stages, random_update(0), Context(0, seed=0))
    b = encode(stages, random_update(1), Context(1, seed=0))
    whole = Dense(random_update(2), SHAPES)
    assert [type(part).__name__ for part in a.parts[:3:2]] == ["LowRank", "LowRank"]
    for other in (a, b, whole):
        assert a.dot(other) == pytest.approx(float(a.dense() @ other.dense()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("stage", [ATOMO, PowerSGD])
@pytest.mark.parametrize(
    ("rank", "dtype", "bits"), [(1, torch.float32, 32), (2, torch.float32, 32), (1, torch.float64, 64)]
)
def test_factorized_updates_have_the_bits_of_their_formula(stage, rank, dtype, bits):
    payload = encode([stage(rank)], random_update(0, dtype))
    sent = {1: 15 + 7 + 16 + 1 + 4, 2: 30 + 7 + 32 + 1 + 4}[rank]  # of 54 + 7 + 48 + 1 + 4
    # A part has its kind, its size and its length; 128 bytes and more take two bytes to say. Factors add rows, columns,
    # rank and kind.
    lengths = [part.num_bits // 8 for part in payload.parts]
    framing = sum(1 + 1 + (1 if length < 128 else 2) for length in lengths) + 4 * 2
    assert payload.num_bits == bits * sent + 8 * framing
    if (rank, dtype) == (1, torch.float32):
        # 15 floats and 4 bytes, 7 floats, 16 floats and 4 bytes, 1 float, 4 floats
        assert lengths == [64, 28, 68, 4, 16]


def test_factors_cast_to_16_bits_take_half():
    payload = encode([ATOMO(1), Cast()], random_update(0, torch.float32))
    # As above with 2 bytes a number and a byte for the format in each of the five parts.
    assert [part.num_bits // 8 for part in payload.parts] == [35, 15, 37, 3, 9]


def test_matrices_that_factors_would_not_make_smaller_go_whole():
    # Rank 2 of (4, 4): 16 numbers either way. Of (5, 4): 18 of 20.
    for shape, kind in (((4, 4), Dense), ((5, 4), LowRank), ((20,), Dense), ((20, 1), Dense), ((1, 20), Dense)):
        for stage in (ATOMO(2), PowerSGD(2)):
            values = torch.randn(math.prod(shape))
            payload = encode([stage], values, layout=[shape])
            assert isinstance(payload, Blocks)
            assert isinstance(payload.parts[0], kind)
            values.zero_()
            assert bool(payload.dense().any())  # what is sent does not change with the caller's memory


# With error feedback and look-back


@pytest.mark.parametrize("stages", [[ATOMO(1)], [PowerSGD(1)], [PowerSGD(2), Cast()], [ATOMO(1), Cast()]], ids=repr)
def test_with_error_feedback_the_mean_of_what_is_sent_converges_to_the_update(stages):
    values = random_update(5)
    chain = as_chain([ErrorFeedback(stages)])
    state, total, errors = chain.init(), torch.zeros(M, dtype=torch.float64), {}
    for index in range(1, 301):
        total += chain.encode(Dense(values, SHAPES), state, Context(index, seed=0)).payload.dense()
        errors[index] = float((total / index - values).norm() / values.norm())
    # The sum lacks a bounded residual, so the mean is off by O(1 / rounds).
    assert errors[300] < 0.02
    assert errors[300] < errors[30] / 5
    plain = encode(stages, values, Context(seed=0)).dense()
    assert float((plain - values).norm() / values.norm()) > 0.2


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_look_back_gradients_are_kept_as_factors(granularity):
    values = random_update(6, torch.float32)
    chain = as_chain([ATOMO(1), LookBack(0.2, granularity)])
    client, server = chain.init(), chain.init()
    first = chain.encode(Dense(values, SHAPES), client).payload
    chain.decode(first, server)
    second = chain.encode(Dense(2 * values, SHAPES), client)
    assert all(second.decision.recycled)
    assert second.decision.coefficients == pytest.approx([2.0] * len(second.decision.recycled), rel=1e-5)
    decoded = chain.decode(second.payload, server).dense()
    np.testing.assert_allclose(decoded.numpy(), 2 * first.dense().numpy(), rtol=1e-4, atol=1e-6)

    def numbers(state):
        if isinstance(state, torch.Tensor):
            return state.numel()
        items = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
        return sum(numbers(item) for item in items)

    assert numbers(client["stages"][1]["lbgs"]) == 15 + 7 + 16 + 1 + 4


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
@pytest.mark.parametrize("stage", [ATOMO, PowerSGD])
def test_ranks_out_of_range_are_refused_by_name_and_value(stage, rank, error):
    with pytest.raises(error, match=rf"{stage.__name__}\(rank=.*{rank!r}"):
        stage(rank)


def test_samplings_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"ATOMO\(sampling=.*'best'"):
        ATOMO(1, "best")
