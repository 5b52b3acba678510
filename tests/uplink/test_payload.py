"""Payloads: what they decode to, their algebra, their size in bits and their state."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.uplink import Blocks, Coefficients, Dense, Message, Payload, Scaled, Signs, Sparse
from lightning_lbgm.uplink.payload import inner

FAST = settings(deadline=None, max_examples=50)
SELF_DECODING = ["dense", "sparse", "signs", "blocks", "scaled"]

seeds = st.integers(0, 2**32 - 1)
layouts = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


def reference(kind, sizes, seed, dtype=torch.float64):
    """A random payload and what it decodes to, made by NumPy beside it."""
    rng, size = np.random.default_rng(seed), sum(sizes)
    values = rng.normal(size=size)
    if kind == "dense":
        return Dense(torch.tensor(values, dtype=dtype), sizes), values
    if kind == "sparse":
        keep = np.sort(rng.choice(size, size=rng.integers(0, size + 1), replace=False))
        kept = np.zeros(size)
        kept[keep] = values[keep]
        indices = torch.tensor(keep, dtype=torch.int32)
        return Sparse(torch.tensor(values[keep], dtype=dtype), indices, sizes), kept
    if kind == "signs":
        signs = Signs.pack(torch.tensor(values, dtype=dtype), torch.tensor(0.75, dtype=dtype), sizes)
        return signs, np.where(values >= 0, 0.75, -0.75)
    if kind == "scaled":
        base, decoded = reference("sparse", sizes, seed, dtype)
        return Scaled(base, -1.5), -1.5 * decoded
    pairs = [reference(SELF_DECODING[i % 3], (n,), seed + i, dtype) for i, n in enumerate(sizes)]
    return Blocks([payload for payload, _ in pairs]), np.concatenate([decoded for _, decoded in pairs])


def serialised_bits(payload):
    """Bits of the raw bytes of every tensor in the payload's state, found by walking the state."""

    def walk(value):
        if isinstance(value, torch.Tensor):
            return 8 * len(value.contiguous().numpy().tobytes())
        if isinstance(value, dict):
            return sum(walk(item) for item in value.values())
        return sum(walk(item) for item in value) if isinstance(value, list) else 0

    return walk(payload.to_state())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", SELF_DECODING)
@given(sizes=layouts, seed=seeds)
@FAST
def test_every_kind_decodes_adds_and_splits_as_its_numpy_reference(kind, sizes, seed):
    payload, expected = reference(kind, sizes, seed)
    assert payload.sizes == tuple(sizes)
    assert payload.size == sum(sizes)
    np.testing.assert_array_equal(payload.dense().numpy(), expected)

    start = np.random.default_rng(seed + 1).normal(size=sum(sizes))
    out = torch.tensor(start)
    payload.add_to(out, -0.3)
    np.testing.assert_allclose(out.numpy(), start - 0.3 * expected, rtol=1e-12, atol=1e-12)
    payload.add_to(out)  # the default alpha is 1
    np.testing.assert_allclose(out.numpy(), start + 0.7 * expected, rtol=1e-12, atol=1e-12)

    parts = payload.split()
    assert [part.sizes for part in parts] == [(n,) for n in sizes]
    for part, piece in zip(parts, np.split(expected, np.cumsum(sizes)[:-1])):
        np.testing.assert_array_equal(part.dense().numpy(), piece)


@pytest.mark.parametrize("second", SELF_DECODING)
@pytest.mark.parametrize("first", SELF_DECODING)
@given(sizes=layouts, seed=seeds)
@settings(deadline=None, max_examples=8)
def test_inner_products_between_all_kinds_equal_those_of_the_decoded_vectors(first, second, sizes, seed):
    a, decoded_a = reference(first, sizes, seed)
    b, decoded_b = reference(second, sizes, seed + 100)
    assert a.dot(b) == pytest.approx(float(decoded_a @ decoded_b), rel=1e-9, abs=1e-9)
    assert a.squared_norm() == pytest.approx(float(decoded_a @ decoded_a), rel=1e-12)
    assert a.dot(a) == pytest.approx(a.squared_norm(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_inner_holds_where_float32_squares_under_or_overflow(scale):
    # float32(scale * k) is exact up to 2^-24, its square and the sum of 3 are taken in float64 by NumPy.
    values = torch.tensor([3.0, -4.0, 12.0]) * scale
    exact = float((values.numpy().astype(np.float64) ** 2).sum())
    assert inner(values, values) == pytest.approx(exact, rel=1e-6)
    assert math.isclose(math.sqrt(exact) / 13, scale, rel_tol=1e-6)  # 9 + 16 + 144 = 13^2


def test_inner_holds_where_float32_terms_overflow_and_cancel():
    a, b = torch.tensor([1e20, 1e20]), torch.tensor([1e20, -1e20])
    assert inner(a, b) == 0.0  # in float32 it is inf - inf


def test_inner_of_float64_vectors_keeps_their_precision():
    a = torch.tensor([1.0, 2.0**-40], dtype=torch.float64)
    assert inner(a, torch.ones(2, dtype=torch.float64)) == 1.0 + 2.0**-40


@given(size=st.integers(1, 40), seed=seeds)
@FAST
def test_num_bits_of_each_kind_equals_an_independent_count(size, seed):
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(size=size), dtype=torch.float32)
    k = int(rng.integers(0, size + 1))
    whole_bytes = (size + 7) // 8
    payloads = {
        Dense(values): 32 * size,
        Dense(values.double()): 64 * size,
        Sparse(values[:k], torch.arange(k, dtype=torch.int32), (size,)): k * (32 + 32),
        Sparse(values[:k].double(), torch.arange(k, dtype=torch.int32), (size,)): k * (64 + 32),
        Sparse(values[:k], torch.arange(k), (size,)): k * (32 + 64),
        Signs.pack(values, torch.tensor(1.0), (size,)): 8 * whole_bytes + 32,
        Coefficients(values[:k], (size,)): 32 * k,
    }
    for payload, bits in payloads.items():
        assert payload.num_bits == serialised_bits(payload) == bits, type(payload).__name__
    blocks = Blocks(list(payloads))
    assert blocks.num_bits == serialised_bits(blocks) == sum(payloads.values())


@pytest.mark.parametrize(("size", "bits"), [(1, 40), (7, 40), (8, 40), (9, 48), (16, 48), (17, 56)])
def test_signs_are_padded_to_whole_bytes(size, bits):
    assert Signs.pack(torch.ones(size), torch.tensor(1.0), (size,)).num_bits == bits


def test_a_part_of_a_split_payload_counts_only_its_own_bits():
    values = torch.arange(1.0, 11.0)
    dense = Dense(values, (2, 5, 3)).split()
    assert [part.num_bits for part in dense] == [64, 160, 96]
    sparse = Sparse(values[[0, 6, 7]], torch.tensor([0, 6, 7], dtype=torch.int32), (2, 5, 3)).split()
    assert [part.num_bits for part in sparse] == [64, 64, 64]
    signs = Signs.pack(values, torch.tensor(1.0), (1, 9)).split()
    assert [part.num_bits for part in signs] == [8 + 32, 16 + 32]


def test_a_message_counts_its_payload_and_its_buffers():
    buffers = {"mean": torch.zeros(3), "half": torch.zeros(2, dtype=torch.float16)}
    assert Message(7, Dense(torch.zeros(5))).num_bits == 5 * 32
    assert Message(7, Dense(torch.zeros(5)), buffers).num_bits == 5 * 32 + 3 * 32 + 2 * 16


@given(values=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0]), min_size=1, max_size=40))
@FAST
def test_sign_packing_is_numpys_little_endian_packbits(values):
    signs = Signs.pack(torch.tensor(values), torch.tensor(2.0), (len(values),))
    expected = np.packbits(np.array(values) >= 0, bitorder="little")
    np.testing.assert_array_equal(signs.bits.numpy(), expected)
    assert signs.dense().tolist() == [2.0 if value >= 0 else -2.0 for value in values]


def test_a_sparse_payload_splits_around_tensors_without_an_entry():
    # Entries 0-1 | 2-4 | 5 | 6-9: kept are 1, 6 and 9, so that tensors 1 and 2 have none.
    payload = Sparse(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 6, 9], dtype=torch.int32), (2, 3, 1, 4))
    parts = payload.split()
    assert [part.indices.tolist() for part in parts] == [[1], [], [], [0, 3]]
    assert [part.values.tolist() for part in parts] == [[1.0], [], [], [2.0, 3.0]]
    assert [part.indices.dtype for part in parts] == [torch.int32] * 4
    assert parts[1].squared_norm() == 0.0
    assert parts[1].dense().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "sparse", "signs", "coefficients", "blocks", "nested"])
def test_every_sent_kind_survives_a_file(kind, dtype):
    sizes = (3, 1, 5)
    if kind == "coefficients":
        payload = Coefficients(torch.tensor([0.25], dtype=dtype), sizes)
    elif kind == "nested":
        inside = Blocks([reference("signs", (11,), 1, dtype)[0], Coefficients(torch.tensor([2.0], dtype=dtype), (4,))])
        payload = Blocks([reference("dense", (2,), 2, dtype)[0], inside])
    else:
        payload = reference(kind, sizes, 3, dtype)[0]
    restored = Payload.from_state(through_a_file(payload.to_state()))
    assert type(restored) is type(payload)
    assert restored.sizes == payload.sizes
    assert restored.num_bits == payload.num_bits
    assert [t.dtype for t in restored.tensors()] == [t.dtype for t in payload.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(restored.tensors(), payload.tensors(), strict=True))
    if kind not in ("coefficients", "nested"):
        assert torch.equal(restored.dense(), payload.dense())


def test_blocks_keep_the_kind_of_each_part_in_their_state():
    payload = Blocks([Dense(torch.ones(2)), Coefficients(torch.tensor([0.5]), (3,))])
    restored = Payload.from_state(payload.to_state())
    assert [type(part) for part in restored.parts] == [Dense, Coefficients]
    assert [part.sizes for part in restored.parts] == [(2,), (3,)]


def test_coefficients_do_not_decode_alone():
    with pytest.raises(TypeError, match="look-back gradient"):
        Coefficients(torch.tensor([1.0]), (3,)).dense()


def test_a_scaled_payload_is_never_sent():
    scaled = Scaled(Dense(torch.ones(2)), 3.0)
    with pytest.raises(TypeError, match="never sent"):
        scaled.to_state()
    with pytest.raises(TypeError, match="never sent"):
        _ = scaled.num_bits
