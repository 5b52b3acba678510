"""The downlink: what clients hold, by hand, for every chain of stages, and over messages that get lost."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import assert_same, through_a_file
from uplinks import LAYOUT, SIZE, UPLINKS, updates

from lightning_lbgm import (
    DIANA,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LookBack,
    RandK,
    SignSGD,
    TargetSavings,
    Ternary,
    TopK,
)
from lightning_lbgm.compression import Context, as_chain
from lightning_lbgm.payloads import Dense
from lightning_lbgm.protocol import HEADER_BYTES, DownlinkClient, DownlinkServer, Message, MessageError
from lightning_lbgm.protocol.broadcast import BROADCAST, Delivery
from lightning_lbgm.protocol.downlink import WholeModel


def has_no_place(stages):
    return any(isinstance(s, (ErrorFeedback, LayerRecycling)) for s in as_chain(stages).stages_inside())


DOWNLINKS = {name: stages for name, stages in UPLINKS.items() if not has_no_place(stages)}


def models(rounds, seed=0):
    """Global parameters that move as a federation's do."""
    params = torch.zeros(SIZE)
    for index, update in enumerate(updates(seed, rounds)):
        params = params - update / (1 + index % 4)
        yield Context(index, seed=7), params.clone()


# By hand


def test_without_stages_each_client_gets_the_model_each_round():
    downlink, params = WholeModel(), torch.tensor([1.0, 2.0, 3.0])
    buffers = {"mean": torch.zeros(2)}
    assert downlink.begin_round(params, Context(0), buffers) is params
    assert downlink.deliver(3) == downlink.deliver(3) == Delivery(32 * 5, 32 * 5, whole=True)
    assert downlink.last is None
    assert downlink.state_dict() == {}


def test_what_a_sparsifier_leaves_out_is_sent_in_later_rounds():
    server = DownlinkServer([TopK(0.25)], [4])
    params = torch.tensor([4.0, 2.0, -3.0, 1.0])
    assert server.begin_round(torch.zeros(4), Context(0)).tolist() == [0, 0, 0, 0]
    assert (server.last.bits, server.last.error) == (0, 0.0)
    held = [server.begin_round(params, Context(index)).tolist() for index in range(1, 6)]
    assert held == [[4, 0, 0, 0], [4, 0, -3, 0], [4, 2, -3, 0], [4, 2, -3, 1], [4, 2, -3, 1]]
    assert server.last.error == 0.0
    # 16 + 4 + 9 + 1 = 30, of which the largest square goes first.
    server = DownlinkServer([TopK(0.25)], [4])
    server.begin_round(torch.zeros(4), Context(0))
    server.begin_round(params, Context(1))
    assert server.last.error == pytest.approx(14 / 30)


def test_a_client_gets_what_it_has_missed_or_the_model_if_that_is_smaller():
    # 40 signs and a scale are 72 bits, the model 1,280: 17 messages are cheaper.
    server, params = DownlinkServer([SignSGD()], [40]), torch.ones(40)
    server.begin_round(torch.zeros(40), Context(0))
    for client in range(4):
        assert server.deliver(client) == Delivery(1280, 1280, whole=True)
    for index in range(1, 20):
        server.begin_round(params * index, Context(index))
        assert server.last.bits == 72
        assert server.deliver(0) == Delivery(72, 1280)
        if index == 10:
            assert server.deliver(1) == Delivery(720, 1280, missed=9)
        if index == 17:
            assert server.deliver(2) == Delivery(17 * 72, 1280, missed=16)
        if index == 18:
            assert server.deliver(1) == Delivery(8 * 72, 1280, missed=7)
            assert server.deliver(3) == Delivery(1280, 1280, whole=True)
    assert server.deliver(3) == Delivery(72, 1280)
    assert server.deliver(4) == Delivery(1280, 1280, whole=True)


def test_buffers_go_with_the_last_message_alone():
    buffers = {"mean": torch.zeros(3)}
    framing = 8 * (1 + 4 + 2 + 1)  # length and name, dtype and dimensions, shape
    server = DownlinkServer([SignSGD()], [40])
    server.begin_round(torch.zeros(40), Context(0), buffers)
    # The model's 160 bytes are announced in two bytes, and the buffer's 12 follow.
    assert server.deliver(0) == Delivery(1280 + 16 + framing + 96, 1280 + 96, whole=True)
    for index in (1, 2):
        server.begin_round(torch.full((40,), float(index)), Context(index), buffers)
    assert server.deliver(0) == Delivery(72 + 72 + 8 + framing + 96, 1280 + 96, missed=1)


# Damping


def test_a_message_that_overshoots_is_damped_by_the_best_factor():
    """RandK's kept entries are 4 times too large, so that the best factor is 1 / 4 if all are as large."""
    server = DownlinkServer([RandK(0.25)], [400])
    server.begin_round(torch.zeros(400), Context(0, seed=1))
    held = server.begin_round(torch.ones(400), Context(1, seed=1))
    assert sorted(set(held.tolist())) == [0.0, 1.0]
    assert int(held.sum()) == 100
    assert server.last.error == pytest.approx(0.75)


def test_exact_factors_are_not_sent():
    """A sparsifier, and signs scaled by the mean, project: <x, C(x)> = |C(x)|^2."""
    for stages in ([TopK(0.3)], [SignSGD()], [TopK(0.3), SignSGD()], [Cast()]):
        server, alone = DownlinkServer(stages, [SIZE]), as_chain(stages)
        server.begin_round(torch.zeros(SIZE), Context(0))
        params = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
        held = server.begin_round(params, Context(1))
        encoded = alone.encode(Dense(params), alone.init())
        assert server.last.bits == encoded.payload.num_bits
        assert torch.equal(held, encoded.decoded.dense())


@pytest.mark.parametrize("name", DOWNLINKS)
def test_what_clients_hold_comes_to_the_server_that_stands_still(name):
    """Every chain is a contraction here, so that the difference shrinks; of those that draw, in the long run."""
    server = DownlinkServer(DOWNLINKS[name], LAYOUT)
    server.begin_round(torch.zeros(SIZE), Context(0, seed=5))
    params = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    distances = [float(params.norm())]
    for index in range(1, 120):
        distances.append(float((server.begin_round(params, Context(index, seed=5)) - params).norm()))
        assert distances[-1] <= distances[-2] * (1 + 1e-5) + 1e-6
        if index > 20 and distances[-1] < 1e-3 * distances[0]:
            break  # nothing but rounding is left
    assert distances[-1] < 0.2 * distances[0]


def test_a_coarse_quantizer_of_a_long_vector_does_not_diverge():
    """One level for 20,000 normal entries, the largest of about 4: a variance of 4 E|x| / E[x^2] - 1, about 2."""
    server = DownlinkServer([Ternary()], [20_000])
    params = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    server.begin_round(torch.zeros(20_000), Context(0, seed=5))
    distances = [float(params.norm())]
    for index in range(1, 30):
        distances.append(float((server.begin_round(params, Context(index, seed=5)) - params).norm()))
    assert all(after < before for before, after in itertools.pairwise(distances))
    assert server.last.error > 0.5


# Over messages


def bring(client, server, context):
    for message in server.messages(client.version):
        client.receive(message, context)


@pytest.mark.parametrize("name", DOWNLINKS)
def test_both_ends_hold_the_same_over_messages_that_are_lost_repeated_and_overtaken(name):
    stages, draw = DOWNLINKS[name], random.Random(3)
    server = DownlinkServer(stages, LAYOUT, keep_messages=True)
    alone = DownlinkServer(stages, LAYOUT)
    clients = [DownlinkClient(stages, LAYOUT, {"mean": torch.zeros(2)}) for _ in range(3)]
    for context, params in models(25):
        buffers = {"mean": torch.full((2,), float(context.round_index))}
        held = server.begin_round(params, context, buffers)
        assert torch.equal(alone.begin_round(params, context, buffers), held)  # sizes alone, or messages: the same
        for client in clients:
            if draw.random() < 0.4:
                continue  # is elsewhere
            messages, lost = server.messages(client.version), draw.random() < 0.3
            if lost:
                del messages[draw.randrange(len(messages))]
            for message in messages * 2:  # each comes twice
                try:
                    client.receive(message, Context(0, seed=7))
                except MessageError:
                    assert client.held is not None or lost
            if lost:
                bring(client, server, context)
            assert torch.equal(client.held, held)
            assert torch.equal(client.buffers["mean"], buffers["mean"])


@pytest.mark.parametrize("name", ["topk", "rank 3", "diana", "qsgd", "topk, qsgd, lookback by layer", "rowwise"])
def test_bits_that_are_counted_are_those_of_the_messages(name):
    stages, draw = DOWNLINKS[name], random.Random(5)
    server = DownlinkServer(stages, LAYOUT, keep_messages=True)
    clients = {k: DownlinkClient(stages, LAYOUT, {"mean": torch.zeros(2)}) for k in range(4)}
    kinds = set()
    for context, params in models(40):
        server.begin_round(params, context, {"mean": torch.zeros(2)})
        for k in draw.sample(range(4), 1 if context.round_index % 9 else 3):
            messages = server.messages(clients[k].version)
            delivery = server.deliver(k)
            assert delivery.bits == sum(8 * (len(message) - HEADER_BYTES) for message in messages)
            assert delivery.missed == len(messages) - 1
            kinds.add((delivery.whole, delivery.missed > 0))
            bring(clients[k], server, context)
            assert torch.equal(clients[k].held, server.held)
    assert (True, False) in kinds


def test_a_client_that_is_up_to_date_gets_nothing():
    server = DownlinkServer([TopK(0.5)], [4], keep_messages=True)
    client = DownlinkClient([TopK(0.5)], [4])
    server.begin_round(torch.ones(4), Context(0))
    bring(client, server, Context(0))
    assert server.messages(client.version) == []
    server.deliver(0)
    assert server.deliver(0) == Delivery(0, 128)


@pytest.mark.parametrize("name", ["topk", "lookback", "diana, sign", "target"])
def test_both_ends_go_on_from_their_states(name):
    stages = DOWNLINKS[name]

    def run(break_at):
        server, client = DownlinkServer(stages, LAYOUT, keep_messages=True), DownlinkClient(stages, LAYOUT)
        for context, params in models(12):
            if context.round_index == break_at:
                restored = DownlinkServer(stages, LAYOUT, keep_messages=True)
                restored.load_state_dict(through_a_file(server.state_dict()))
                server = restored
                client = DownlinkClient(stages, LAYOUT, state=through_a_file(client.state_dict()))
            server.begin_round(params, context)
            server.deliver(0)
            if context.round_index % 3 == 0:
                bring(client, server, context)
        return server.state_dict(), client.state_dict()

    assert_same(run(None), run(7))


def test_a_round_is_taken_back_by_its_state_of_before():
    server = DownlinkServer([LookBack(0.9)], LAYOUT)
    rounds = list(models(4))
    for context, params in rounds[:3]:
        server.begin_round(params, context)
        server.deliver(1)
    before, kept = server.state_dict(), through_a_file(server.state_dict())
    server.begin_round(*rounds[3][::-1])
    server.deliver(2)
    once = through_a_file(server.state_dict())
    server.load_state_dict(before)
    assert_same(server.state_dict(), kept)
    server.begin_round(*rounds[3][::-1])
    server.deliver(2)
    assert_same(server.state_dict(), once)


def test_parameters_that_are_no_numbers_go_to_everybody_in_full():
    server = DownlinkServer([TopK(0.5)], [4], keep_messages=True)
    client = DownlinkClient([TopK(0.5)], [4])
    for index, params in enumerate([[0.0] * 4, [1.0] * 4, [1.0, float("nan"), 1.0, 1.0], [2.0] * 4, [3.0] * 4]):
        held = server.begin_round(torch.tensor(params), Context(index))
        bring(client, server, Context(index))
        whole = server.deliver(0).whole
        assert whole == (index in (0, 2, 3))
        assert torch.equal(client.held, held) or index == 2


def test_a_threshold_that_is_steered_learns_from_the_downlink():
    server = DownlinkServer([LookBack(TargetSavings(0.6))], LAYOUT)
    for context, params in models(10):
        server.begin_round(params, context)
    assert server.last.decision.threshold != TargetSavings(0.6).init()


# Refusals


def test_stages_without_a_place_in_a_downlink_are_refused():
    with pytest.raises(ValueError, match=r"ErrorFeedback.*write `downlink=\[TopK\(fraction=0.1\)\]`"):
        DownlinkServer(ErrorFeedback(TopK(0.1)), [4])
    with pytest.raises(ValueError, match="ErrorFeedback"):
        DownlinkServer([DIANA(ErrorFeedback(TopK(0.1)))], [4])
    with pytest.raises(ValueError, match="LayerRecycling"):
        DownlinkServer([LayerRecycling(1)], [4])
    with pytest.raises(TypeError, match="`downlink` takes stages"):
        DownlinkServer([0.1], [4])


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_message_is_refused_and_leaves_no_trace(position, value):
    server = DownlinkServer([TopK(0.5)], [8], keep_messages=True)
    client = DownlinkClient([TopK(0.5)], [8])
    server.begin_round(torch.zeros(8), Context(0))
    bring(client, server, Context(0))
    server.begin_round(torch.arange(8.0), Context(1))
    (message,) = server.messages(client.version)
    changed = bytearray(message)
    changed[position % len(changed)] = value
    if bytes(changed) != message:
        with pytest.raises(MessageError):
            client.receive(bytes(changed), Context(1))
    assert client.held.tolist() == [0.0] * 8
    client.receive(message, Context(1))
    assert torch.equal(client.held, server.held)


def test_messages_that_are_not_the_servers_are_refused():
    client = DownlinkClient([TopK(0.5)], [2])
    model = Dense(torch.ones(2))
    with pytest.raises(MessageError, match="of client 3"):
        client.receive(Message(3, model), Context(0))
    with pytest.raises(MessageError, match="changes version 9 of the model, this client holds 0"):
        client.receive(Message(BROADCAST, model, base_version=9, state_version=10), Context(0))
    with pytest.raises(MessageError, match="3 entries, not 2"):
        client.receive(Message(BROADCAST, Dense(torch.ones(3))), Context(0))
    with pytest.raises(MessageError, match="`DownlinkClient"):
        client.receive(Message(BROADCAST, model, {"mean": torch.zeros(2)}), Context(0))
    client.receive(Message(BROADCAST, model, state_version=10), Context(0))
    with pytest.raises(MessageError, match="does not lead to the version"):
        client.receive(Message(BROADCAST, model, base_version=10, state_version=11), Context(0))
    assert client.held.tolist() == [1.0, 1.0]
