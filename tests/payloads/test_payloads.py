"""Payloads: what they decode to, their algebra, their size in bits and their state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import through_a_file

from lightning_lbgm.compression import Omitted, Quantized, RandomSparse, Signs
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload, inner
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.codec import Writer
from lightning_lbgm.payloads.coefficients import Coefficients, Combination
from lightning_lbgm.payloads.integers import Integers, choose_code, write_integers
from lightning_lbgm.payloads.levels import Levels
from lightning_lbgm.payloads.low_rank import LowRank
from lightning_lbgm.payloads.rounded import Rounded
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.protocol.message import HEADER_BYTES, Message

FAST = settings(deadline=None, max_examples=50)
SENT = ["dense", "sparse", "signs", "rounded", "quantized", "levels", "few levels", "random", "low rank", "blocks"]
SELF_DECODING = [*SENT, "combination"]

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
    if kind == "rounded":
        half = values.astype(np.float16)
        name = str(dtype).removeprefix("torch.")
        return Rounded(torch.tensor(half), name, sizes), half.astype(np.float64)
    if kind == "quantized":
        # Buckets of 4, the first one cut short by the phase; a level l of 7 decodes to scale / 7 * l.
        phase = int(rng.integers(0, 4))
        levels = rng.integers(-7, 8, size=size)
        scales = 7 * rng.integers(1, 9, size=-(-(phase + size) // 4)).astype(np.float64)
        codes = bits_to_bytes([(level + 7) >> position & 1 for level in levels for position in range(4)])
        payload = Quantized(
            torch.tensor(codes, dtype=torch.uint8), torch.tensor(scales, dtype=dtype), 4, 4, phase, sizes
        )
        return payload, scales[(phase + np.arange(size)) // 4] / 7 * levels
    if kind in ("levels", "few levels"):
        # Buckets of 4, the first one cut short by the phase; or, of few, one scale. A level l of 7 is scale / 7 * l.
        few = kind == "few levels"
        phase, bucket_size = (0, 0) if few else (int(rng.integers(0, 4)), 4)
        levels = rng.integers(-7, 8, size=size) * (rng.random(size) < (0.06 if few else 1.0))
        scales = 7 * rng.integers(1, 9, size=1 if few else -(-(phase + size) // 4)).astype(np.float64)
        integers = Integers.of(torch.tensor(levels, dtype=torch.int8), 7)
        payload = Levels.of(integers, torch.tensor(scales, dtype=dtype), bucket_size, phase, sizes)
        return payload, scales[(phase + np.arange(size)) // 4 if bucket_size else 0] / 7 * levels
    if kind == "random":
        k = int(rng.integers(1, size + 1))
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        kept = np.zeros(size)
        kept[np.sort(order[:k].numpy())] = values[:k] * (size / k)
        return RandomSparse(torch.tensor(values[:k], dtype=dtype), seed, True, sizes), kept
    if kind == "low rank":
        # One row for each of n entries and one column, or the other way round; whole numbers, so that sums are exact.
        parts, decoded = [], []
        for index, n in enumerate(sizes):
            left, right = rng.integers(-5, 6, size=(n, 1)), rng.integers(-5, 6, size=(1, 1))
            if index % 2:
                left, right = right, left
            factors = torch.tensor(np.concatenate([left, right]).reshape(-1), dtype=dtype)
            parts.append(LowRank(factors, len(left), len(right), (n,)))
            decoded.append((left @ right.T).reshape(-1).astype(np.float64))
        return (parts[0] if len(parts) == 1 else Blocks(parts)), np.concatenate(decoded)
    if kind == "combination":
        one, decoded_one = reference("sparse", sizes, seed, dtype)
        two, decoded_two = reference("signs", sizes, seed + 1, dtype)
        return Combination([one, two], [-0.5, 2.0]), -0.5 * decoded_one + 2.0 * decoded_two
    kinds = SENT[:-1]
    pairs = [reference(kinds[(seed + i) % len(kinds)], (n,), seed + i, dtype) for i, n in enumerate(sizes)]
    return Blocks([payload for payload, _ in pairs]), np.concatenate([decoded for _, decoded in pairs])


def bits_to_bytes(bits):
    return np.packbits(np.array(bits, dtype=np.uint8), bitorder="little")


def varint_bytes(number):
    """Bytes of a number, seven bits a byte."""
    return 1 if number < 2**7 else 2 if number < 2**14 else 3


def count_bytes(payload):
    """Bytes of a payload's body, counted from what it is made of; the indices' from their code as it is documented."""
    if isinstance(payload, Dense):
        return payload.size * payload.dtype.itemsize
    if isinstance(payload, Coefficients):
        return payload.values.numel() * payload.dtype.itemsize
    if isinstance(payload, Signs):
        return math.ceil(payload.size / 8) + payload.dtype.itemsize
    if isinstance(payload, Rounded):
        return 1 + payload.size * payload.values.dtype.itemsize
    if isinstance(payload, Omitted):
        return 0
    if isinstance(payload, Quantized):
        scales = math.ceil((payload.phase + payload.size) / payload.bucket_size) * payload.dtype.itemsize
        settings_ = 1 + varint_bytes(payload.bucket_size) + varint_bytes(payload.phase)
        return settings_ + scales + math.ceil(payload.size * payload.bits / 8)
    if isinstance(payload, Levels):
        out = Writer()
        write_integers(out, payload.integers, choose_code(payload.integers))
        assert len(out.getvalue()) <= 1 + math.ceil(payload.size * (2 * payload.top).bit_length() / 8)
        return 2 + (1 if payload.bucket_size else 0) + payload.scales.nbytes + len(out.getvalue())
    if isinstance(payload, RandomSparse):
        return 8 + 1 + varint_bytes(payload.body.size) + 1 + count_bytes(payload.body)
    if isinstance(payload, LowRank):
        extents = (payload.rows, payload.columns, payload.rank)
        return sum(map(varint_bytes, extents)) + 1 + count_bytes(payload.body)
    if isinstance(payload, Blocks):
        bodies = [count_bytes(part) for part in payload.parts]
        framing = sum(1 + varint_bytes(part.size) + varint_bytes(n) for part, n in zip(payload.parts, bodies))
        return framing + sum(bodies)
    assert isinstance(payload, Sparse)
    indices, k = payload.indices.tolist(), payload.indices.numel()
    width = payload.to_bytes()[varint_bytes(k)]
    if width == 255:
        low, high = 0, math.ceil(payload.size / 8)
    else:
        gaps = [index - previous - 1 for previous, index in zip([-1, *indices], indices)]
        low, high = math.ceil(k * width / 8), math.ceil(sum(1 + gap // 2**width for gap in gaps) / 8)
    assert low + high <= math.ceil(payload.size / 8)
    return varint_bytes(k) + 1 + varint_bytes(high) + 1 + low + high + count_bytes(payload.body)


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
    assert b.dot(a) == pytest.approx(a.dot(b), rel=1e-12, abs=1e-12)
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


@pytest.mark.parametrize("kind", [*SENT, "coefficients"])
@given(sizes=layouts, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
@FAST
def test_num_bits_are_the_bytes_of_the_binary_form_and_an_independent_count(kind, sizes, seed, dtype):
    if kind == "coefficients":
        payload = Coefficients(torch.zeros(seed % 5, dtype=dtype), sizes)
    else:
        payload, _ = reference(kind, sizes, seed, dtype)
    assert payload.num_bits == 8 * len(payload.to_bytes()) == 8 * count_bytes(payload)
    assert len(Message(3, payload).to_bytes()) == HEADER_BYTES + payload.num_bits // 8


@pytest.mark.parametrize("size", [127, 128, 200, 16383, 16384, 50_000])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 1.0])
def test_num_bits_of_large_payloads_equal_an_independent_count(size, share):
    rng = np.random.default_rng(size)
    k = max(1, round(share * size))
    values = torch.tensor(rng.normal(size=size), dtype=torch.float32)
    indices = torch.tensor(np.sort(rng.choice(size, size=k, replace=False)), dtype=torch.int32)
    signs = Signs.pack(values[:k], torch.tensor(1.0), (k,))
    payloads = [
        Sparse(values[:k], indices, (size,)),
        Sparse(signs, indices, (size,)),
        RandomSparse(values[:k], 5, True, (size,)),
        RandomSparse(signs, 5, True, (size,)),
        LowRank(values, size - 1, 1, [(size - 1, 1)]),
    ]
    for payload in [*payloads, Blocks(payloads)]:
        assert payload.num_bits == 8 * len(payload.to_bytes()) == 8 * count_bytes(payload)
    # Near the entropy of indices spread at random: -log2(q) - (1 - q) / q log2(1 - q) bits each, q = k / M.
    q = k / size
    entropy = -math.log2(q) - (1 - q) / q * math.log2(1 - q) if k < size else 0.0
    index_bits = payloads[0].num_bits - 32 * k
    if k >= 500:
        assert entropy * k < index_bits < (entropy + 0.3) * k + 8 * 10 or q > 0.2
        assert index_bits <= size + 8 * 10


def test_sparse_indices_by_hand():
    # 1 of 64 entries, the gap 37: with the typical b = 5 it is 37 & 31 = 5 and one zero before a one; 1 + 1 bytes
    # (any b from 0 to 4 takes as many or more), a bitmap 8. Framing 4 bytes, the value 4.
    payload = Sparse(torch.tensor([2.0]), torch.tensor([37], dtype=torch.int32), (64,))
    assert payload.num_bits == 8 * (4 + 2 + 4)
    # All of 16 entries: gaps of 0 are a bit each.
    payload = Sparse(torch.ones(16), torch.arange(16, dtype=torch.int32), (16,))
    assert payload.num_bits == 8 * (4 + 2 + 16 * 4)
    # None: the framing alone.
    assert Sparse(torch.ones(0), torch.arange(0, dtype=torch.int32), (16,)).num_bits == 8 * 4


@given(size=st.integers(1, 40), seed=seeds)
@FAST
def test_num_bits_of_each_kind_by_its_formula(size, seed):
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(size=size), dtype=torch.float32)
    k = int(rng.integers(0, size + 1))
    whole_bytes = (size + 7) // 8
    payloads = {
        Dense(values): 32 * size,
        Dense(values.double()): 64 * size,
        Rounded(values.half(), "float32", (size,)): 8 + 16 * size,
        RandomSparse(values, 1, False, (2 * size,)): 64 + 3 * 8 + 32 * size,
        LowRank(values.repeat(3), 3 * size - 1, 1, [(3 * size - 1, 1)]): 4 * 8 + 3 * 32 * size,
        Quantized(torch.zeros(size, dtype=torch.uint8), torch.ones(1), 8, size, 0, (size,)): 24 + 32 + 8 * size,
        Omitted("float32", (size,)): 0,
        Signs.pack(values, torch.tensor(1.0), (size,)): 8 * whole_bytes + 32,
        Coefficients(values[:k], (size,)): 32 * k,
    }
    for payload, bits in payloads.items():
        assert payload.num_bits == 8 * len(payload.to_bytes()) == bits, type(payload).__name__
    blocks = Blocks(list(payloads))
    framing = sum(1 + varint_bytes(payload.size) + varint_bytes(bits // 8) for payload, bits in payloads.items())
    assert blocks.num_bits == 8 * len(blocks.to_bytes()) == 8 * framing + sum(payloads.values())


@pytest.mark.parametrize(("size", "bits"), [(1, 40), (7, 40), (8, 40), (9, 48), (16, 48), (17, 56)])
def test_signs_are_padded_to_whole_bytes(size, bits):
    assert Signs.pack(torch.ones(size), torch.tensor(1.0), (size,)).num_bits == bits


def test_a_part_of_a_split_payload_counts_only_its_own_bits():
    values = torch.arange(1.0, 11.0)
    dense = Dense(values, (2, 5, 3)).split()
    assert [part.num_bits for part in dense] == [64, 160, 96]
    sparse = Sparse(values[[0, 6, 7]], torch.tensor([0, 6, 7], dtype=torch.int32), (2, 5, 3)).split()
    # Four bytes of framing, one of indices, a value.
    assert [part.num_bits for part in sparse] == [72, 72, 72]
    signs = Signs.pack(values, torch.tensor(1.0), (1, 9)).split()
    assert [part.num_bits for part in signs] == [8 + 32, 16 + 32]


def test_a_message_counts_its_payload_and_its_buffers():
    buffers = {"mean": torch.zeros(3), "half": torch.zeros(2, dtype=torch.float16)}
    assert Message(7, Dense(torch.zeros(5))).num_bits == 5 * 32
    # A byte for the body's length; for each buffer its name and its length, dtype, dimensions and extent.
    message = Message(7, Dense(torch.zeros(5)), buffers)
    assert message.num_bits == 5 * 32 + 8 + 2 * 8 * (1 + 4 + 3) + 3 * 32 + 2 * 16
    assert len(message.to_bytes()) == HEADER_BYTES + message.num_bits // 8


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
@pytest.mark.parametrize("kind", [*SENT, "coefficients", "nested", "omitted"])
def test_every_sent_kind_survives_a_file(kind, dtype):
    sizes = (3, 1, 5)
    if kind == "coefficients":
        payload = Coefficients(torch.tensor([0.25], dtype=dtype), sizes)
    elif kind == "omitted":
        payload = Omitted(str(dtype).removeprefix("torch."), sizes)
    elif kind == "nested":
        inside = Blocks([reference("signs", (11,), 1, dtype)[0], Coefficients(torch.tensor([2.0], dtype=dtype), (4,))])
        payload = Blocks([reference("dense", (2,), 2, dtype)[0], inside])
    else:
        payload = reference(kind, sizes, 3, dtype)[0]
    restored = Payload.from_state(through_a_file(payload.to_state()))
    assert type(restored) is type(payload)
    assert restored.layout == payload.layout
    assert restored.dtype == dtype
    assert restored.num_bits == payload.num_bits
    assert [t.dtype for t in restored.tensors()] == [t.dtype for t in payload.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(restored.tensors(), payload.tensors(), strict=True))
    assert restored.to_bytes() == payload.to_bytes()
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


def test_a_combination_is_never_sent():
    combination = Combination([Dense(torch.ones(2)), Dense(torch.zeros(2))], [3.0, 1.0])
    with pytest.raises(TypeError, match="never sent"):
        combination.to_state()
    with pytest.raises(TypeError, match="never sent"):
        _ = combination.num_bits
    with pytest.raises(TypeError):
        combination.to_bytes()
    with pytest.raises(TypeError):
        Message(0, combination).to_bytes()


def test_a_layout_holds_shapes_and_ints_stand_for_vectors():
    layout = Layout([(7, 3), 3, (), (2, 2, 3)])
    assert layout.shapes == ((7, 3), (3,), (), (2, 2, 3))
    assert layout.sizes == (21, 3, 1, 12)
    assert layout.size == 37
    payload = Dense(torch.zeros(37), layout)
    assert payload.layout is layout
    assert (payload.sizes, payload.size) == (layout.sizes, 37)
    assert [part.layout for part in payload.split()] == [Layout([shape]) for shape in layout.shapes]
    assert Layout([2, 3]) == Layout([(2,), (3,)]) != Layout([(2, 3)])


@pytest.mark.parametrize("kind", SENT)
@given(sizes=layouts, seed=seeds)
@settings(deadline=None, max_examples=10)
def test_a_clone_shares_no_memory(kind, sizes, seed):
    payload, expected = reference(kind, sizes, seed)
    copy = payload.clone()
    for tensor in payload.tensors():
        tensor.fill_(1)
    np.testing.assert_array_equal(copy.dense().numpy(), expected)


@pytest.mark.parametrize("size", [1000, 2**20 + 12345])  # the second is read in blocks
def test_inner_products_with_several_vectors(size):
    torch.manual_seed(0)
    update, others = torch.randn(size), [torch.randn(size) for _ in range(2)]
    for known in (False, True):
        payload = Dense(update)
        if known:
            payload.squared_norm()
        products = payload.dots([Dense(other) for other in others])
        expected = [float(update.double() @ other.double()) for other in others]
        assert products == pytest.approx(expected, abs=1e-5 * size**0.5)
        assert payload.squared_norm() == pytest.approx(float(update.double() @ update.double()), rel=1e-5)


def test_inner_products_in_blocks_survive_any_scale():
    update = torch.full((2**20 + 5,), 1e-25)  # its squares underflow in float32
    assert Dense(update).dots([Dense(update)]) == pytest.approx([(2**20 + 5) * 1e-50], rel=1e-5)
    large = torch.full((2**20 + 5,), 1e20)  # and these overflow
    assert Dense(large).dots([Dense(large)]) == pytest.approx([(2**20 + 5) * 1e40], rel=1e-5)
