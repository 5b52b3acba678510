"""The binary form of messages: what goes in comes out, byte for byte as documented, and nothing else is let in."""

import contextlib
import math
import struct
import time
import zlib

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
    LayerRecycling,
    LookBack,
    Omitted,
    PowerSGD,
    Quantized,
    RandK,
    RandomSparse,
    Signs,
    SignSGD,
    Ternary,
    TopK,
    as_chain,
)
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.bits import count_bits, pack_bits, pack_integers, unpack_bits, unpack_integers
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Coefficients, Combination
from lightning_lbgm.payloads.gaps import GapCode, choose_gap_code, decode_gaps, encode_gaps
from lightning_lbgm.payloads.integers import Integers
from lightning_lbgm.payloads.levels import Levels
from lightning_lbgm.payloads.low_rank import LowRank
from lightning_lbgm.payloads.rounded import Rounded
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.protocol.message import HEADER_BYTES, Message, MessageError

seeds = st.integers(0, 2**32 - 1)
SHAPES = [(4, 6), (5,), (3, 2, 2, 2), (), (2, 9)]
LAYOUT = Layout(SHAPES)  # 24 + 5 + 24 + 1 + 18 = 72 entries


# Messages of every kind


def random_values(rng, size, dtype=torch.float32):
    return torch.from_numpy(np.asarray(rng.normal(size=size))).to(dtype)


def random_indices(rng, size, k):
    return torch.from_numpy(np.sort(rng.choice(size, size=k, replace=False))).int()


def quantized(rng, size, dtype, phase=0):
    bits, bucket_size = int(rng.integers(2, 9)), int(rng.integers(phase + 1, phase + 1 + size))
    codes = pack_integers(torch.tensor(rng.integers(0, 2**bits - 1, size)), bits)
    scales = random_values(rng, -(-(phase + size) // bucket_size), dtype).abs()
    return Quantized(codes, scales, bits, bucket_size, phase, (size,))


def levels(rng, size, dtype, share=1.0):
    """Integers of which about a share are not the same one, in one bucket or in several, from a phase on or not."""
    top, base = int(rng.integers(1, 128)), int(rng.integers(-1, 2))
    integers = np.where(rng.random(size) < share, rng.integers(-top, top + 1, size), base)
    bucket_size = int(rng.integers(0, size + 2))
    phase = int(rng.integers(0, bucket_size)) if bucket_size else 0
    number = -(-(phase + size) // bucket_size) if bucket_size else 1
    scales = random_values(rng, number, dtype).abs()
    return Levels.of(Integers.of(torch.tensor(integers, dtype=torch.int8), top), scales, bucket_size, phase, (size,))


def rounded(rng, size, dtype):
    smaller = torch.float32 if dtype == torch.float64 else torch.float16
    return Rounded(random_values(rng, size, smaller), str(dtype).removeprefix("torch."), (size,))


def signs(rng, size, dtype):
    return Signs.pack(random_values(rng, size), random_values(rng, (), dtype), (size,))


def sparse(rng, size, dtype, body=None):
    k = int(rng.integers(0, size + 1)) if body is None else int(rng.integers(1, size + 1))
    values = random_values(rng, k, dtype) if body is None else body(rng, k, dtype)
    return Sparse(values, random_indices(rng, size, k), (size,))


def random_sparse(rng, size, dtype, body=random_values):
    seed = int(rng.integers(0, 2**63 - 1))
    return RandomSparse(body(rng, int(rng.integers(1, size + 1)), dtype), seed, bool(rng.integers(2)), (size,))


def low_rank(rng, size, dtype, body=random_values):
    rows = int(rng.choice([n for n in range(1, size + 1) if size % n == 0]))
    rank = int(rng.integers(1, min(rows, size // rows) + 1))
    return LowRank(body(rng, rank * (rows + size // rows), dtype), rows, size // rows)


def omitted(rng, size, dtype):
    return Omitted(str(dtype).removeprefix("torch."), (size,))


KINDS = {
    "dense": lambda rng, n, dtype: Dense(random_values(rng, n, dtype)),
    "coefficients": lambda rng, n, dtype: Coefficients(random_values(rng, int(rng.integers(1, 5)), dtype), (n,)),
    "sparse": sparse,
    "empty sparse": lambda rng, n, dtype: Sparse(torch.zeros(0, dtype=dtype), random_indices(rng, n, 0), (n,)),
    "full sparse": lambda rng, n, dtype: Sparse(random_values(rng, n, dtype), random_indices(rng, n, n), (n,)),
    "sparse signs": lambda rng, n, dtype: sparse(rng, n, dtype, signs),
    "sparse rounded": lambda rng, n, dtype: sparse(rng, n, dtype, rounded),
    "sparse quantized": lambda rng, n, dtype: sparse(rng, n, dtype, quantized),
    "random sparse": random_sparse,
    "random sparse rounded": lambda rng, n, dtype: random_sparse(rng, n, dtype, rounded),
    "random sparse quantized": lambda rng, n, dtype: random_sparse(rng, n, dtype, quantized),
    "signs": signs,
    "quantized": quantized,
    "quantized from a phase": lambda rng, n, dtype: quantized(rng, n, dtype, phase=int(rng.integers(1, 300))),
    "levels": levels,
    "few levels": lambda rng, n, dtype: levels(rng, n, dtype, share=0.1),
    "sparse levels": lambda rng, n, dtype: sparse(rng, n, dtype, levels),
    "random sparse levels": lambda rng, n, dtype: random_sparse(rng, n, dtype, levels),
    "low rank levels": lambda rng, n, dtype: low_rank(rng, n, dtype, levels),
    "rounded": rounded,
    "low rank": low_rank,
    "low rank rounded": lambda rng, n, dtype: low_rank(rng, n, dtype, rounded),
    "low rank quantized": lambda rng, n, dtype: low_rank(rng, n, dtype, quantized),
    "low rank of rank 0": lambda rng, n, dtype: LowRank(torch.zeros(0, dtype=dtype), n, 1),
    "omitted": omitted,
}


def blocks(rng, sizes, dtype):
    makers = list(KINDS.values())
    parts = [makers[int(rng.integers(len(makers)))](rng, n, dtype) for n in sizes]
    # Nested as deep as the stages nest: blocks, of blocks, of sparse payloads, of quantized values.
    if len(parts) > 2 and rng.integers(2):
        parts = [parts[0], Blocks(parts[1:])]
    return Blocks(parts)


def some_buffers(rng):
    return {
        "net.1.running_mean": random_values(rng, 3),
        "größe/☃": random_values(rng, (), torch.float64),  # 0-dimensional
        "": random_values(rng, (2, 1, 3), torch.bfloat16),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }


def some_numbers(rng):
    return dict(zip(("round_index", "sequence", "base_version", "state_version"), rng.integers(0, 2**32, 4).tolist()))


STAGES = {
    "nothing": [],
    "topk": [TopK(0.3)],
    "sign": [SignSGD()],
    "topk, sign": [TopK(0.3), SignSGD()],
    "topk, qsgd": [TopK(0.3), QSGD(3, bucket_size=4)],
    "topk, cast": [TopK(0.3), Cast()],
    "qsgd": [QSGD(7, bucket_size=10)],
    "ternary": [Ternary()],
    "qsgd of a norm": [QSGD(2, scale="norm")],
    "cast": [Cast("float16")],
    "randk": [RandK(0.2)],
    "randk, qsgd": [RandK(0.2), QSGD(15)],
    "randk, cast": [RandK(0.2, unbiased=False), Cast()],
    "atomo": [ATOMO(1)],
    "atomo at random": [ATOMO(1, "unbiased")],
    "powersgd": [PowerSGD(1)],
    "atomo, qsgd": [ATOMO(1), QSGD(31)],
    "powersgd, cast": [PowerSGD(1), Cast()],
    "atomo, cast, topk": [ATOMO(1), Cast(), TopK(0.4)],
    "lookback": [LookBack(1.0)],
    "lookback of rank 3": [LookBack(0.9, rank=3)],
    "lookback by layer": [LookBack(0.6, "layer")],
    "atomo, cast, lookback by layer": [ATOMO(1), Cast(), LookBack(0.6, "layer")],
    "atomo, qsgd, lookback by layer": [ATOMO(1), QSGD(31), LookBack(0.6, "layer")],
    "topk, lookback by layer": [TopK(0.3), LookBack(0.6, "layer")],
    "sign, lookback by layer": [SignSGD(), LookBack(0.6, "layer")],
    "qsgd, lookback by layer": [QSGD(7, bucket_size=10), LookBack(0.6, "layer")],
    "ternary, lookback by layer": [Ternary(), LookBack(0.6, "layer")],
    "qsgd, layer recycling": [QSGD(7, bucket_size=10), LayerRecycling(2)],
    "atomo, layer recycling": [ATOMO(1), LayerRecycling(2)],
}


def staged_payloads(name, seed, dtype=torch.float32, rounds=3):
    """What a chain of stages sends in some rounds; the first tensor turns, the others keep their direction."""
    rng = np.random.default_rng(seed)
    chain = as_chain(STAGES[name])
    state = chain.init()
    shared = chain.init_shared()
    if "layer recycling" in name:
        shared["stages"][-1].update(layers=[0, 3], update=torch.zeros(LAYOUT.size, dtype=dtype))
    direction = rng.normal(size=LAYOUT.size)
    for round_index in range(rounds):
        values = direction * (1 + round_index) + 0.2 * rng.normal(size=LAYOUT.size)
        values[:24] = rng.normal(size=24)
        context = Context(round_index, shared, seed, (0,))
        yield chain.encode(Dense(torch.tensor(values, dtype=dtype), LAYOUT), state, context).payload


# Round trips


def raw(tensor):
    same_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.contiguous().view(same_width).tolist()


def assert_equal_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert raw(one) == raw(other)


def assert_same_state(one, other, shapes):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key != "shapes" or shapes:
                assert_same_state(value, other[key], shapes)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same_state(a, b, shapes)
    elif isinstance(one, torch.Tensor):
        assert_equal_bits(one, other)
    else:
        assert one == other


def holds_coefficients(payload):
    if isinstance(payload, Coefficients):
        return True
    inside = payload.parts if isinstance(payload, Blocks) else [getattr(payload, "body", None)]
    return any(isinstance(part, Payload) and holds_coefficients(part) for part in inside)


def assert_survives_the_wire(message, layout=None):
    data = message.to_bytes()
    assert len(data) == HEADER_BYTES + message.num_bits // 8
    assert message.num_bits % 8 == 0
    received = Message.from_bytes(data, layout)
    numbers = ("client_id", "round_index", "sequence", "base_version", "state_version", "num_bits")
    assert [getattr(received, name) for name in numbers] == [getattr(message, name) for name in numbers]
    assert list(received.buffers) == list(message.buffers)
    for name, tensor in message.buffers.items():
        assert_equal_bits(tensor, received.buffers[name])
    assert_same_state(message.payload.to_state(), received.payload.to_state(), shapes=False)
    assert received.payload.dtype == message.payload.dtype
    if layout is not None:
        assert received.payload.layout == layout
    if not holds_coefficients(message.payload):
        assert_equal_bits(message.payload.dense(), received.payload.dense())
    assert received.to_bytes() == data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 70), seed=seeds, buffered=st.booleans())
@settings(deadline=None, max_examples=8)
def test_every_kind_survives_the_wire(kind, dtype, size, seed, buffered):
    rng = np.random.default_rng(seed)
    for length in (1, size):
        payload = KINDS[kind](rng, length, dtype)
        buffers = some_buffers(rng) if buffered else {}
        client_id = int(rng.integers(0, 2**32))
        assert_survives_the_wire(Message(client_id, payload, buffers, **some_numbers(rng)))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=seeds, double=st.booleans())
@settings(deadline=None, max_examples=60)
def test_blocks_of_mixed_kinds_survive_the_wire(sizes, seed, double):
    rng = np.random.default_rng(seed)
    payload = blocks(rng, sizes, torch.float64 if double else torch.float32)
    assert_survives_the_wire(Message(1, payload, some_buffers(rng), **some_numbers(rng)), payload.layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STAGES)
def test_what_the_stages_send_survives_the_wire_with_the_shapes(name, dtype):
    for seed in range(2):
        for payload in staged_payloads(name, seed, dtype):
            buffers = some_buffers(np.random.default_rng(seed)) if seed else {}
            message = Message(3, payload, buffers)
            assert_survives_the_wire(message, LAYOUT)
            received = Message.from_bytes(message.to_bytes(), LAYOUT).payload
            assert_same_state(payload.to_state(), received.to_state(), shapes=True)
            assert_survives_the_wire(message)


def test_the_stages_above_send_every_kind():
    sent = set()

    def walk(state):
        if isinstance(state, dict):
            sent.add(state["kind"])
            for value in state.values():
                walk(value)
        elif isinstance(state, list):
            for item in state:
                walk(item)

    for name in STAGES:
        for payload in staged_payloads(name, 0):
            walk(payload.to_state())
    expected = {"Dense", "Sparse", "Signs", "Coefficients", "Blocks", "LowRank", "Levels", "Rounded", "RandomSparse"}
    assert sent == expected | {"Omitted"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_updates_survive_the_wire(dtype):
    rng = np.random.default_rng(0)
    for kind in ("dense", "sparse", "sparse quantized", "levels", "signs", "coefficients", "low rank"):
        assert_survives_the_wire(Message(1, KINDS[kind](rng, 12, dtype)))


def test_special_values_keep_their_bits():
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    assert_survives_the_wire(Message(1, Dense(values), {"nan": values[4]}))


def test_a_message_without_buffers_is_as_large_as_its_payload():
    assert Message(0, Dense(torch.zeros(5))).num_bits == 5 * 32
    # One byte says that the body has 20 bytes; then name, length of the name, dtype, number of dimensions, one extent.
    buffers = {"ab": torch.zeros(3, dtype=torch.float64)}
    assert Message(0, Dense(torch.zeros(5)), buffers).num_bits == 8 * (1 + 20 + (1 + 2 + 1 + 1 + 1) + 24)


def test_tensors_that_are_views_are_written_as_their_values():
    values = torch.arange(12.0).view(3, 4)
    received = Message.from_bytes(Message(0, Dense(values.T[1]), {"b": values.T}).to_bytes())
    assert received.payload.dense().tolist() == [1.0, 5.0, 9.0]
    assert torch.equal(received.buffers["b"], values.T)


@pytest.mark.parametrize("values", [torch.ones(()).expand(1), torch.ones(()).expand(3), torch.zeros(1).expand(0)])
def test_tensors_that_repeat_one_number_are_written_as_their_values(values):
    assert Message.from_bytes(Message(0, Dense(values)).to_bytes()).payload.dense().tolist() == values.tolist()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_message_owns_its_memory(kind):
    data = bytearray(Message(0, Dense(torch.ones(3)), {"b": torch.ones(1)}).to_bytes())
    received = Message.from_bytes(kind(data))
    data[:] = bytes(len(data))
    assert received.payload.dense().tolist() == [1.0, 1.0, 1.0]
    received.payload.dense().add_(1)
    assert received.buffers["b"].tolist() == [1.0]


# The format itself


def test_a_small_message_has_exactly_the_documented_bytes():
    payload = Sparse(torch.tensor([1.5, -2.0]), torch.tensor([1, 70], dtype=torch.int32), (100,))
    message = Message(
        7,
        payload,
        {"é": torch.tensor(2.0)},
        round_index=3,
        sequence=5,
        base_version=0x01020304,
        state_version=2**32 - 1,
    )
    header = (
        "01 04 80 00"  # version, Sparse, float32 with buffers, unused
        "07000000 03000000 05000000 04030201 ffffffff"  # client, round, sequence, base, memory
        "6400000000000000"  # 100 entries
    )
    # Gaps 1 and 68 with 4 low bits each: 1 and 4 as they are; then 0 and 4 in unary, 1 00001, lowest bit first.
    body = "02 04 01" + "41" + "21" + "01" + "0000c03f 000000c0"
    content = "0e" + body + "02 c3a9 00 00 00000040"  # length of the body; name, float32, no dimensions, 2.0
    checksum = struct.pack("<I", zlib.crc32(bytes.fromhex(header + content)))
    assert message.to_bytes() == bytes.fromhex(header) + checksum + bytes.fromhex(content)
    assert checksum.hex() == "c4879303"
    assert HEADER_BYTES == 36


TINY, ONE = (2,), torch.ones(1)
BODIES = [
    (Dense(torch.tensor([1.0, -2.0])), 1, "0000803f 000000c0"),
    (Dense(torch.tensor([1.0], dtype=torch.float64)), 1, "000000000000f03f"),
    (Coefficients(torch.tensor([0.5, 2.0]), (9,)), 2, "0000003f 00000040"),
    # A byte for the kind, the size, the length; 300 = 0b10_0101100, seven bits a byte.
    (Blocks([Dense(torch.tensor([1.0])), Omitted("float32", (300,))]), 3, "01 01 04 0000803f" + "0a ac02 00"),
    # Four of eight entries: a bitmap, 255, is as small as anything; entries 0, 1, 4, 7 are 0b10010011.
    (
        Sparse(
            Signs(torch.tensor([0b101], dtype=torch.uint8), torch.tensor(1.0), (4,)),
            torch.tensor([0, 1, 4, 7]).int(),
            [8],
        ),
        4,
        "04 ff 01" + "93" + "06" + "05 0000803f",
    ),
    (Sparse(torch.zeros(0), torch.zeros(0, dtype=torch.int32), (5,)), 4, "00 00 00 01"),
    (RandomSparse(torch.tensor([1.0]), 258, True, (4,)), 5, "0201000000000000 01 01 01 0000803f"),
    (Signs.pack(torch.tensor([1.0, -1, 1, 1, -1, -1, -1, -1, 0]), torch.tensor(2.0), (9,)), 6, "0d01 00000040"),
    # Levels 0, 7, 14 of 4 bits: nibbles 0, 7 and e, lowest first; bucket of 200 entries, the first at 130.
    (
        Quantized(torch.tensor([0x70, 0x0E], dtype=torch.uint8), torch.tensor([1.0]), 4, 200, 130, (3,)),
        7,
        "04 c801 8201" + "0000803f" + "700e",
    ),
    (Rounded(torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "float32", TINY), 8, "02 803f 00c0"),
    (Rounded(torch.tensor([1.0, -2.0], dtype=torch.float16), "float32", TINY), 8, "03 003c 00c0"),
    (Rounded(torch.tensor([1.0, -2.0]), "float64", TINY), 8, "00 0000803f 000000c0"),
    # P = (1, 2)^T, Q = (3)
    (LowRank(torch.tensor([1.0, 2.0, 3.0]), 2, 1), 9, "02 01 01 01 0000803f 00000040 00004040"),
    (Omitted("float32", (300,)), 10, ""),
    # Levels -1, 0, 1, 1 of two bits: codes 0, 1, 2, 2, lowest first.
    (
        Levels.of(Integers.of(torch.tensor([-1, 0, 1, 1], dtype=torch.int8), 1), torch.tensor([2.0]), 0, 0, (4,)),
        14,
        "01 00 00000040" + "00 a4",
    ),
    # Buckets of 200, the first entry is 130; 300 entries of level -3 of 5: no exception, and the base plus 5.
    (
        Levels.of(Integers.of(torch.full((300,), -3).char(), 5), torch.tensor([2.0, 1.0, 2.0]), 200, 130, (300,)),
        14,
        "05 c801 8201 00000040 0000803f 00000040" + "02 00 02",
    ),
    # Exceptions 1 and -1 at 9 and 59 of 99: gaps of four and six bits, a table of two lengths in a fixed width of one
    # bit, 0 and 1; of 9 the bits 001, of 49 10001. Then a table of codes 0 and 2, and the second and the first.
    (
        Levels.of(Integers.at(torch.tensor([9, 59]).int(), torch.tensor([1, -1]).char(), 0, 99, 1), ONE, 0, 0, (99,)),
        14,
        "01 00 0000803f" + "02 02 01" + "50 3f 00 02" + "89" + "05 3f 00 01",
    ),
]


@pytest.mark.parametrize(("payload", "code", "body"), BODIES, ids=lambda value: type(value).__name__)
def test_each_body_has_exactly_the_documented_bytes(payload, code, body):
    data = Message(0, payload).to_bytes()
    assert data[1] == code
    assert data[2] == {torch.float32: 0, torch.float64: 1}[payload.dtype]
    assert data[HEADER_BYTES:] == bytes.fromhex(body)
    assert_survives_the_wire(Message(0, payload))


# Bits and gaps


@given(width=st.integers(1, 16), size=st.integers(0, 50), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_integers_of_every_width_are_packed_lowest_bit_first(width, size, seed):
    values = np.random.default_rng(seed).integers(0, 2**width, size).tolist()
    number = sum(value << width * index for index, value in enumerate(values))
    packed = pack_integers(torch.tensor(values, dtype=torch.int64), width)
    assert bytes(packed.tolist()) == number.to_bytes(-(-size * width // 8), "little")
    assert unpack_integers(packed, size, width).tolist() == values


@given(bits=st.lists(st.booleans(), max_size=40))
@settings(deadline=None, max_examples=40)
def test_bits_are_packed_and_counted_as_numpy_does(bits):
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool), bitorder="little").tolist()
    assert unpack_bits(packed, len(bits)).tolist() == [int(bit) for bit in bits]
    assert count_bits(packed) == sum(bits)


def slow_rice(indices, width):
    """Golomb-Rice code of the gaps, bit by bit: the low bits, and the rest in unary."""
    low, high, before = [], [], -1
    for index in indices:
        gap = index - before - 1
        before = index
        low += [gap >> position & 1 for position in range(width)]
        high += [0] * (gap >> width) + [1]

    def to_bytes(bits):
        return sum(bit << position for position, bit in enumerate(bits)).to_bytes(-(-len(bits) // 8), "little")

    return to_bytes(low), to_bytes(high)


def slow_indices(low, high, count, width):
    """Undo ``slow_rice``, or read a bitmap where the width is -1."""
    bits = [byte >> position & 1 for byte in high for position in range(8)]
    if width < 0:
        return [index for index, bit in enumerate(bits) if bit]
    lows, indices, before, quotient = int.from_bytes(low, "little"), [], -1, 0
    for bit in bits:
        if not bit:
            quotient += 1
            continue
        gap = (quotient << width) + (lows >> width * len(indices) & (1 << width) - 1)
        before, quotient = before + gap + 1, 0
        indices.append(before)
    assert len(indices) == count
    return indices


index_sets = st.one_of(
    st.sets(st.integers(0, 99), max_size=100),
    st.sets(st.integers(0, 2**20 - 1), max_size=30),
    # Runs, far from each other.
    st.sets(st.integers(0, 30), max_size=4).map(lambda starts: {s * 30000 + i for s in starts for i in range(25)}),
)


@given(chosen=st.sets(st.integers(0, 2047), max_size=60), width=st.integers(0, 20))
@settings(deadline=None, max_examples=60)
def test_gaps_are_coded_as_a_slow_golomb_rice_coder_does(chosen, width):
    indices = sorted(chosen)
    tensor, size = torch.tensor(indices).int(), 2048
    expected = slow_rice(indices, width)
    low, high = encode_gaps(tensor, size, GapCode(width, len(expected[0]), len(expected[1])))
    assert (bytes(low.tolist()), bytes(high.tolist())) == expected
    assert decode_gaps(low, high, len(indices), size, width).tolist() == indices


@given(chosen=index_sets)
@settings(deadline=None, max_examples=80)
def test_the_chosen_code_decodes_slowly_and_is_no_larger_than_the_plain_ones(chosen):
    indices = sorted(chosen)
    tensor = torch.tensor(indices).int()
    for size in {indices[-1] + 1 if indices else 1, 2**20}:
        code = choose_gap_code(tensor, size)
        low, high = (bytes(part.tolist()) for part in encode_gaps(tensor, size, code))
        assert (len(low), len(high)) == (code.low_bytes, code.high_bytes)
        assert slow_indices(low, high, len(indices), code.width) == indices
        assert len(low) + len(high) <= min(-(-size // 8), 4 * len(indices) + 2)


@pytest.mark.parametrize("density", [0.01, 0.03, 0.1])
def test_random_indices_take_within_a_tenth_of_their_entropy(density):
    size = 20_000
    k = round(density * size)
    entropy = (math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)) / math.log(2)
    for seed in range(5):
        code = choose_gap_code(random_indices(np.random.default_rng(seed), size, k), size)
        assert entropy < 8 * (code.low_bytes + code.high_bytes) < 1.1 * entropy


def test_indices_beyond_32_bits_are_coded():
    size = 2**33
    payload = Sparse(torch.ones(3), torch.tensor([5, 2**32, size - 1]), (size,))
    received = Message.from_bytes(Message(0, payload).to_bytes()).payload
    assert received.indices.tolist() == [5, 2**32, size - 1]
    assert received.indices.dtype == torch.int64


# What is no message


def sealed(data):
    """The bytes with the checksum that makes them look intact."""
    head, content = data[: HEADER_BYTES - 4], data[HEADER_BYTES:]
    return head + struct.pack("<I", zlib.crc32(head + content)) + content


def forged(code, size, content, dtype=0):
    """A message with an intact checksum around any content."""
    head = struct.pack("<BBBxIIIIIQ", 1, code, dtype, 7, 0, 1, 0, 0, size)
    return sealed(head + bytes(4) + content)


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@contextlib.contextmanager
def little_memory(spare=2**28):
    """Let large allocations fail inside, where the system can."""
    resource = pytest.importorskip("resource")
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        pytest.skip("the memory in use is not known")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def samples():
    """One message of every kind and of every chain, all of 72 entries, and its parameter tensors."""
    rng = np.random.default_rng(5)
    payloads = [maker(rng, LAYOUT.size, torch.float32) for maker in KINDS.values()]
    payloads += [blocks(rng, LAYOUT.sizes, torch.float64) for _ in range(3)]
    payloads += [list(staged_payloads(name, 1))[-1] for name in STAGES]
    for index, payload in enumerate(payloads):
        yield Message(7, payload, some_buffers(rng) if index % 3 == 0 else {}).to_bytes(), payload.layout


SAMPLES = list(samples())


def test_the_samples_are_messages():
    assert all(sealed(data) == data for data, _ in SAMPLES)
    assert all(Message.from_bytes(data, layout).client_id == 7 for data, layout in SAMPLES)


def test_every_truncation_and_extension_is_refused():
    for data, _ in SAMPLES:
        for length in range(len(data)):
            with pytest.raises(MessageError):
                Message.from_bytes(data[:length])
        for more in (b"\0", b"\xff" * 5, data):
            with pytest.raises(MessageError):
                Message.from_bytes(data + more)


@given(index=st.integers(0, len(SAMPLES) - 1), position=st.integers(0, 10**6), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=200)
def test_every_changed_byte_is_refused(index, position, flip):
    data = bytearray(SAMPLES[index][0])
    data[position % len(data)] ^= flip
    with pytest.raises(MessageError):
        Message.from_bytes(data)


@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_random_bytes_are_refused(data):
    with pytest.raises(MessageError):
        Message.from_bytes(data)
    with pytest.raises(MessageError):
        Message.from_bytes(b"\x01" + data)  # the right version


def read(data, layout=LAYOUT):
    """Count the ways to read bytes of which only the checksum is right; whatever is read must be whole."""
    found = 0
    for expected in (layout, None):
        try:
            message = Message.from_bytes(data, expected)
        except MessageError:
            continue
        found += 1
        again = message.to_bytes()
        assert len(again) == HEADER_BYTES + message.num_bits // 8
        assert_same_state(message.payload.to_state(), Message.from_bytes(again).payload.to_state(), shapes=False)
        if expected is None or holds_coefficients(message.payload):
            continue
        decoded = message.payload.dense()
        assert (decoded.shape, decoded.dtype) == ((layout.size,), message.payload.dtype)
        message.payload.squared_norm()
        parts = message.payload.split()
        assert [part.layout for part in parts] == [Layout([shape]) for shape in layout.shapes]
        assert raw(torch.cat([part.dense() for part in parts])) == raw(decoded)
    return found


@given(
    index=st.integers(0, len(SAMPLES) - 1), cuts=st.lists(st.integers(0, 10**6), min_size=1, max_size=3), data=st.data()
)
@settings(deadline=None, max_examples=300)
def test_changed_content_under_a_right_checksum_is_a_message_or_refused(index, cuts, data):
    sample, layout = SAMPLES[index]
    changed = bytearray(sample)
    for cut in cuts:
        action = data.draw(st.sampled_from(["set", "set", "flip", "cut", "insert", "header"]))
        at = cut % len(changed)
        if action == "set":
            changed[at] = data.draw(st.sampled_from([0, 1, 2, 127, 128, 255]))
        elif action == "flip":
            changed[at] ^= data.draw(st.integers(1, 255))
        elif action == "cut":
            del changed[max(HEADER_BYTES, at) :][: data.draw(st.integers(1, 9))]
            changed = changed[: max(HEADER_BYTES, at)]
        elif action == "insert":
            changed[max(HEADER_BYTES, at) : max(HEADER_BYTES, at)] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            changed[cut % 3] = data.draw(st.integers(0, 14))  # version, kind or dtype
    with little_memory():
        read(sealed(bytes(changed)), layout)


def test_each_single_byte_of_a_message_can_be_anything_under_a_right_checksum():
    read_or_not = {True: 0, False: 0}
    with little_memory():
        for index, (data, layout) in enumerate(SAMPLES):
            for position in range(1, min(len(data), HEADER_BYTES + 16)):
                for value in (0, 1, 3, 0x7F, 0x80, 0xFF)[(index + position) % 3 :: 3]:
                    changed = sealed(data[:position] + bytes([value]) + data[position + 1 :])
                    read_or_not[read(changed, layout) > 0] += 1
    assert min(read_or_not.values()) > 300


@given(
    code=st.integers(0, 14),
    dtype=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 128, 129, 132]),
    size=st.sampled_from([0, 1, 8, 72, 72, 72, 2**20, 2**39, 2**40, 2**64 - 1]),
    content=st.binary(max_size=60),
)
@settings(deadline=None, max_examples=300)
def test_random_content_under_a_right_checksum_is_a_message_or_refused(code, dtype, size, content):
    with little_memory():
        read(forged(code, size, content, dtype))


V = varint
ONE_SCALE = b"\x01\x00" + bytes(4)  # levels from -1 to 1, of one scale
GAPS, FAR = bytes([1, 0, 0, 0, 0, 0]), bytes([0, 0, 0, 0, 128, 0])  # tables of one bit length: 0, and 39
HUGE = 2**39
CLAIMS = {
    "dense": forged(1, HUGE, bytes(8)),
    "dense beyond the limit": forged(1, 2**63, bytes(8)),
    "part of blocks": forged(3, HUGE, b"\x01" + V(HUGE) + V(4) + bytes(4)),
    "length of a part": forged(3, 4, b"\x01" + V(4) + V(HUGE) + bytes(16)),
    "parts beyond the limit": forged(3, 4, b"\x0a" + b"\xff" * 9 + b"\x01\x00"),
    "sparse count": forged(4, HUGE, V(HUGE) + b"\x00\x00\x01"),
    "sparse count, wide": forged(4, HUGE, V(HUGE) + b"\x28\x00\x01"),
    "sparse width": forged(4, HUGE, V(1) + b"\xfe\x00\x01"),
    "sparse high bytes": forged(4, HUGE, V(1) + b"\x00" + V(HUGE) + b"\x01"),
    "sparse bitmap": forged(4, HUGE, V(1) + b"\xff" + V(HUGE // 8) + b"\x01"),
    "sparse count under a small bitmap": forged(4, HUGE, V(HUGE) + b"\xff\x01\xff\x0a"),
    "random sparse count": forged(5, HUGE, bytes(8) + b"\x01" + V(HUGE) + b"\x01"),
    "signs": forged(6, HUGE, bytes(8)),
    "quantized": forged(7, HUGE, b"\x08" + V(512) + V(0) + bytes(8)),
    "quantized bucket": forged(7, HUGE, b"\x02" + V(2**40) + V(2**40 - 1) + bytes(8)),
    "rounded": forged(8, HUGE, b"\x02" + bytes(8)),
    "levels of fixed width": forged(14, HUGE, ONE_SCALE + b"\x00" + bytes(8)),
    "levels of many buckets": forged(14, HUGE, b"\x01\x01\x00" + bytes(4) + b"\x00" + bytes(8)),
    # Tables of one symbol, of two in a fixed width, and of two of which one is all but sure.
    "levels in no bits": forged(14, HUGE, ONE_SCALE + b"\x01" + b"\x02\x3f" + b"\x00"),
    "levels in a bit each": forged(14, HUGE, ONE_SCALE + b"\x01" + b"\x03\x3f" + b"\x00" + bytes(9)),
    "levels in few bits": forged(14, HUGE, ONE_SCALE + b"\x01" + b"\x03\x80\x0f" + V(1) + bytes(7)),
    "words of levels": forged(14, HUGE, ONE_SCALE + b"\x01" + b"\x03\x80\x0f" + V(HUGE) + bytes(7)),
    "exceptions in no bits": forged(14, HUGE, ONE_SCALE + b"\x02" + V(HUGE // 8) + b"\x01" + GAPS + b"\x3f\x00"),
    "exceptions far apart": forged(14, HUGE, ONE_SCALE + b"\x02" + V(9) + b"\x01" + FAR + b"\x3f\x01" + bytes(50)),
    "low rank": forged(9, HUGE, V(2**20) + V(2**19) + V(1) + b"\x01" + bytes(8)),
    "rank": forged(9, HUGE, V(HUGE) + V(1) + V(HUGE) + b"\x01" + bytes(8)),
    "numbers beyond 64 bits": forged(9, HUGE, b"\xff" * 30),
    "body before buffers": forged(1, 1, V(HUGE) + bytes(8), dtype=128),
    "name of a buffer": forged(1, 1, V(4) + bytes(4) + V(HUGE) + b"ab", dtype=128),
    "dimensions of a buffer": forged(1, 1, V(4) + bytes(4) + b"\x01a\x00\xff" + b"\x01" * 255 + bytes(4), dtype=128),
    "dimensions of an empty buffer": forged(1, 1, V(4) + bytes(4) + b"\x01a\x00\xff" + bytes(255), dtype=128),
    "shape of a buffer": forged(1, 1, V(4) + bytes(4) + b"\x01a\x00\x02" + V(2**20) * 2, dtype=128),
    "extents that overflow": forged(1, 1, V(4) + bytes(4) + b"\x01a\x00\x04" + V(2**32) * 4, dtype=128),
    "empty buffer of huge extents": forged(1, 1, V(4) + bytes(4) + b"\x01a\x00\x03\x00" + V(2**40) * 2, dtype=128),
    "empty buffer of a huge extent": forged(1, 1, V(4) + bytes(4) + b"\x01a\x00\x02\x00" + V(2**40), dtype=128),
}
UNSAID = {  # legal: huge updates of which nearly nothing is sent
    "omitted": forged(10, HUGE, b""),
    "equal levels": forged(14, HUGE, ONE_SCALE + b"\x02\x00\x01"),
    "empty sparse": forged(4, HUGE, b"\x00\x00\x00\x01"),
    "blocks of omitted": forged(3, HUGE, (b"\x0a" + V(HUGE // 8) + b"\x00") * 8),
    "sparse of one": forged(4, HUGE, b"\x01\x26\x01" + b"\xff" * 4 + b"\x1f" + b"\x01" + b"\x0a"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_of_huge_sizes_cost_nothing(name):
    with little_memory(2**26):
        began = time.process_time()
        if name in ("dimensions of a buffer", "dimensions of an empty buffer", "empty buffer of a huge extent"):
            with contextlib.suppress(MessageError):  # odd, but no lie
                Message.from_bytes(CLAIMS[name])
        else:
            with pytest.raises(MessageError):
                Message.from_bytes(CLAIMS[name])
        assert time.process_time() - began < 0.5


@pytest.mark.parametrize("name", UNSAID)
def test_huge_updates_of_which_little_is_sent_are_read_at_no_cost(name):
    with little_memory(2**26):
        try:
            assert Message.from_bytes(UNSAID[name]).payload.size == HUGE
        except MessageError:
            assert name == "sparse of one"
        with pytest.raises(MessageError, match=rf"{HUGE} entries, not 72"):
            Message.from_bytes(UNSAID[name], LAYOUT)


SIZE = 20_000
BOMBS = {
    # Ten bytes that would decode through terabytes.
    "bucket of a quantized payload": (10, forged(7, 10, b"\x04" + V(2**39) + V(0) + bytes(4) + bytes(5))),
    "phase of a quantized payload": (10, forged(7, 10, b"\x04" + V(2**39) + V(2**38) + bytes(4) + bytes(5))),
    # Factors with more numbers than the matrix, none of them sent.
    "omitted factors": (SIZE, forged(9, SIZE, V(SIZE) + V(1) + V(SIZE) + b"\x0a")),
    "factors from a seed": (
        SIZE,
        forged(9, SIZE, V(SIZE) + V(1) + V(SIZE) + b"\x05" + bytes(8) + b"\x01\x01\x01" + bytes(4)),
    ),
    "empty sparse factors": (SIZE, forged(9, SIZE, V(SIZE) + V(1) + V(SIZE) + b"\x04\x00\x00\x00\x01")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_taken_decodes_in_memory_of_the_updates_size(name):
    size, data = BOMBS[name]
    with little_memory(2**28):
        try:
            payload = Message.from_bytes(data, Layout([size])).payload
        except MessageError:
            return
        assert payload.dense().shape == (size,)


@pytest.mark.parametrize("code", [3, 4, 5, 9])
def test_deep_nesting_is_refused(code):
    def wrap(inner, inner_code):
        if code == 3:
            return bytes([inner_code]) + b"\x01" + V(len(inner)) + inner
        if code == 4:
            return b"\x01\x00\x01\x01" + bytes([inner_code]) + inner
        if code == 5:
            return bytes(8) + b"\x00\x01" + bytes([inner_code]) + inner
        # Factors of one number each: two entries, a 2 x 1 matrix inside has three, so the innermost decides.
        return b"\x01\x01\x00" + bytes([inner_code]) + inner

    def nested(depth):
        content, inner_code = bytes(4), 1
        for _ in range(depth):
            content, inner_code = wrap(content, inner_code), code
        return forged(code, 1, content)

    if code != 9:
        assert Message.from_bytes(nested(2)).payload.dense().tolist() == [0.0]
    for depth in (10, 100, 3000):
        with pytest.raises(MessageError):
            Message.from_bytes(nested(depth))
    if code == 3:
        with pytest.raises(MessageError, match="too deep"):
            Message.from_bytes(nested(10))


REFUSED = {
    "version 2": (b"\x02" + SAMPLES[0][0][1:], "version 2"),
    "unknown kind": (forged(63, 1, bytes(4)), "kind 63"),
    "unknown kind inside": (forged(3, 1, b"\x00\x01\x00"), "kind 0"),
    "unknown dtype": (forged(1, 1, bytes(4), dtype=4), "dtype 4"),
    "values left over": (forged(1, 1, bytes(8)), "4 bytes are left over"),
    "values missing": (forged(1, 3, bytes(8)), "12 bytes are announced, 8"),
    "empty blocks": (forged(3, 0, b""), "parts"),
    "parts of another sum": (forged(3, 3, b"\x0a\x02\x00"), "not 3 in all"),
    "no coefficient": (forged(2, 5, b""), "no coefficient"),
    "half a coefficient": (forged(2, 5, bytes(6)), "6 bytes"),
    "an index too many": (forged(4, 8, b"\x01\xff\x01\x03\x01" + bytes(4)), "not 1 increasing numbers below 8"),
    "an index too large": (forged(4, 7, b"\x01\xff\x01\x80\x01" + bytes(4)), "not 1 increasing numbers below 7"),
    "no random value": (forged(5, 8, bytes(8) + b"\x01\x00\x01"), "no value"),
    "signs in the padding": (forged(6, 3, b"\x0f" + bytes(4)), "signs of more entries"),
    "one bit": (forged(7, 8, b"\x01\x08\x00" + bytes(5)), "1 bits"),
    "nine bits": (forged(7, 8, b"\x09\x08\x00" + bytes(13)), "9 bits"),
    "phase beyond the bucket": (forged(7, 8, b"\x08\x08\x08" + bytes(12)), "entry 8 of 8"),
    "bucket of none": (forged(7, 8, b"\x08\x00\x00" + bytes(12)), "entry 0 of 0"),
    "no levels": (forged(14, 1, b"\x00\x00" + bytes(4) + b"\x00\x01"), "0 levels"),
    "too many levels": (forged(14, 1, b"\x80\x00" + bytes(4) + b"\x00\x01"), "128 levels"),
    "phase beyond the bucket of levels": (forged(14, 1, b"\x01\x05\x05" + bytes(4) + b"\x00\x01"), "entry 5"),
    "a level beyond the top": (forged(14, 1, ONE_SCALE + b"\x00\x03"), "beyond 1"),
    "a negative scale": (forged(14, 1, b"\x01\x00" + bytes(3) + b"\x80\x00\x01"), "negative scale"),
    "unknown code of integers": (forged(14, 1, ONE_SCALE + b"\x03"), "code 3"),
    "a table of nothing": (forged(14, 1, ONE_SCALE + b"\x01\x00\x00"), "no table"),
    "too many exceptions": (forged(14, 16, ONE_SCALE + b"\x02\x03\x01"), "3 exceptions of 16"),
    "exceptions from no level": (forged(14, 16, ONE_SCALE + b"\x02\x00\x03"), "integer 2 of 1"),
    "format of the same size": (forged(8, 1, b"\x00" + bytes(4)), "smaller than torch.float32"),
    "unknown format": (forged(8, 1, b"\x09" + bytes(4)), "smaller than torch.float32"),
    "matrix of another size": (forged(9, 7, b"\x02\x03\x01\x01" + bytes(20)), "2 x 3 matrix of 7"),
    "omitted with a body": (forged(10, 3, b"\x00"), "left over"),
    "announced buffers": (forged(1, 1, b"\x04" + bytes(4), dtype=128), "has none"),
    "buffer twice": (forged(1, 1, b"\x04" + bytes(4) + b"\x01a\x00\x01\x00" * 2, dtype=128), "'a' twice"),
    "name that is no text": (forged(1, 1, b"\x04" + bytes(4) + b"\x01\xff\x00\x01\x00", dtype=128), "no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said(name):
    data, said = REFUSED[name]
    with pytest.raises(MessageError, match=said):
        Message.from_bytes(data)


def test_an_update_of_another_federation_is_refused():
    data = Message(1, Dense(torch.zeros(71))).to_bytes()
    with pytest.raises(MessageError, match="71 entries, not 72"):
        Message.from_bytes(data, LAYOUT)
    # As many entries, in tensors that are cut elsewhere.
    data = Message(1, Blocks([Dense(torch.zeros(25)), Dense(torch.zeros(47))])).to_bytes()
    with pytest.raises(MessageError, match="entries"):
        Message.from_bytes(data, LAYOUT)


def test_factors_of_a_matrix_of_another_shape_are_refused():
    # 24 entries as (6, 4), and one matrix over two tensors of 24.
    transposed = LowRank.of(torch.ones(6, 1), torch.ones(4, 1))
    with pytest.raises(MessageError):
        Message.from_bytes(Message(1, transposed).to_bytes(), Layout([(4, 6)]))
    with pytest.raises(MessageError):
        Message.from_bytes(Message(1, transposed).to_bytes(), Layout([(6, 2), (3, 4)]))
    kernel = LowRank.of(torch.ones(3, 1), torch.ones(8, 1))
    assert Message.from_bytes(Message(1, kernel).to_bytes(), Layout([(3, 2, 2, 2)])).payload.rank == 1


# What cannot be written


@pytest.mark.parametrize("value", [-1, 2**32])
@pytest.mark.parametrize("name", ["client_id", "round_index", "sequence", "base_version", "state_version"])
def test_numbers_that_do_not_fit_are_refused_by_name_and_value(name, value):
    numbers = {"client_id": 1, name: value}
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Message(payload=Dense(torch.zeros(2)), **numbers).to_bytes()
    numbers[name] = 2**32 - 1
    assert_survives_the_wire(Message(payload=Dense(torch.zeros(2)), **numbers))


def test_updates_beyond_the_limit_are_refused():
    largest = Message(0, Omitted("float32", (2**40,)))
    assert Message.from_bytes(largest.to_bytes()).payload.size == 2**40
    with pytest.raises(ValueError, match=str(2**40 + 1)):
        Message(0, Omitted("float32", (2**40 + 1,))).to_bytes()


class HandWritten(Payload):
    """A payload of a test's own, without a binary form."""

    fields = ("values",)

    def __init__(self, values, layout):
        super().__init__(layout)
        self.values = values

    @property
    def dtype(self):
        return self.values.dtype

    def dense(self):
        return self.values


def test_a_payload_without_a_binary_form_says_so():
    payload = HandWritten(torch.ones(3), (3,))
    inside = Blocks([Dense(torch.ones(1)), payload])
    for message in (Message(0, payload), Message(0, inside), Message(0, Combination([Dense(torch.ones(3))], [1.0]))):
        with pytest.raises(TypeError, match="(HandWritten|Combination) has no binary form"):
            message.to_bytes()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_cannot_be_sent_are_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        Message(0, Dense(torch.ones(2)), {"b": torch.ones(2).to(dtype)}).to_bytes()
    with pytest.raises(TypeError, match=str(dtype)):
        Message(0, Dense(torch.ones(2).to(dtype))).to_bytes()


def make_payload_class(name, code=None):
    return type(name, (HandWritten,), {} if code is None else {"code": code})


@pytest.mark.parametrize("code", [1, 9, 200])
def test_a_code_is_given_to_one_class(code):
    if code == 200:
        make_payload_class("FirstOf200", 200)
    taken = {1: "Dense", 9: "LowRank", 200: "FirstOf200"}[code]
    with pytest.raises(TypeError, match=rf"SecondOf{code} has the code {code} of .*{taken}.*64 to 255"):
        make_payload_class(f"SecondOf{code}", code)
    with pytest.raises(MessageError, match="kind 201"):
        Message.from_bytes(forged(201, 1, bytes(4)))
    assert make_payload_class(f"SecondOf{code}").__name__ == f"SecondOf{code}"  # what was refused has left no trace


@pytest.mark.parametrize("name", ["Dense", "HandWritten"])
def test_a_name_is_given_to_one_class(name):
    with pytest.raises(TypeError, match=f"{name} has the name of .*{name}"):
        make_payload_class(name, 210)
    with pytest.raises(MessageError, match="kind 210"):
        Message.from_bytes(forged(210, 1, bytes(4)))
    assert Payload.from_state(Dense(torch.ones(1)).to_state()).dense().tolist() == [1.0]


@pytest.mark.parametrize("code", [0, 256, -1, 1.5, "7", True])
def test_a_code_that_is_no_byte_is_refused(code):
    with pytest.raises(TypeError, match="code.*1 to 255"):
        make_payload_class("Coded", code)
