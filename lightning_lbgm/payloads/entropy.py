"""Entropy coder (rANS) of symbols of a small alphabet, at the cost of their order-0 entropy.

Duda: "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of arithmetic
coding", 2013 (arXiv 1311.2540). Several coders (lanes) work side by side, so that a step is a few vector operations,
and share one stream of 16-bit words. The length of the stream follows from the counts of the symbols alone: it is an
upper bound, near the true length, and zeros fill it up. So a message's size is known without coding it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size

__all__ = ["Table", "read_stream", "stream_bytes", "write_stream"]

_BITS = 14  # of a probability
_TOTAL = 1 << _BITS
_LOW_BITS = 24  # a lane's state is in [2 ** 24, 2 ** 40): 5 bytes
_LOW = 1 << _LOW_BITS
_STATE_BYTES = 5
_STEP_BITS = 6  # of a probability in the header
_FLAT = (1 << _STEP_BITS) - 1  # instead of the first: a fixed width
# Probabilities are sent as quarters of a bit of information, 1 / 2 ** (step / 4) each: within 0.002 bits a symbol.
_WEIGHTS = [max(1, round(_TOTAL * 2.0 ** (-step / 4))) for step in range(_FLAT)]
_LANE_WORDS = 512  # a lane costs five bytes, so there is one for each thousand
_LANE_SYMBOLS = 8192
_MAX_LANES = 4096
_FLOOR = 32  # symbols to a word at the most, so that what a reader allocates is bounded by the bytes


@dataclass(frozen=True)
class Table:
    """Probabilities of symbols, as both ends know them.

    Attributes:
        alphabet: Symbols are numbers below it, at most 256.
        symbols: Those that occur, increasing.
        steps: For each of them its information in quarters of a bit, below 63; none if all are coded in a fixed width.
    """

    alphabet: int
    symbols: tuple[int, ...]
    steps: tuple[int, ...]

    @staticmethod
    def of(counts: Sequence[int]) -> Table:
        """Make the table for symbols that occur so often."""
        total = sum(counts)
        symbols = tuple([symbol for symbol, count in enumerate(counts) if count])
        log2 = math.log2
        steps = tuple([min(_FLAT - 1, round(4 * log2(total / counts[symbol]))) for symbol in symbols])
        coded, flat = Table(len(counts), symbols, steps), Table(len(counts), symbols, ())
        words = coded.words(counts)
        is_smaller = coded.num_bytes + stream_bytes(coded, words, total) < flat.num_bytes + stream_bytes(flat, 0, total)
        return coded if is_smaller else flat

    @property
    def width(self) -> int:
        """Bits of a symbol in a fixed width."""
        return (len(self.symbols) - 1).bit_length()

    @property
    def frequencies(self) -> tuple[int, ...]:
        """Probability of each symbol that occurs, times 2 ** 14; they add up to that, and none is zero."""
        return _model(self.steps or (0,) * len(self.symbols))[0]

    @property
    def num_bytes(self) -> int:
        """Bytes in a message."""
        return -(-self.alphabet // 8) + -(-max(1, len(self.steps)) * _STEP_BITS // 8)

    def write(self, out: Writer) -> None:
        """Write which symbols occur, a bit each, and their steps, six bits each, or 63 if there are none."""
        present = sum(1 << symbol for symbol in self.symbols)
        out.raw(present.to_bytes(-(-self.alphabet // 8), "little"))
        steps = self.steps or (_FLAT,)
        packed = sum(step << _STEP_BITS * index for index, step in enumerate(steps))
        out.raw(packed.to_bytes(-(-len(steps) * _STEP_BITS // 8), "little"))

    @staticmethod
    def read(data: Reader, alphabet: int) -> Table:
        """Read the table of an alphabet."""
        present = int.from_bytes(data.take(-(-alphabet // 8)), "little")
        symbols = tuple(symbol for symbol in range(alphabet) if present >> symbol & 1)
        if not symbols or present >> alphabet:
            raise MessageError(f"The message has no table of {alphabet} symbols.")
        first = data.byte()
        if first & _FLAT == _FLAT:
            return Table(alphabet, symbols, ())
        packed = first | int.from_bytes(data.take(-(-len(symbols) * _STEP_BITS // 8) - 1), "little") << 8
        steps = tuple(packed >> _STEP_BITS * index & _FLAT for index in range(len(symbols)))
        if packed >> _STEP_BITS * len(symbols):
            raise MessageError("The message has steps of more symbols than occur.")
        return Table(alphabet, symbols, steps)

    def words(self, counts: Sequence[int], *, bounded: bool = False) -> int:
        """Return the 16-bit words of a stream in which symbols occur so often; of bits of fixed width, there is none.

        Args:
            counts: Of all symbols of the alphabet.
            bounded: Whether the stream has at least half a bit a symbol, so that it bounds their number.
        """
        words = 0
        if self.steps:
            bits = 0.0
            for symbol, cost in zip(self.symbols, _model(self.steps)[1]):
                bits += counts[symbol] * cost
            words = int(bits / 16) + 1
        if bounded and (self.steps or not self.width):
            words = max(words, -(-sum(counts) // _FLOOR))
        return words


@lru_cache(maxsize=1024)  # clients' tables are much alike, and the fewer their symbols, the more often the same
def _model(steps: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the frequencies of the symbols that occur, and the bits that each takes."""
    weights = [_WEIGHTS[step] for step in steps]
    total = sum(weights)
    frequencies = [max(1, weight * _TOTAL // total) for weight in weights]
    frequencies[frequencies.index(max(frequencies))] += _TOTAL - sum(frequencies)
    log2, log_of_2 = math.log2, math.log(2)
    costs, start = [], 0
    for frequency in frequencies:
        # A step multiplies the state by total / frequency, and adds at most ``start`` to it.
        costs.append(_BITS - log2(frequency) + start / _LOW / log_of_2)
        start += frequency
    return tuple(frequencies), tuple(costs)


def _lanes(words: int, count: int) -> int:
    return min(_MAX_LANES, max(1 + words // _LANE_WORDS, count // _LANE_SYMBOLS))


def stream_bytes(table: Table, words: int, count: int) -> int:
    """Return the bytes that ``write_stream`` writes for ``count`` symbols."""
    if not table.steps:
        return varint_size(words) + 2 * words + -(-count * table.width // 8)
    return varint_size(words) + 2 * words + _STATE_BYTES * _lanes(words, count)


def write_stream(out: Writer, table: Table, symbols: NDArray[Any], words: int) -> None:
    """Write the number of words, the lanes' states and the words.

    Args:
        out: The message.
        table: Of all symbols that occur.
        symbols: Numbers below the alphabet, shape ``(n,)``.
        words: ``table.words`` of them.
    """
    out.varint(words)
    if not table.steps:
        ranks = np.searchsorted(np.array(table.symbols), symbols)
        bits = (ranks[:, None] >> np.arange(table.width) & 1).astype(np.uint8)
        out.raw(bytes(2 * words) + np.packbits(bits, bitorder="little").tobytes())
        return
    frequencies, starts = _arrays(table)
    lanes = _lanes(words, len(symbols))
    states = np.full(lanes, _LOW, dtype=np.int64)
    emitted: list[NDArray[Any]] = []
    for begin in reversed(range(0, len(symbols), lanes)):  # last in, first out
        row = symbols[begin : begin + lanes]
        frequency, state = frequencies[row], states[: len(row)]
        full = state >= frequency << (_LOW_BITS - _BITS + 16)
        if full.any():
            emitted.append((state[full] & 0xFFFF).astype("<u2"))
            state = np.where(full, state >> 16, state)
        quotient = state // frequency
        states[: len(row)] = (quotient << _BITS) + (state - quotient * frequency) + starts[row]
    for shift in range(0, 8 * _STATE_BYTES, 8):
        out.raw((states >> shift).astype(np.uint8).tobytes())
    data = b"".join(part.tobytes() for part in reversed(emitted))
    out.raw(data + bytes(2 * words - len(data)))


def read_stream(data: Reader, table: Table, count: int, *, bounded: bool = False) -> NDArray[np.uint8]:
    """Read ``count`` symbols that ``write_stream`` has written, as ``uint8``.

    Raises:
        MessageError: If the bytes are no such stream.
    """
    words = data.varint()
    if bounded and count > _FLOOR * words and not (table.width and not table.steps):
        raise MessageError(f"The message has {2 * words} bytes for {count} symbols.")
    if not table.steps:
        if any(data.take(2 * words)):
            raise MessageError("The message's padding is not zero.")
        return _read_flat(data, table, count)
    lanes = _lanes(words, count)
    parts = np.frombuffer(data.take(_STATE_BYTES * lanes), dtype=np.uint8).reshape(_STATE_BYTES, lanes)
    states = np.zeros(lanes, dtype=np.int64)
    for index in range(_STATE_BYTES):
        states |= parts[index].astype(np.int64) << 8 * index
    stream = np.frombuffer(data.take(2 * words), dtype="<u2")
    symbols, position = _decode(table, states, stream, count)
    if (states != _LOW).any() or stream[position:].any():
        raise MessageError("The message's symbols are corrupt.")
    return symbols


def _read_flat(data: Reader, table: Table, count: int) -> NDArray[np.uint8]:
    packed = np.frombuffer(data.take(-(-count * table.width // 8)), dtype=np.uint8)
    if not table.width:
        return np.full(count, table.symbols[0], dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count * table.width :].any():
        raise MessageError("The message's padding is not zero.")
    ranks = (bits[: count * table.width].reshape(count, table.width) << np.arange(table.width)).sum(1)
    if ranks.max(initial=0) >= len(table.symbols):
        raise MessageError("The message has symbols that do not occur.")
    return np.array(table.symbols, dtype=np.uint8)[ranks]


def _decode(table: Table, states: NDArray[Any], stream: NDArray[Any], count: int) -> tuple[NDArray[np.uint8], int]:
    """Return the symbols and the number of words that were read, and bring the lanes back to where they began."""
    frequencies, starts = _arrays(table)
    slots = np.repeat(np.array(table.symbols, dtype=np.uint8), table.frequencies)
    symbols = np.empty(count, dtype=np.uint8)
    lanes, position = len(states), 0
    for begin in range(0, count, lanes):
        state = states[: count - begin]
        slot = state & (_TOTAL - 1)
        row = slots[slot]
        symbols[begin : begin + lanes] = row
        state = frequencies[row] * (state >> _BITS) + slot - starts[row]
        empty = state < _LOW
        wanted = int(np.count_nonzero(empty))
        if wanted:
            if position + wanted > len(stream):
                raise MessageError("The message's symbols are truncated.")
            state[empty] = (state[empty] << 16) | stream[position : position + wanted]
            position += wanted
        states[: len(state)] = state
    return symbols, position


def _arrays(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each symbol's frequency and the sum of those before it."""
    frequencies, starts = np.ones(table.alphabet, dtype=np.int64), np.zeros(table.alphabet, dtype=np.int64)
    symbols = np.array(table.symbols)
    frequencies[symbols] = table.frequencies
    starts[symbols] = np.cumsum(table.frequencies) - table.frequencies
    return frequencies, starts
