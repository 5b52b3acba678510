"""Levels: their size against the entropy, codes against slow ones, and what they decode to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.core.blocks import CACHED
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.bits import where_true
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer
from lightning_lbgm.payloads.entropy import Table, read_stream, stream_bytes, write_stream
from lightning_lbgm.payloads.gaps import bit_lengths, count_bit_lengths, gap_bits_bytes, read_gap_bits, write_gap_bits
from lightning_lbgm.payloads.integers import Integers, choose_code, read_integers, write_integers
from lightning_lbgm.payloads.levels import Levels, pieces

seeds = st.integers(0, 2**32 - 1)


def entropy_bytes(integers):
    """Order-0 entropy of integers: what an ideal code that knows their counts takes for all of them."""
    counts = np.unique(integers, return_counts=True)[1].astype(float)
    return -float((counts * np.log2(counts / counts.sum())).sum()) / 8


def levels_of(integers, top):
    return Integers.of(torch.tensor(integers, dtype=torch.int8), top)


def written(integers):
    out = Writer()
    write_integers(out, integers, choose_code(integers))
    return out.getvalue()


def reader(data):
    return Reader(memoryview(data), torch.float32)


def laplace(top, width):
    numbers = np.exp(-np.abs(np.arange(-top, top + 1)) / width)
    return numbers / numbers.sum()


DISTRIBUTIONS = {
    "1 in 100": (1, [0.005, 0.99, 0.005]),
    "1 in 30": (1, [0.02, 0.967, 0.013]),
    "an eighth": (1, [0.0625, 0.875, 0.0625]),
    "three tenths": (1, [0.15, 0.7, 0.15]),
    "half": (1, [0.25, 0.5, 0.25]),
    "six tenths": (1, [0.3, 0.4, 0.3]),
    "thirds": (1, [1 / 3] * 3),
    "skewed signs": (1, [0.35, 0.6, 0.05]),
    "positive": (1, [0.0, 0.8, 0.2]),
    "few and positive": (1, [0.0, 0.97, 0.03]),
    "never zero": (1, [0.5, 0.0, 0.5]),
    "mostly one": (1, [0.03, 0.05, 0.92]),
    "golden": (2, [0.0, 0.0, 0.382, 0.618, 0.0]),
    "uniform of 15": (7, [1 / 15] * 15),
    "narrow of 15": (7, laplace(7, 0.6)),
    "wide of 255": (127, laplace(127, 40)),
    "narrow of 255": (127, laplace(127, 2)),
    "uniform of 255": (127, [1 / 255] * 255),
}


@pytest.mark.parametrize("size", [10_000, 100_000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_message_is_at_most_a_twentieth_above_the_entropy(name, size):
    top, shares = DISTRIBUTIONS[name]
    values = np.random.default_rng(size).choice(np.arange(-top, top + 1), size=size, p=shares)
    payload = Levels.of(levels_of(values, top), torch.tensor([2.0]), 0, 0, (size,))
    data = payload.to_bytes()
    assert payload.num_bits == 8 * len(data)
    # With the scale and all tables, which take up to 32 bytes more for few exceptions.
    entropy = entropy_bytes(values)
    assert 0.98 * entropy < len(data) < max(1.05 * entropy if entropy > 700 else 0, 1.015 * entropy + 32)
    received = Levels.read(reader(data), size)
    assert torch.equal(received.integers.everywhere(), torch.tensor(values, dtype=torch.int8))


def test_exceptions_in_clusters_take_less_than_the_entropy():
    rng = np.random.default_rng(0)
    values = np.zeros(50_000, dtype=np.int64)
    values[20_000:22_000] = rng.integers(-1, 2, 2000)
    assert len(written(levels_of(values, 1))) < 0.5 * entropy_bytes(values)


def test_equal_integers_take_three_bytes():
    for value in (-5, 0, 5):
        assert written(levels_of([value] * 10_000, 5)) == bytes([2, 0, value + 5])


@given(
    size=st.integers(0, 3000),
    top=st.sampled_from([1, 2, 7, 100, 127]),
    share=st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.2, 0.9, 1.0]),
    base=st.integers(-1, 1),
    seed=seeds,
)
@settings(deadline=None, max_examples=150)
def test_integers_come_back_and_have_the_size_that_was_foretold(size, top, share, base, seed):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(size) < share, rng.integers(-top, top + 1, size), base)
    integers = levels_of(values, top)
    assert integers.everywhere().tolist() == values.tolist()
    # Exceptions alone are kept if and only if the most frequent integer has seven eighths.
    most = np.unique(values, return_counts=True)[1].max(initial=0)
    assert (integers.indices is not None) == (8 * (size - most) <= size)
    code, data = choose_code(integers), written(integers)
    assert len(data) == code.num_bytes <= 1 + math.ceil(size * (2 * top).bit_length() / 8)
    data = reader(data)
    received = read_integers(data, size, top)
    data.finish()
    assert torch.equal(received.everywhere(), integers.everywhere())
    assert received.base == integers.base
    assert (received.indices is None) == (integers.indices is None)
    if received.indices is not None:
        assert received.indices.dtype == integers.indices.dtype
        assert torch.equal(received.indices, integers.indices)


@given(size=st.integers(1, 400), exceptions=st.integers(0, 80), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_exceptions_are_kept_alone_only_if_they_are_few(size, exceptions, seed):
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(size, size=min(exceptions, size), replace=False))
    levels = torch.ones(len(indices), dtype=torch.int8)
    integers = Integers.at(torch.tensor(indices, dtype=torch.int32), levels, -1, size, 1)
    expected = np.full(size, -1)
    expected[indices] = 1
    assert integers.everywhere().tolist() == expected.tolist()
    assert (integers.indices is None) == (8 * len(indices) > size)


def slow_decode(table, data, count, lanes, words):
    """rANS as it is defined, one symbol after the other in Python's integers; the first lane's state lies first."""
    states = [sum(data[lanes * byte + lane] << 8 * byte for byte in range(5)) for lane in range(lanes)]
    stream = [data[5 * lanes + 2 * i] | data[5 * lanes + 2 * i + 1] << 8 for i in range(words)]
    starts = np.cumsum([0, *table.frequencies]).tolist()
    symbols = []
    for index in range(count):
        slot = states[index % lanes] % 2**14
        found = next(i for i, end in enumerate(starts[1:]) if slot < end)
        state = table.frequencies[found] * (states[index % lanes] // 2**14) + slot - starts[found]
        if state < 2**24:
            state = state * 2**16 + stream.pop(0)
        states[index % lanes] = state
        symbols.append(table.symbols[found])
    assert states == [2**24] * lanes
    return symbols


@given(count=st.integers(1, 300), alphabet=st.integers(2, 256), spread=st.floats(0.1, 50), seed=seeds)
@settings(deadline=None, max_examples=80)
def test_symbols_are_coded_as_a_slow_coder_reads_them(count, alphabet, spread, seed):
    rng = np.random.default_rng(seed)
    symbols = np.minimum(rng.exponential(spread, count).astype(int), alphabet - 1)
    counts = np.bincount(symbols, minlength=alphabet).tolist()
    table = Table.of(counts)
    assert sum(table.frequencies) == 2**14
    assert min(table.frequencies) >= 1
    out = Writer()
    words = table.words(counts)
    write_stream(out, table, symbols, words)
    data = out.getvalue()
    assert len(data) == stream_bytes(table, words, count)
    assert read_stream(reader(data), table, count).tolist() == symbols.tolist()
    if not table.steps:
        packed = sum(table.symbols.index(symbol) << table.width * i for i, symbol in enumerate(symbols))
        assert data == b"\0" + packed.to_bytes(math.ceil(table.width * count / 8), "little")
    else:
        assert words < 128
        assert slow_decode(table, data[1:], count, 1, words) == symbols.tolist()
    head = Writer()
    table.write(head)
    assert len(head.getvalue()) == table.num_bytes
    assert Table.read(reader(head.getvalue()), alphabet) == table


@pytest.mark.parametrize("count", [20_000, 300_000])
def test_many_symbols_are_coded_side_by_side(count):
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.exponential(3, count).astype(int), 40)
    counts = np.bincount(symbols, minlength=41).tolist()
    table, out = Table.of(counts), Writer()
    words = table.words(counts)
    write_stream(out, table, symbols, words)
    data = out.getvalue()
    assert len(data) == stream_bytes(table, words, count) < 1.01 * entropy_bytes(symbols)
    assert read_stream(reader(data), table, count).tolist() == symbols.tolist()
    for position in (3, 40, len(data) // 2):
        wrong = bytearray(data)
        wrong[position] ^= 1
        with pytest.raises(MessageError):
            read_stream(reader(bytes(wrong)), table, count)


def test_a_table_has_the_probabilities_of_its_steps():
    # One of 2, one of 4 and two of 8 in 16: one, two and three bits, four quarters each.
    table = Table.of([800, 400, 0, 200, 200])
    assert table.symbols == (0, 1, 3, 4)
    assert table.steps == (4, 8, 12, 12)
    assert table.frequencies == (2**13, 2**12, 2**11, 2**11)
    out = Writer()
    table.write(out)
    assert out.getvalue() == bytes([0b11011]) + (4 + (8 << 6) + (12 << 12) + (12 << 18)).to_bytes(3, "little")


def test_symbols_that_are_about_as_frequent_have_a_fixed_width():
    table, out = Table.of([0, 50, 49, 0, 52, 51]), Writer()
    assert (table.symbols, table.steps, table.width) == ((1, 2, 4, 5), (), 2)
    table.write(out)
    assert out.getvalue() == bytes([0b110110, 63])
    assert Table.read(reader(out.getvalue()), 6) == table


@given(size=st.integers(0, 200), share=st.floats(0, 1), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_where_true_finds_the_places_in_order(size, share, seed):
    mask = np.random.default_rng(seed).random(size) < share
    assert where_true(mask).tolist() == [place for place in range(size) if mask[place]]


@given(indices=st.sets(st.integers(0, 2**33), max_size=60))
@settings(deadline=None, max_examples=80)
def test_gaps_are_their_bit_lengths_and_the_bits_below(indices):
    ordered = sorted(indices)
    gaps = [index - before - 1 for before, index in zip([-1, *ordered], ordered)]
    lengths = bit_lengths(np.array(gaps, dtype=np.int64))
    assert lengths.tolist() == [gap.bit_length() for gap in gaps]
    counts = count_bit_lengths(torch.tensor(ordered, dtype=torch.int64), 35)
    assert counts == [sum(gap.bit_length() == length for gap in gaps) for length in range(35)]
    out = Writer()
    write_gap_bits(out, np.array(gaps, dtype=np.int64), lengths)
    data = out.getvalue()
    below = [gap - 2 ** (gap.bit_length() - 1) for gap in gaps if gap > 1]
    assert len(data) == gap_bits_bytes(counts) == math.ceil(sum(gap.bit_length() - 1 for gap in gaps if gap) / 8)
    assert sum(map(int, np.unpackbits(np.frombuffer(data, dtype=np.uint8)))) == sum(low.bit_count() for low in below)
    assert read_gap_bits(reader(data), lengths).tolist() == gaps


@given(
    size=st.integers(0, 3 * CACHED),
    bucket_size=st.one_of(st.integers(0, 50), st.integers(0, 3 * CACHED)),
    phase=st.integers(0, 2 * CACHED),
)
@settings(deadline=None, max_examples=60)
def test_pieces_cover_all_entries_in_order_and_stay_within_buckets(size, bucket_size, phase):
    phase = phase % bucket_size if bucket_size else 0
    end = 0
    for piece in pieces(size, bucket_size, torch.device("cpu"), phase):
        assert piece.begin == end < piece.end
        assert piece.end - piece.begin <= CACHED
        length, rest = divmod(piece.end - piece.begin, piece.rows)
        assert rest == 0
        for row in {0, piece.rows - 1}:
            first = piece.begin + row * length
            buckets = {(phase + entry) // (bucket_size or size) for entry in (first, first + length - 1)}
            assert buckets == {piece.bucket + row}
        end = piece.end
    assert end == size


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("bucket_size", [0, 64, 3 * CACHED // 2])
def test_levels_decode_add_and_multiply_in_pieces_as_a_whole(share, bucket_size):
    size = 2 * CACHED + 1000
    rng = np.random.default_rng(0)
    values = np.where(rng.random(size) < share, rng.integers(-9, 10, size), 0)
    scales = rng.random(-(-size // bucket_size) if bucket_size else 1)
    payload = Levels.of(levels_of(values, 9), torch.tensor(scales), bucket_size, 0, (size,))
    expected = values / 9 * scales[np.arange(size) // bucket_size if bucket_size else 0]
    np.testing.assert_allclose(payload.dense().numpy(), expected, rtol=1e-14)
    out = torch.ones(size, dtype=torch.float64)
    payload.add_to(out, 0.5)
    np.testing.assert_allclose(out.numpy(), 1 + 0.5 * expected, rtol=1e-14)
    other = torch.tensor(rng.normal(size=size))
    assert payload.dot(Dense(other)) == pytest.approx(float(other.numpy() @ expected), rel=1e-9)
    assert payload.squared_norm() == pytest.approx(float(expected @ expected), rel=1e-9)
