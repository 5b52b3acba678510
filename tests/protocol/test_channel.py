"""Channels: what the server sees of an update, the same over a shared state and over bytes."""

import math

import pytest
import torch
from conftest import Recorder, TinyModule, flat_params
from states import look_back_gradients
from torch import nn
from uplinks import CLIENT, LAYOUT, UPLINKS, updates

from lightning_lbgm import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LBGMFederated,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    SignSGD,
    TargetSavings,
    TopK,
)
from lightning_lbgm.compression import Context, as_chain
from lightning_lbgm.payloads import Dense
from lightning_lbgm.protocol import HEADER_BYTES, MessageError, SharedChannel, WireChannel
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy import session


@pytest.fixture
def over_the_wire(monkeypatch):
    """Let the fits that follow send bytes, by a transport."""

    def install(transport=None):
        def make(flat, uplink, server, buffers, *rest, **settings):
            sent = {name: buffer for name, buffer in buffers.module.named_buffers() if buffer.is_floating_point()}
            channel = WireChannel(uplink, flat.layout, sent, transport)
            return Federation(flat, uplink, server, buffers, *rest, **{**settings, "channel": channel})

        monkeypatch.setattr(session, "Federation", make)

    return install


def run(fit, uplink, **settings):
    """Train 9 rounds; return the reports, the parameters and the buffers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    module, recorder = TinyModule(net=net), Recorder()
    strategy = LBGMFederated(**{"num_clients": 3, "clients_per_round": 2, **settings}, uplink=uplink, seed=0)
    fit(strategy, module=module, batch_size=8, shuffle=True, max_epochs=9, callbacks=[recorder])
    return recorder.reports, flat_params(module), {name: b.clone() for name, b in module.named_buffers()}


@pytest.mark.parametrize(
    "uplink",
    [
        [],
        [LookBack(0.7)],
        [LookBack(0.5, "layer", rank=2, max_age=3)],
        [LookBack(0.5, rank=3, rowwise=True)],
        [LookBack(0.9, capacity=2)],
        [LookBack(TargetSavings(0.6))],
        [Cast(torch.bfloat16), LookBack(lambda round_index: 0.9 if round_index % 3 else 0.1)],
        [TopK(0.5), QSGD(3), LookBack(0.6, "layer")],
        [ATOMO(1, "unbiased"), LookBack(0.8, rank=2)],
        [PowerSGD(1), Cast(torch.float16)],
        [RandK(0.5)],
        [Predict(2, TopK(0.4), rowwise=True)],
        [DIANA(QSGD(7))],
        [QSGD(15), LayerRecycling(2)],
        [ErrorFeedback([TopK(0.4), SignSGD()])],
        [ErrorFeedback([TopK(0.5), LookBack(0.6, rank=2, capacity=2)])],
        [ErrorFeedback(Predict(2, [TopK(0.4), QSGD(7)]))],
        [ErrorFeedback(TopK(0.5)), DIANA(LookBack(0.3))],
    ],
    ids=repr,
)
def test_a_server_that_sees_bytes_only_trains_the_same_model(fit, over_the_wire, uplink):
    shared_reports, shared_params, shared_buffers = run(fit, uplink)
    lengths = []

    def count(data):
        lengths.append(len(data))
        return data

    over_the_wire(count)
    reports, params, buffers = run(fit, uplink)
    assert repr(reports) == repr(shared_reports)  # of every number all digits; NaN is not equal to itself
    assert torch.equal(params, shared_params)
    assert all(torch.equal(buffers[name], value) for name, value in shared_buffers.items())
    sent = [client.uplink_bits for report in reports for client in report.clients]
    assert [8 * (length - HEADER_BYTES) for length in lengths] == sent
    assert len(sent) == 18
    assert min(sent) > 0
    decisions = [client.decision for report in reports for client in report.clients]
    tests = [recycled for decision in decisions if decision is not None for recycled in decision.recycled]
    assert set(tests) == ({True, False} if "LookBack" in repr(uplink) else set())


@pytest.mark.parametrize("mode", ["server", "client"])
def test_buffers_that_stay_where_they_are_do_not_cross_either_channel(fit, over_the_wire, mode):
    shared_reports, *shared = run(fit, [TopK(0.5)], buffers=mode)
    over_the_wire()
    reports, *wire = run(fit, [TopK(0.5)], buffers=mode)
    assert repr(reports) == repr(shared_reports)
    assert torch.equal(wire[0], shared[0])
    assert all(torch.equal(wire[1][name], value) for name, value in shared[1].items())


def test_a_client_whose_message_is_lost_is_left_out_of_the_round(fit, over_the_wire):
    # One message in three is lost, so that one client of the two is left out; the first round is whole.
    carried = []

    def lose(data):
        carried.append(data)
        return None if len(carried) % 3 == 0 else data

    over_the_wire(lose)
    reports, params, _ = run(fit, [LookBack(1.0)])
    outcomes = [client for report in reports for client in report.clients]
    assert len(carried) == len(outcomes) == 18
    assert all(client.rejected for client in outcomes[2::3])
    for client in outcomes:
        assert (client.uplink_bits == 0) == (client.dense_bits == 0) == client.rejected
        assert (client.decision is None) == client.rejected
    assert all(math.isfinite(report.update_norm) for report in reports)
    assert torch.isfinite(params).all()


# Without a Trainer


def dense(*values):
    return Dense(torch.tensor(values))


def send(channel, state, update, round_index, buffers=None):
    return channel.send(CLIENT, update, buffers or {}, Context(round_index, seed=0, path=(CLIENT,)), state)


def channels(uplink, layout):
    return SharedChannel(uplink), WireChannel(uplink, layout)


@pytest.mark.parametrize("name", [name for name in UPLINKS if "target" not in name and "recycling" not in name])
def test_both_channels_give_the_server_the_same(name):
    shared, wire = channels(UPLINKS[name], LAYOUT)
    one, two = shared.init(), wire.init()
    for index, values in enumerate(updates(8, 12)):
        if index == 7:
            shared.forget(one)
            wire.forget(two)
        received = [send(c, s, Dense(values, LAYOUT), index) for c, s in ((shared, one), (wire, two))]
        assert torch.equal(received[0].dense(), received[1].dense())
        assert received[0].bits == received[1].bits
        assert repr(received[0].decision) == repr(received[1].decision)  # NaN where refreshed


def test_a_forgotten_client_sends_in_full():
    for channel in channels([LookBack(1.0)], [2]):
        state = channel.init()
        assert [send(channel, state, dense(3.0, 1.0), index).bits for index in range(2)] == [64, 32]
        channel.forget(state)
        received = send(channel, state, dense(3.0, 2.0), 2)
        assert (received.bits, received.dense().tolist()) == (64, [3.0, 2.0])
        channel.forget(state)
        assert all(not found for found in look_back_gradients(state))  # at both ends


def test_the_ends_of_a_wire_share_no_memory():
    channel = WireChannel([LookBack(1.0)], [2])
    state = channel.init()
    send(channel, state, dense(3.0, 1.0), 0)
    lbgs = [state[end]["uplink"]["stages"][0]["lbgs"][0]["payloads"][0]["values"] for end in ("client", "server")]
    lbgs[0].zero_()
    assert lbgs[1].tolist() == [3.0, 1.0]


def test_after_a_lost_refresh_one_more_message_is_not_taken():
    arriving = iter([False, True, True, True])
    channel = WireChannel([LookBack(0.2)], [2], transport=lambda data: data if next(arriving) else None)
    state = channel.init()
    received = [send(channel, state, dense(3.0, 1.0), index) for index in range(4)]
    # Lost in full; coefficients of what the server does not have; in full again; coefficients.
    assert [None if one is None else one.bits for one in received] == [None, None, 64, 32]
    assert received[3].dense().tolist() == [3.0, 1.0]


def test_buffers_cross_with_the_update_and_count():
    buffers = {"norm.mean": torch.tensor([0.5, 0.25])}
    shared, wire = SharedChannel([]), WireChannel([], [2], {"norm.mean": torch.zeros(2)})
    for channel in (shared, wire):
        received = send(channel, channel.init(), dense(3.0, 1.0), 0, buffers)
        assert received.buffers.keys() == buffers.keys()
        assert torch.equal(received.buffers["norm.mean"], buffers["norm.mean"])
        # 2 numbers; the length of the update; the name, its length, dtype, number of dimensions, extent; 2 numbers.
        assert received.bits == 64 + 8 + 8 * (9 + 1 + 1 + 1 + 1) + 64
    with pytest.raises(MessageError, match="'other'"):
        send(wire, wire.init(), dense(3.0, 1.0), 0, {"other": torch.zeros(2)})


def test_a_chain_decodes_every_stage_in_a_channel():
    chain = as_chain([ErrorFeedback(DIANA(TopK(0.5), rate=0.5))])
    for channel in (SharedChannel(chain), WireChannel(chain, [2])):
        state = channel.init()
        # g = (4, 2): (4, 0) is sent, e = (0, 2), h = (4, 0). Then g + e - h = (0, 4): h + (0, 4) = (4, 4), e = 0.
        seen = [send(channel, state, dense(4.0, 2.0), index).dense().tolist() for index in range(2)]
        assert seen == [[4.0, 0.0], [4.0, 4.0]]
