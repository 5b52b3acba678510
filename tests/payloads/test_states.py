"""States and multiples of updates in messages: what was written is what is read, and hostile bytes are refused."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import assert_same

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads import Dense, MessageError, Payload, Sparse
from lightning_lbgm.payloads.codec import Reader, Writer
from lightning_lbgm.payloads.multiple import Multiple
from lightning_lbgm.payloads.states import has_tensors, read_state, state_bytes, write_state
from lightning_lbgm.payloads.whole import WithState

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**39), 2**39) | st.floats(allow_nan=False) | st.text(max_size=9)
STATES = st.recursive(
    LEAVES | TENSORS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inside),
    max_leaves=12,
)


def written(state):
    out = Writer()
    write_state(out, state)
    return out.getvalue()


def read(data):
    reader = Reader(memoryview(data), torch.float32)
    state = read_state(reader)
    reader.finish()
    return state


@given(STATES)
def test_what_is_written_is_read_and_has_the_bytes_that_were_counted(state):
    data = written(state)
    assert len(data) == state_bytes(state)
    assert_same(read(data), state)


def test_a_state_is_written_byte_by_byte_as_described():
    state = {"a": [torch.tensor([1, 2], dtype=torch.uint8), None, True, 300]}
    # A dict (8) of one; text (6) of one byte; a list (7) of four; a tensor (9) of uint8 (4) in one dimension of 2; None
    # (0); True (2); an int (3) of seven bits a byte.
    assert written(state) == bytes([8, 1, 6, 1, 97, 7, 4, 9, 4, 1, 2, 1, 2, 0, 2, 3, 0xAC, 0x02])
    assert has_tensors(state)
    assert not has_tensors({"a": [None, {"b": 1.0}]})


@given(STATES, st.integers(0, 400), st.integers(0, 255))
def test_changed_bytes_are_a_state_or_refused(state, position, value):
    data = bytearray(written(state))
    data[position % len(data)] = value
    with contextlib.suppress(MessageError):
        read(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x06\x02a",
        b"\x06\x01\xff",
        b"\x07\x05\x00",
        b"\x08\x01\x00\x00",
        b"\x09\x0b\x00",
        b"\x07\x01" * 40,
    ],
    ids=["empty", "kind", "short", "no text", "count", "key", "dtype", "deep"],
)
def test_bytes_that_are_no_state_are_refused(data):
    with pytest.raises(MessageError):
        read(data)


def test_what_cannot_be_sent_is_refused_by_name():
    with pytest.raises(TypeError, match="built-ins and tensors; got .*object"):
        written({"a": object()})
    with pytest.raises(TypeError, match="64 bits"):
        written([2**63])
    assert read(written([2**63 - 1, 1 - 2**63])) == [2**63 - 1, 1 - 2**63]
    with pytest.raises(TypeError, match="built-ins and tensors"):
        state_bytes({"a": object()})


# Payloads that have them


def through_bytes(payload):
    return Payload.read_from(Reader(memoryview(payload.to_bytes()), payload.dtype), payload.wire_code(), payload.size)


@pytest.mark.parametrize(
    "body", [Dense(torch.tensor([2.0, 0.0, -6.0])), Sparse(torch.tensor([2.0, -6.0]), torch.tensor([0, 2]), [3])]
)
def test_a_multiple_is_the_update_times_its_factor(body):
    payload = Multiple(body, 0.25)
    assert payload.dense().tolist() == [0.5, 0.0, -1.5]
    out = torch.ones(3)
    payload.add_to(out, 2.0)
    assert out.tolist() == [2.0, 1.0, -2.0]
    other = Dense(torch.tensor([4.0, 1.0, 2.0]))
    assert payload.dot(other) == other.dot(payload) == 2.0 - 3.0
    assert payload.squared_norm() == 0.25 + 2.25
    assert [part.dense().tolist() for part in Multiple(Dense(torch.ones(3), Layout([1, 2])), 0.5).split()] == [
        [0.5],
        [0.5, 0.5],
    ]
    back = through_bytes(payload)
    assert 8 * len(payload.to_bytes()) == payload.num_bits == back.num_bits == 8 * (4 + 1) + body.num_bits
    assert torch.equal(back.dense(), payload.dense())
    assert torch.equal(payload.clone().dense(), payload.dense())


def test_a_factor_is_the_same_at_both_ends_and_finite():
    factor = Multiple.representable(0.1)
    assert factor == float(torch.tensor(0.1))
    assert through_bytes(Multiple(Dense(torch.ones(1)), factor)).factor == factor
    with pytest.raises(MessageError, match="times nan"):
        through_bytes(Multiple(Dense(torch.ones(1)), float("nan")))


def test_a_model_with_a_state_is_both():
    payload = WithState(Dense(torch.tensor([1.0, 2.0])), {"stages": [{"mean": torch.tensor([3.0])}]})
    back = through_bytes(payload)
    assert 8 * len(payload.to_bytes()) == payload.num_bits
    assert back.dense().tolist() == [1.0, 2.0]
    assert_same(back.state, payload.state)
    cloned = payload.clone()
    assert_same(cloned.state, payload.state)
    assert cloned.state["stages"][0]["mean"] is not payload.state["stages"][0]["mean"]
