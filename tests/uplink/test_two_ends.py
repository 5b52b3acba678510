"""The client's end and the server's end held apart: only the payload's bytes cross, and both stay in step."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.uplink import Dense, ErrorFeedback, LookBack, Payload, SignSGD, TopK, as_chain

SIZES = (7, 3, 1, 12)  # 23 entries: no whole number of bytes of signs
COMPRESSORS = {
    "all": [],
    "topk": [TopK(0.3)],
    "sign": [SignSGD()],
    "topk, sign": [TopK(0.5), SignSGD()],
    "ef(topk)": [ErrorFeedback(TopK(0.2))],
    "ef(sign)": [ErrorFeedback(SignSGD())],
}
LOOKING_BACK = {
    "lookback": [LookBack(0.4)],
    "lookback by layer": [LookBack(0.4, "layer")],
    "topk, lookback": [TopK(0.4), LookBack(0.6)],
    "topk, lookback by layer": [TopK(0.4), LookBack(0.6, "layer")],
    "sign, lookback": [SignSGD(), LookBack(0.6)],
    "sign, lookback by layer": [SignSGD(), LookBack(0.6, "layer")],
    "ef(lookback)": [ErrorFeedback(LookBack(0.5))],
    "ef(lookback by layer)": [ErrorFeedback(LookBack(0.5, "layer"))],
    "ef(topk, lookback)": [ErrorFeedback([TopK(0.4), LookBack(0.7)])],
    "ef(topk), lookback": [ErrorFeedback(TopK(0.4)), LookBack(0.8)],
    "topk, ef(lookback)": [TopK(0.4), ErrorFeedback(LookBack(0.7))],
    "ef(ef(lookback))": [ErrorFeedback(ErrorFeedback(LookBack(0.5)))],
}
UPLINKS = {**COMPRESSORS, **LOOKING_BACK}


def updates(seed, rounds, dtype=torch.float32):
    """Updates that keep a direction for five rounds; some are zero, in all or in one tensor."""
    rng = np.random.default_rng(seed)
    for index in range(rounds):
        if index % 5 == 0:
            direction = rng.normal(size=sum(SIZES))
        values = direction + rng.uniform(0, 0.5) * rng.normal(size=sum(SIZES))
        if index % 7 == 3:
            values[: SIZES[0]] = 0.0
        if index % 11 == 6:
            values[:] = 0.0
        yield torch.tensor(values, dtype=dtype)


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value, path=()):
    """Every leaf of nested dicts and lists with its path; anything else is a leaf."""
    if type(value) is dict:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif type(value) is list:
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def assert_same(one, other):
    """Equal bit for bit, tensors by their dtype and bytes."""
    one, other = dict(leaves(one)), dict(leaves(other))
    assert one.keys() == other.keys()
    for path, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[path].dtype, path
            assert torch.equal(value, other[path]), path
        else:
            assert repr(value) == repr(other[path]), path


def look_back_gradients(state):
    """All LBGs in a state, however deep the stage lies."""
    if isinstance(state, list):
        return [found for item in state for found in look_back_gradients(item)]
    if not isinstance(state, dict):
        return []
    here = [state["lbgs"]] if "lbgs" in state else []
    return here + [found for item in state.values() for found in look_back_gradients(item)]


def copied(value):
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def wire(payload):
    """What the server receives: the same content, no shared memory."""
    return Payload.from_state(copied(payload.to_state()))


@pytest.mark.parametrize("name", UPLINKS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=3)
def test_the_servers_decoding_equals_the_clients_reconstruction(name, seed):
    chain = as_chain(UPLINKS[name])
    client, server = chain.init(), chain.init()
    for values in updates(seed, 22):
        payload, _ = chain.encode(Dense(values, SIZES), client)
        received = chain.decode(wire(payload), server)
        assert received.sizes == SIZES
        assert torch.equal(received.dense(), chain.reconstruct(payload, client).dense())
        assert_same(look_back_gradients(client), look_back_gradients(server))


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_the_runs_above_both_recycle_and_refresh(name):
    chain = as_chain(UPLINKS[name])
    state = chain.init()
    recycled = [
        flag
        for values in updates(0, 22)
        for flag in chain.encode(Dense(values, SIZES), state).decision.recycled  # the first is always refreshed
    ]
    assert len(look_back_gradients(state)) == 1
    assert recycled.count(True) >= 3
    assert recycled.count(False) >= 3


@pytest.mark.parametrize("name", UPLINKS)
def test_the_payload_holds_all_that_crosses_and_its_bits_count_it(name):
    chain = as_chain(UPLINKS[name])
    state = chain.init()
    for values in updates(1, 12):
        payload = chain.encode(Dense(values, SIZES), state).payload
        tensors = [leaf for _, leaf in leaves(payload.to_state()) if isinstance(leaf, torch.Tensor)]
        assert payload.num_bits == 8 * sum(len(tensor.numpy().tobytes()) for tensor in tensors)


@pytest.mark.parametrize("name", UPLINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_decodes_in_the_updates_dtype(name, dtype):
    chain = as_chain(UPLINKS[name])
    client, server = chain.init(), chain.init()
    for values in updates(2, 12, dtype):
        decoded = chain.decode(wire(chain.encode(Dense(values, SIZES), client).payload), server).dense()
        assert decoded.dtype == dtype
        assert decoded.shape == values.shape


@pytest.mark.parametrize("name", UPLINKS)
def test_a_reused_buffer_gives_the_same_as_fresh_ones_and_is_not_written_to(name):
    chain = as_chain(UPLINKS[name])
    fresh, reusing = chain.init(), chain.init()
    buffer = torch.empty(sum(SIZES))
    for values in updates(3, 22):
        buffer.copy_(values)
        reused = chain.encode(Dense(buffer, SIZES), reusing).payload
        assert torch.equal(buffer, values)
        seen = chain.reconstruct(reused, reusing).dense().clone()
        buffer.fill_(float("nan"))
        expected = chain.encode(Dense(values.clone(), SIZES), fresh).payload
        assert torch.equal(seen, chain.reconstruct(expected, fresh).dense())
        assert_same(reusing, fresh)


@pytest.mark.parametrize("name", UPLINKS)
def test_decoding_does_not_keep_the_received_tensors(name):
    chain = as_chain(UPLINKS[name])
    client, server = chain.init(), chain.init()
    for values in updates(4, 12):
        received = wire(chain.encode(Dense(values, SIZES), client).payload)
        chain.decode(received, server)
        for tensor in received.tensors():
            tensor.fill_(1)
        assert_same(look_back_gradients(client), look_back_gradients(server))


@pytest.mark.parametrize("name", UPLINKS)
def test_states_are_built_ins_and_tensors_without_spare_storage(name):
    chain = as_chain(UPLINKS[name])
    client, server = chain.init(), chain.init()
    for values in updates(5, 8):
        chain.decode(chain.encode(Dense(values, SIZES), client).payload, server)
        for path, leaf in [*leaves(client), *leaves(server)]:
            assert all(type(key) in (str, int) for key in path)
            assert type(leaf) in (torch.Tensor, str, int, float, bool, type(None)), path
            if isinstance(leaf, torch.Tensor):
                assert leaf.untyped_storage().nbytes() == leaf.nbytes, path


@pytest.mark.parametrize("name", UPLINKS)
@pytest.mark.parametrize("interrupted_after", [0, 1, 9])
def test_states_survive_a_file_and_continue_bit_for_bit(name, interrupted_after):
    chain = as_chain(UPLINKS[name])
    client, server = chain.init(), chain.init()
    rounds = list(updates(6, 20))
    for values in rounds[:interrupted_after]:
        chain.decode(wire(chain.encode(Dense(values, SIZES), client).payload), server)
    saved_client, saved_server = through_a_file(client), through_a_file(server)
    assert_same(saved_client, client)
    assert_same(saved_server, server)
    for values in rounds[interrupted_after:]:
        one = chain.encode(Dense(values, SIZES), client)
        other = chain.encode(Dense(values, SIZES), saved_client)
        assert repr(one.decision) == repr(other.decision)  # NaN where refreshed
        assert_same(one.payload.to_state(), other.payload.to_state())
        decoded = chain.decode(wire(one.payload), server).dense()
        assert torch.equal(decoded, chain.decode(wire(other.payload), saved_server).dense())
    assert_same(saved_client, client)
    assert_same(saved_server, server)
