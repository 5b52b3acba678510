"""What holds for every uplink: client and server decode the same from bytes alone, and what their states are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import assert_same, leaves, look_back_gradients
from uplinks import CLIENT, FORETELLING, LAYOUT, LOOKING_BACK, SIZE, UPLINKS, updates

from lightning_lbgm.compression import Context, RoundResult, as_chain
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.low_rank import LowRank
from lightning_lbgm.protocol.message import HEADER_BYTES, Message


def assert_same_lbgs(one, other):
    """The same LBGs bit for bit; and their inner products up to round-off, which alone depends on where vectors lie."""
    ones, others = look_back_gradients(one), look_back_gradients(other)
    assert len(ones) == len(others)
    for tests, other_tests in zip(ones, others):
        assert tests.keys() == other_tests.keys()
        for index, basis in tests.items():
            assert_same(basis["payloads"], other_tests[index]["payloads"])
            gram, other_gram = (torch.as_tensor(one["gram"]).numpy() for one in (basis, other_tests[index]))
            assert gram.shape[-2:] == 2 * (len(basis["payloads"]),)
            np.testing.assert_allclose(other_gram, gram, rtol=1e-5, atol=1e-5 * gram.max())


def wire(payload):
    """What the server receives: the bytes of a message, read beside the layout that both ends know."""
    data, body = Message(CLIENT, payload).to_bytes(), payload.to_bytes()
    assert len(data) == HEADER_BYTES + len(body) == HEADER_BYTES + payload.num_bits // 8
    assert data.endswith(body)
    received = Message.from_bytes(data, LAYOUT)
    assert received.to_bytes() == data
    assert received.num_bits == payload.num_bits
    return received.payload


class Run:
    """What both ends know of the rounds besides the messages: one client's, and the server's between them."""

    def __init__(self, chain, shared=None, round_index=0):
        self.chain, self.round_index = chain, round_index
        self.shared = chain.init_shared() if shared is None else shared

    def context(self, client=CLIENT):
        return Context(self.round_index, self.shared, seed=0, path=(client,))

    def end_round(self, encoded, decoded):
        """Let the server learn from the round, as after one with this client alone."""
        bits, dense = (encoded.payload.num_bits,), (32 * SIZE,)
        params = torch.linspace(1, 2, SIZE, dtype=decoded.dtype)
        result = RoundResult(LAYOUT, params, decoded, bits, dense, (encoded.decision,))
        self.chain.end_round(self.shared, result, self.context(-1))
        self.round_index += 1


@pytest.mark.parametrize("name", UPLINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=2)
def test_the_server_decodes_what_the_client_says_that_it_sees(name, dtype, seed):
    # A server of its own process: nothing of the client's but the bytes.
    chain = as_chain(UPLINKS[name])
    client, server, run = chain.init(), chain.init(), Run(chain)
    for values in updates(seed, 22, dtype):
        encoded = chain.encode(Dense(values, LAYOUT), client, run.context())
        received = chain.decode(wire(encoded.payload), server, run.context())
        assert received.layout == LAYOUT
        decoded = received.dense()
        assert decoded.dtype == dtype
        assert decoded.shape == values.shape
        assert torch.equal(decoded, encoded.decoded.dense())
        assert_same_lbgs(client, server)
        run.end_round(encoded, decoded)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_the_runs_above_both_recycle_and_refresh(name):
    chain = as_chain(UPLINKS[name])
    state, run = chain.init(), Run(chain)
    recycled = []
    for values in updates(0, 22):
        encoded = chain.encode(Dense(values, LAYOUT), state, run.context())
        recycled += encoded.decision.recycled  # the first is always refreshed
        run.end_round(encoded, encoded.decoded.dense())
    assert len(look_back_gradients(state)) == 1
    assert recycled.count(True) >= 3
    assert recycled.count(False) >= 3


@pytest.mark.parametrize("name", FORETELLING)
def test_the_runs_above_remember_what_they_foretell_from(name):
    chain = as_chain(UPLINKS[name])
    state, run = chain.init(), Run(chain)
    assert look_back_gradients(state) == []
    for index, values in enumerate(updates(0, 5)):
        encoded = chain.encode(Dense(values, LAYOUT), state, run.context())
        assert (encoded.needs_state, encoded.updates_state) == (index > 0, True)
        run.end_round(encoded, encoded.decoded.dense())
    assert len(look_back_gradients(state)) == 1


@pytest.mark.parametrize(
    "name", [name for name in UPLINKS if ("atomo" in name or "powersgd" in name) and name not in FORETELLING]
)
def test_the_runs_above_send_factors_of_matrices(name):
    chain = as_chain(UPLINKS[name])
    state, run = chain.init(), Run(chain)
    encoded = chain.encode(Dense(next(updates(0, 1)), LAYOUT), state, run.context())
    if name == "atomo, topk":
        assert not hasattr(encoded.payload, "parts")  # the sparsifier decodes
    elif name == "atomo, sign":
        assert [type(part).__name__ for part in encoded.payload.parts] == 4 * ["Signs"]  # signs are of entries
    else:
        assert [isinstance(part, LowRank) for part in encoded.payload.parts] == [True, False, False, True]


@pytest.mark.parametrize("name", [name for name in UPLINKS if "layer recycling" in name])
def test_the_runs_above_leave_layers_out(name):
    chain = as_chain(UPLINKS[name])
    state, run = chain.init(), Run(chain)
    omitted = []
    for values in updates(0, 5):
        encoded = chain.encode(Dense(values, LAYOUT), state, run.context())
        omitted.append(sum(type(part).__name__ == "Omitted" for part in getattr(encoded.payload, "parts", [])))
        run.end_round(encoded, encoded.decoded.dense())
    number = 1 if name.startswith("topk") else 2
    assert omitted == [0] + 4 * [number]


@pytest.mark.parametrize("name", UPLINKS)
def test_a_reused_buffer_gives_the_same_as_fresh_ones_and_is_not_written_to(name):
    chain = as_chain(UPLINKS[name])
    fresh, reusing, run = chain.init(), chain.init(), Run(chain)
    buffer = torch.empty(SIZE)
    for values in updates(3, 22):
        buffer.copy_(values)
        reused = chain.encode(Dense(buffer, LAYOUT), reusing, run.context())
        assert torch.equal(buffer, values)
        seen = reused.decoded.dense().clone()
        buffer.fill_(float("nan"))
        encoded = chain.encode(Dense(values.clone(), LAYOUT), fresh, run.context())
        assert torch.equal(seen, encoded.decoded.dense())
        assert_same(reusing, fresh)
        run.end_round(encoded, seen)


@pytest.mark.parametrize("name", UPLINKS)
def test_decoding_does_not_keep_the_received_tensors(name):
    chain = as_chain(UPLINKS[name])
    client, server, run = chain.init(), chain.init(), Run(chain)
    for values in updates(4, 12):
        encoded = chain.encode(Dense(values, LAYOUT), client, run.context())
        received = wire(encoded.payload)
        decoded = chain.decode(received, server, run.context()).dense().clone()
        for tensor in received.tensors():
            tensor.fill_(1)
        assert_same_lbgs(client, server)
        run.end_round(encoded, decoded)


@pytest.mark.parametrize("name", UPLINKS)
def test_encoding_does_not_keep_the_tensors_that_are_sent(name):
    chain = as_chain(UPLINKS[name])
    one, other, run = chain.init(), chain.init(), Run(chain)
    for values in updates(4, 12):
        expected = chain.encode(Dense(values, LAYOUT), other, run.context())
        encoded = chain.encode(Dense(values.clone(), LAYOUT), one, run.context())
        for tensor in encoded.payload.tensors():
            tensor.fill_(1)
        assert_same(one, other)
        run.end_round(expected, expected.decoded.dense())


@pytest.mark.parametrize("name", UPLINKS)
def test_states_are_built_ins_and_tensors_without_spare_storage(name):
    chain = as_chain(UPLINKS[name])
    client, server, run = chain.init(), chain.init(), Run(chain)
    for values in updates(5, 8):
        encoded = chain.encode(Dense(values, LAYOUT), client, run.context())
        run.end_round(encoded, chain.decode(encoded.payload, server, run.context()).dense())
        for path, leaf in [*leaves(client), *leaves(server), *leaves(run.shared)]:
            assert all(type(key) in (str, int) for key in path)
            assert type(leaf) in (torch.Tensor, str, int, float, bool, type(None)), path
            if isinstance(leaf, torch.Tensor):
                assert leaf.untyped_storage().nbytes() == leaf.nbytes, path


@pytest.mark.parametrize("name", UPLINKS)
def test_later_rounds_write_neither_to_what_was_decoded_nor_to_the_state_before(name):
    # What the round's undo log keeps, and what an aggregation rule may hold until the round ends.
    chain = as_chain(UPLINKS[name])
    state, shared, before = chain.init(), chain.init_shared(), []
    for index, update in enumerate(updates(3, 6)):
        tensors = [leaf for _, leaf in leaves(state) if isinstance(leaf, torch.Tensor)]
        given_ = update.clone()
        encoded = chain.encode(Dense(update, LAYOUT), state, Context(index, shared, seed=1, path=(CLIENT,)))
        assert torch.equal(update, given_)
        before += [(tensor, tensor.clone()) for tensor in (*tensors, encoded.decoded.dense())]
    assert all(torch.equal(tensor, copy) for tensor, copy in before)
