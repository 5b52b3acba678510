"""Client and server over a channel that loses, repeats, delays and reorders what it carries."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import assert_same, through_a_file, vectors
from uplinks import FORETELLING, LAYOUT, LOOKING_BACK, SIZE, UPLINKS

from lightning_lbgm.compression import (
    ATOMO,
    QSGD,
    Context,
    LookBack,
    RandK,
    RandomSparse,
    RoundResult,
    TopK,
    as_chain,
)
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.payloads.low_rank import LowRank
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.protocol.endpoints import ClientEnd, Rejection, ServerEnd
from lightning_lbgm.protocol.message import HEADER_BYTES, Message, MessageError

seeds = st.integers(0, 2**32 - 1)
REMEMBERING = {**LOOKING_BACK, **FORETELLING}
# One of each way to remember: by one vector and by several, whole and by layer, by rows, and inside other stages.
LOSSY = [
    "all",
    "ef(topk, sign)",
    "randk, qsgd",
    "topk, layer recycling",
    "lookback",
    "rank 3 by layer, max_age",
    "topk, cast, lookback",
    "ef(ef(lookback))",
    "ef(topk, target)",
    "atomo, rowwise, rank 3",
    "ef(rowwise, rank 3)",
    "rowwise by layer, rank 3",
    "predict rowwise",
    "ef(predict)",
    "diana, sign",
    "ef(diana)",
]


class Updates:
    """Updates of one client that keep a direction for some rounds; now and then one is zero."""

    def __init__(self, rng):
        self.rng, self.direction = rng, rng.normal(size=SIZE)

    def next(self):
        if self.rng.random() < 0.2:
            self.direction = self.rng.normal(size=SIZE)
        values = self.direction * self.rng.uniform(0.5, 2) + self.rng.uniform(0, 0.7) * self.rng.normal(size=SIZE)
        return Dense(torch.tensor(values * (self.rng.random() > 0.05), dtype=torch.float32), LAYOUT)


class Federation:
    """A server, clients and the channel between them, with what must hold checked at every step.

    Args:
        uplink: The stages.
        seed: Of the updates and of the channel.
        faults: Probabilities that a message is dropped, repeated or delayed; that a rejection is lost or late; that
            a client or the server starts anew.
    """

    def __init__(self, uplink, seed, clients=3, **faults):
        self.uplink, self.rng = as_chain(uplink), np.random.default_rng(seed)
        self.shared = self.uplink.init_shared()
        self.faults = faults
        self.server = ServerEnd(uplink, LAYOUT)
        self.clients = {7 * k: ClientEnd(7 * k, uplink) for k in range(clients)}
        self.updates = {k: Updates(np.random.default_rng([seed, k])) for k in self.clients}
        self.sent, self.taken = {}, set()  # by the bytes: the message, what it must decode to, the client's memory
        self.on_the_way, self.late_rejections = [], []
        self.told = {}  # number of the last message of a client that was told to send in full
        self.counts = dict.fromkeys(("taken", "recycled", "rejected", "forgotten", "late", "repeated"), 0)
        self.decoded = []

    def context(self, round_index, client_id):
        return Context(round_index, self.shared, seed=9, path=(client_id,))

    def happens(self, fault):
        return self.rng.random() < self.faults.get(fault, 0.0)

    def round(self, round_index):
        if self.happens("server_restart"):
            self.server = ServerEnd(self.uplink, LAYOUT)
            self.told.clear()
        arriving, self.on_the_way = self.on_the_way, []
        for client_id in self.clients:
            if self.happens("client_restart"):
                self.clients[client_id] = ClientEnd(client_id, self.uplink)
                self.told.pop(client_id, None)
            if self.rng.random() < 0.8:  # in the cohort
                self.send(client_id, round_index, arriving)
        still_late, self.late_rejections = self.late_rejections, []
        for client_id, rejection in still_late:
            self.clients[client_id].rejected(rejection)
        taken = [self.receive(arriving[index], round_index) for index in self.rng.permutation(len(arriving))]
        self.end_round(round_index, [data for data in taken if data is not None])

    def end_round(self, round_index, taken):
        """Let the server learn from the round what concerns all clients, as after one of equal weights."""
        if not taken:
            return
        messages, seen, _, decisions = zip(*(self.sent[data] for data in taken))
        bits, dense = tuple(message.num_bits for message in messages), (32 * SIZE,) * len(taken)
        mean = torch.stack(seen).mean(0)
        result = RoundResult(LAYOUT, torch.linspace(1, 2, SIZE), mean, bits, dense, decisions)
        self.uplink.end_round(self.shared, result, self.context(round_index, -1))

    def send(self, client_id, round_index, arriving):
        client, context = self.clients[client_id], self.context(round_index, client_id)
        message, encoded = client.encode(self.updates[client_id].next(), round_index, context)
        data = message.to_bytes()
        assert len(data) == HEADER_BYTES + message.num_bits // 8
        assert data not in self.sent
        memory = copy.deepcopy(vectors(client.state_dict()["uplink"]))
        self.sent[data] = (message, encoded.decoded.dense().clone(), memory, encoded.decision)
        copies = 0 if self.happens("drop") else 2 if self.happens("repeat") else 1
        for _ in range(copies):
            (self.on_the_way if self.happens("delay") else arriving).append(data)
        if data not in arriving:
            self.told.pop(client_id, None)

    def receive(self, data, round_index):
        """Return the bytes if the server takes them."""
        message, expected, memory, _ = self.sent[data]
        client_id = message.client_id
        before = copy.deepcopy(self.server.state_dict())
        try:
            update = self.server.receive(data, round_index, self.context(round_index, client_id))
        except Rejection as rejection:
            self.rejected(data, rejection, round_index)
            assert_same(self.server.state_dict(), before)
            return None
        assert message.round_index == round_index
        assert data not in self.taken
        self.taken.add(data)
        assert torch.equal(update.dense(), expected)
        self.decoded.append(update.dense().clone())
        if message.state_version:
            assert_same(vectors(self.server.state_dict()["clients"][client_id]["uplink"]), memory)
        self.told.pop(client_id, None)
        self.counts["taken"] += 1
        self.counts["recycled"] += message.base_version != 0
        return data

    def rejected(self, data, rejection, round_index):
        message = self.sent[data][0]
        client_id = message.client_id
        in_time = message.round_index == round_index and data not in self.taken
        self.counts["rejected"] += in_time
        self.counts["late"] += message.round_index != round_index
        self.counts["repeated"] += data in self.taken
        self.counts["forgotten"] += rejection.forgotten
        # The client went in full after it was told, and that message has come in time.
        assert not (in_time and message.sequence > self.told.get(client_id, 2**32))
        if not in_time:
            assert not rejection.forgotten
        if self.happens("lose_rejection"):
            return
        if self.happens("delay_rejection"):
            self.late_rejections.append((client_id, rejection))
            return
        self.clients[client_id].rejected(rejection)
        if rejection.forgotten:
            self.told[client_id] = message.sequence


MESSY = {"drop": 0.2, "repeat": 0.2, "delay": 0.15, "lose_rejection": 0.3, "delay_rejection": 0.2}
RESTARTS = {"client_restart": 0.06, "server_restart": 0.04}


@pytest.mark.parametrize("name", LOSSY)
@given(seed=seeds, restarts=st.booleans())
@settings(deadline=None, max_examples=4)
def test_whatever_is_lost_or_late_the_server_decodes_what_the_client_meant(name, seed, restarts):
    federation = Federation(UPLINKS[name], seed, **MESSY, **(RESTARTS if restarts else {}))
    for round_index in range(14):
        federation.round(round_index)
    assert federation.counts["taken"] > 0


@pytest.mark.parametrize("name", LOSSY)
def test_the_runs_above_meet_everything_that_can_happen(name):
    federation = Federation(UPLINKS[name], 1, **MESSY, **RESTARTS)
    for round_index in range(40):
        federation.round(round_index)
    met = {what for what, count in federation.counts.items() if count}
    assert met >= {"taken", "late", "repeated"}
    if name in REMEMBERING:
        assert met == set(federation.counts)


@pytest.mark.parametrize("name", UPLINKS)
def test_nothing_is_rejected_where_nothing_is_lost(name):
    federation = Federation(UPLINKS[name], 2, clients=2)
    for round_index in range(15):
        federation.round(round_index)
    assert federation.counts["rejected"] == 0
    assert federation.counts["taken"] == len(federation.sent)
    assert (federation.counts["recycled"] > 0) == (name in REMEMBERING)


@pytest.mark.parametrize("name", [name for name in LOSSY if name in REMEMBERING])
def test_a_loss_costs_at_most_one_more_message(name):
    # Every message is lost with a tenth, every rejection arrives.
    federation = Federation(UPLINKS[name], 3, clients=6, drop=0.1)
    for round_index in range(40):
        federation.round(round_index)
    lost = len(federation.sent) - federation.counts["taken"] - federation.counts["rejected"]
    assert lost > 5
    assert 0 < federation.counts["rejected"] <= lost


@pytest.mark.parametrize("name", UPLINKS)
@pytest.mark.parametrize("interrupted_after", [0, 1, 8])
def test_both_ends_go_on_from_a_file_bit_for_bit(name, interrupted_after):
    whole = Federation(UPLINKS[name], 4, clients=2, **MESSY)
    resumed = Federation(UPLINKS[name], 4, clients=2, **MESSY)
    for round_index in range(14):
        if round_index == interrupted_after:
            resumed.shared = through_a_file(resumed.shared)
            server = ServerEnd(resumed.uplink, LAYOUT)
            server.load_state_dict(through_a_file(resumed.server.state_dict()))
            resumed.server = server
            for client_id, client in resumed.clients.items():
                state = through_a_file(client.state_dict())
                resumed.clients[client_id] = ClientEnd(client_id, resumed.uplink, state)
        whole.round(round_index)
        resumed.round(round_index)
    assert list(whole.sent) == list(resumed.sent)
    assert whole.counts == resumed.counts
    assert len(whole.decoded) > 3
    assert all(torch.equal(one, other) for one, other in zip(whole.decoded, resumed.decoded, strict=True))
    assert_same(whole.server.state_dict(), resumed.server.state_dict())
    assert_same(whole.shared, resumed.shared)


# By hand


def ends(uplink, size=2, rounds=0):
    """A client and a server, after some rounds in which nothing was lost and the update was (1, 2, 3, ...)."""
    client, server = ClientEnd(5, uplink), ServerEnd(uplink, [size])
    for round_index in range(rounds):
        server.receive(
            client.send(first(size), round_index, Context(round_index)).to_bytes(), round_index, Context(round_index)
        )
    return client, server


def first(size=2):
    return torch.arange(1.0, size + 1)


def deliver(client, server, values, round_index):
    """Send an update; return what the server makes of it, or the rejection, which the client is told."""
    try:
        return (
            server.receive(
                client.send(values, round_index, Context(round_index)).to_bytes(), round_index, Context(round_index)
            )
            .dense()
            .tolist()
        )
    except Rejection as rejection:
        client.rejected(rejection)
        return rejection


def assert_unchanged(server, attempt, error=MessageError, match=None):
    before = copy.deepcopy(server.state_dict())
    with pytest.raises(error, match=match):
        attempt()
    assert_same(server.state_dict(), before)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("rank", [1, 2])
def test_after_a_lost_refresh_one_message_is_rejected(rank, granularity):
    client, server = ends([LookBack(0.2, granularity, rank)])
    client.send(first(), 0, Context(0))  # lost
    rejection = deliver(client, server, 2 * first(), 1)
    assert isinstance(rejection, Rejection)
    assert (rejection.forgotten, rejection.sequence) == (True, 0)
    assert "Client 5, message 2" in str(rejection)
    assert deliver(client, server, 3 * first(), 2) == [3.0, 6.0]  # in full
    assert deliver(client, server, 4 * first(), 3) == pytest.approx([4.0, 8.0])  # recycled
    assert client.send(first(), 4, Context(4)).num_bits == (32 if granularity == "model" else 32 + 24)


def test_a_lost_refresh_that_is_followed_by_another_costs_nothing():
    client, server = ends([LookBack(0.2)], rounds=1)
    client.send(torch.tensor([2.0, -1.0]), 1, Context(1))  # turned by a right angle; lost
    assert deliver(client, server, torch.tensor([1.0, 2.0]), 2) == [1.0, 2.0]  # turned back, so in full
    assert deliver(client, server, torch.tensor([2.0, 4.0]), 3) == [2.0, 4.0]


def test_a_lost_refresh_is_noticed_where_more_look_back_gradients_are_kept():
    client, server = ends([LookBack(0.2, rank=2)], rounds=1)
    client.send(torch.tensor([2.0, -1.0]), 1, Context(1))  # lost
    rejection = deliver(client, server, torch.tensor([3.0, 1.0]), 2)  # in the span of both
    assert rejection.forgotten
    assert deliver(client, server, torch.tensor([3.0, 1.0]), 3) == [3.0, 1.0]


def test_a_lost_coefficient_costs_nothing():
    client, server = ends([LookBack(0.2)], rounds=1)
    assert client.send(2 * first(), 1, Context(1)).num_bits == 32  # lost
    assert deliver(client, server, 3 * first(), 2) == [3.0, 6.0]


@pytest.mark.parametrize("uplink", [[], [LookBack(0.2)]], ids=repr)
def test_a_message_is_taken_once_and_in_its_round(uplink):
    client, server = ends(uplink, rounds=1)
    message = client.send(2 * first(), 1, Context(1))
    for round_index in (0, 2):
        with pytest.raises(Rejection, match=rf"(?s)round 1\b.*round {round_index}\b") as caught:
            server.receive(message.to_bytes(), round_index, Context(round_index))
        assert (caught.value.forgotten, caught.value.sequence) == (False, 1)
    assert server.receive(message.to_bytes(), 1, Context(1)).dense().tolist() == [2.0, 4.0]
    with pytest.raises(Rejection) as caught:
        server.receive(message.to_bytes(), 1, Context(1))
    assert (caught.value.forgotten, caught.value.sequence) == (False, 2)
    # Told so, the client remembers what it did; and the number goes on.
    client.rejected(caught.value)
    assert client.send(2 * first(), 2, Context(2)).sequence == 3
    assert client.send(2 * first(), 3, Context(3)).num_bits == (32 if uplink else 64)


def test_the_numbers_of_a_message_count_and_name_what_it_refers_to():
    client, _ = ends([LookBack(0.2)])
    one, two, three = (
        client.send(first(), 0, Context(0)),
        client.send(first(), 1, Context(1)),
        client.send(torch.tensor([2.0, -1.0]), 2, Context(2)),
    )
    assert [m.sequence for m in (one, two, three)] == [1, 2, 3]
    assert one.base_version == 0
    assert one.state_version == two.base_version == two.state_version != 0
    assert three.base_version == 0  # one look-back gradient that is replaced
    assert three.state_version not in (0, one.state_version)
    plain = ClientEnd(5, [TopK(0.5)]).send(first(), 0, Context(0))
    assert (plain.base_version, plain.state_version) == (0, 0)


def test_a_client_that_lost_its_state_is_taken_again_after_it_was_told():
    _, server = ends([LookBack(0.2)], rounds=3)
    client = ClientEnd(5, [LookBack(0.2)])
    rejection = deliver(client, server, torch.tensor([2.0, -1.0]), 3)
    assert (rejection.forgotten, rejection.sequence) == (False, 3)  # the server has taken three already
    # Told so, the client counts on from there, and knows that its update was not taken.
    assert deliver(client, server, torch.tensor([6.0, -3.0]), 5) == [6.0, -3.0]
    assert deliver(client, server, torch.tensor([8.0, -4.0]), 6) == [8.0, -4.0]


def test_a_client_that_lost_its_state_is_not_mistaken_for_what_it_was():
    # Both have sent one message: the numbers and the rounds fit, and only the memories differ.
    _, server = ends([LookBack(0.2)], rounds=1)
    client = ClientEnd(5, [LookBack(0.2)])
    client.send(torch.tensor([2.0, -1.0]), 1, Context(1))  # lost
    rejection = deliver(client, server, torch.tensor([4.0, -2.0]), 2)
    assert rejection.forgotten  # not twice the server's look-back gradient, (2, 4)
    assert deliver(client, server, torch.tensor([4.0, -2.0]), 3) == [4.0, -2.0]


def test_a_memory_that_differs_in_an_older_look_back_gradient_alone_is_another():
    uplink, (x, y, z) = [LookBack(0.2, rank=2)], torch.eye(3)
    client, server = ClientEnd(5, uplink), ServerEnd(uplink, [3])
    assert deliver(client, server, x, 0) == x.tolist()
    assert deliver(client, server, y, 1) == y.tolist()
    other = ClientEnd(5, uplink)
    other.send(z, 2, Context(2))
    other.send(y, 3, Context(3))  # both lost; the newest is the server's too
    assert deliver(other, server, y + z, 4).forgotten


def test_a_client_that_lost_its_state_and_sends_the_same_again_has_the_same_memory():
    _, server = ends([LookBack(0.2)], rounds=1)
    client = ClientEnd(5, [LookBack(0.2)])
    client.send(first(), 1, Context(1))  # lost, but just what the server has
    assert deliver(client, server, 2 * first(), 2) == [2.0, 4.0]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_server_that_lost_its_state_asks_for_a_full_update(rank):
    client, _ = ends([LookBack(0.2, rank=rank)], rounds=3)
    server = ServerEnd([LookBack(0.2, rank=rank)], [2])
    rejection = deliver(client, server, 2 * first(), 3)
    assert (rejection.forgotten, rejection.sequence) == (True, 0)
    assert deliver(client, server, 3 * first(), 4) == [3.0, 6.0]
    assert deliver(client, server, 4 * first(), 5) == pytest.approx([4.0, 8.0])


def test_a_rejection_that_comes_late_costs_a_full_update_and_nothing_else():
    client, server = ends([LookBack(0.2)])
    client.send(first(), 0, Context(0))  # lost
    with pytest.raises(Rejection) as caught:
        server.receive(client.send(first(), 1, Context(1)).to_bytes(), 1, Context(1))
    client.rejected(caught.value)
    assert deliver(client, server, first(), 2) == [1.0, 2.0]
    client.rejected(caught.value)  # the same again
    assert client.send(first(), 3, Context(3)).num_bits == 64


def test_clients_are_told_apart():
    server = ServerEnd([LookBack(0.2)], [2])
    one, two = ClientEnd(1, [LookBack(0.2)]), ClientEnd(2, [LookBack(0.2)])
    assert deliver(one, server, torch.tensor([1.0, 0.0]), 0) == [1.0, 0.0]
    assert deliver(two, server, torch.tensor([0.0, 1.0]), 0) == [0.0, 1.0]
    assert deliver(one, server, torch.tensor([2.0, 0.0]), 1) == [2.0, 0.0]
    assert deliver(two, server, torch.tensor([0.0, 3.0]), 1) == [0.0, 3.0]


BUFFERS = {"mean": torch.zeros(1), "scale": torch.ones(2, 3, dtype=torch.float64)}


def test_buffers_cross_with_the_update():
    client, server = ClientEnd(5, []), ServerEnd([], [2], BUFFERS)
    sent = {"mean": torch.tensor([0.5]), "scale": torch.full((2, 3), -math.inf, dtype=torch.float64)}
    update, buffers = server.receive(client.send(first(), 0, Context(0), sent).to_bytes(), 0, Context(0))
    assert update.dense().tolist() == [1.0, 2.0]
    assert buffers.keys() == sent.keys()
    assert all(torch.equal(buffers[name], sent[name]) for name in sent)
    # Only what training has changed is sent.
    received = server.receive(client.send(first(), 1, Context(1), {"mean": torch.ones(1)}), 1, Context(1))
    assert (received.dense().tolist(), received.buffers) == ([1.0, 2.0], {"mean": torch.ones(1)})
    assert server.receive(client.send(first(), 2, Context(2)), 2, Context(2)).buffers == {}


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize(
    ("sent", "match"),
    [
        ({"other": torch.zeros(1)}, r"'other'.*'mean', 'scale'.*ServerEnd\(buffers="),
        ({"mean": torch.zeros(2)}, r"'mean'.*\(2,\).*\(1,\)"),
        ({"mean": torch.tensor(0.0)}, r"'mean'.*\(\).*\(1,\)"),
        ({"mean": torch.zeros(1, dtype=torch.float64)}, "'mean'.*float64.*float32"),
        ({"scale": torch.zeros(3, 2, dtype=torch.float64)}, r"'scale'.*\(3, 2\)"),
        ({"mean": torch.tensor([math.nan])}, "'mean' has NaN"),
    ],
)
def test_buffers_that_the_module_does_not_have_are_refused(sent, match, as_bytes):
    client, server = ClientEnd(5, [LookBack(0.2)]), ServerEnd([LookBack(0.2)], [2], BUFFERS)
    server.receive(client.send(first(), 0, Context(0), {"mean": torch.ones(1)}), 0, Context(0))
    message = client.send(2 * first(), 1, Context(1), sent)
    data = message.to_bytes() if as_bytes else message
    assert_unchanged(server, lambda: server.receive(data, 1, Context(1)), MessageError, match)


def test_a_server_that_knows_of_no_buffers_takes_none():
    client, server = ends([])
    message = client.send(first(), 0, Context(0), BUFFERS)
    assert_unchanged(server, lambda: server.receive(message, 0, Context(0)), MessageError, "'mean'.*known are \\[\\]")


@pytest.mark.parametrize("context", [None, 3, {}])
def test_the_ends_need_the_rounds_context(context):
    client, server = ends([QSGD(1)])
    message = client.send(first(), 4, Context(4, seed=1))
    for attempt in (
        lambda: client.send(first(), 4, context),
        lambda: server.receive(message.to_bytes(), 4, context),
        lambda: server.receive(b"", 4, context),
    ):
        with pytest.raises(TypeError, match=rf"context=.*round's `Context`.*{context!r}.*`Context\(4, shared, seed\)`"):
            attempt()
    with pytest.raises(TypeError, match="round's `Context`"):
        client.send(first(), 4)
    with pytest.raises(TypeError, match="round's `Context`"):
        server.receive(message.to_bytes(), 4)
    with pytest.raises(ValueError, match=r"ClientEnd.send\(round_index=4.*round 3.*Context\(4"):
        client.send(first(), 4, Context(3, seed=1))
    with pytest.raises(ValueError, match=r"ServerEnd.receive\(round_index=4.*round 3"):
        server.receive(message.to_bytes(), 4, Context(3, seed=1))
    assert client.state_dict()["sequence"] == 1


def test_random_choices_are_those_of_the_simulation():
    # The simulation draws for a client of a round from (run's seed, round, client), the two ends from the round's
    # context, which is the same for all clients.
    update, chain = torch.randn(64, generator=torch.Generator().manual_seed(0)), as_chain([RandK(0.2), QSGD(3)])
    seen = []
    for client_id in (4, 5):
        client, server = ClientEnd(client_id, chain), ServerEnd(chain, [64])
        received = server.receive(client.send(update, 7, Context(7, seed=1)).to_bytes(), 7, Context(7, seed=1))
        simulated = chain.encode(Dense(update), chain.init(), Context(7, seed=1, path=(client_id,))).payload
        assert torch.equal(received.dense(), simulated.dense())
        seen.append(received.dense())
    assert not torch.equal(*seen)


def test_what_the_server_remembers_is_not_the_messages_memory():
    client, server = ends([LookBack(0.2)])
    data = bytearray(client.send(first(), 0, Context(0)).to_bytes())
    server.receive(data, 0, Context(0)).dense().zero_()
    data[:] = bytes(len(data))
    assert deliver(client, server, 2 * first(), 1) == [2.0, 4.0]


# What is not taken, and not stored


def forged(payload, server, sequence=50, **numbers):
    """A message of client 5 that refers to what the server remembers of it."""
    version = server.state_dict()["clients"][5]["memory"]
    return Message(5, payload, {}, 9, sequence, **{"base_version": version, "state_version": version, **numbers})


def served(uplink, size=4):
    _, server = ends(uplink, size, rounds=1)
    return server


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("inf"), 0.0], [0.0, -float("inf")]])
@pytest.mark.parametrize(
    "uplink", [[], [LookBack(0.2)], [LookBack(0.2, rank=2)], [TopK(1.0)], [LookBack(0.2, "layer")]], ids=repr
)
def test_updates_that_are_not_finite_are_rejected(uplink, values):
    client, server = ends(uplink, rounds=1)
    message = replace(client.send(torch.tensor([5.0, -1.0]), 1, Context(1)), payload=Dense(torch.tensor(values)))
    assert_unchanged(server, lambda: server.receive(message.to_bytes(), 1, Context(1)), Rejection, "not finite")


INFINITE = {
    "product of factors": LowRank.of(torch.full((2, 1), 1e30), torch.full((2, 1), 1e30)),
    "scaled values": RandomSparse(torch.tensor([3e38]), 1, True, [4]),
    "one part": Blocks([Dense(torch.ones(2)), LowRank.of(torch.full((1, 1), 1e30), torch.full((2, 1), 1e30))]),
}


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("uplink", [[], [LookBack(0.2)], [LookBack(0.2, "layer")]], ids=repr)
def test_updates_that_decode_to_infinity_are_rejected(uplink, name):
    layout = INFINITE[name].layout
    server = ServerEnd(uplink, layout)
    server.receive(ClientEnd(5, uplink).send(Dense(first(4), layout), 0, Context(0)).to_bytes(), 0, Context(0))
    data = forged(INFINITE[name], server, base_version=0, state_version=3 if uplink else 0).to_bytes()
    assert_unchanged(server, lambda: server.receive(data, 9, Context(9)), MessageError, "finite")


def test_coefficients_that_decode_to_infinity_are_rejected():
    server = served([LookBack(0.2)])
    message = forged(Coefficients(torch.tensor([3e38]), [4]), server)
    assert_unchanged(server, lambda: server.receive(message.to_bytes(), 9, Context(9)), MessageError, "finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coefficients_that_are_not_finite_are_rejected(value):
    server = served([LookBack(0.2)])
    message = forged(Coefficients(torch.tensor([value]), [4]), server)
    assert_unchanged(server, lambda: server.receive(message.to_bytes(), 9, Context(9)), Rejection, "not finite")


@pytest.mark.parametrize("uplink", [[], [LookBack(0.2)], [LookBack(0.2, "layer")]], ids=repr)
@pytest.mark.parametrize("as_bytes", [True, False])
def test_updates_of_another_size_are_refused(uplink, as_bytes):
    server = served(uplink)
    for payload in (Dense(torch.ones(3)), Dense(torch.ones(5)), Sparse(torch.ones(1), torch.tensor([4]).int(), [5])):
        message = forged(payload, server, base_version=0)
        attempt = message.to_bytes() if as_bytes else message
        assert_unchanged(server, lambda attempt=attempt: server.receive(attempt, 9, Context(9)), match="entries, not 4")


@pytest.mark.parametrize("stages", [[], [ATOMO(1)], [LookBack(0.2, "layer")], [ATOMO(1), LookBack(0.2)]], ids=repr)
def test_updates_of_another_federations_tensors_are_refused(stages):
    shapes, others = [(6, 4), (8,)], [(4, 6), (8,)] if "ATOMO(" in repr(stages) else [(20,), (12,)]
    values = torch.arange(32.0)
    client, server = ClientEnd(5, stages), ServerEnd(stages, shapes)
    server.receive(client.send(Dense(values, shapes), 0, Context(0)).to_bytes(), 0, Context(0))
    data = ClientEnd(5, stages).send(Dense(values, others), 9, Context(9))
    data = replace(data, sequence=50).to_bytes()
    if stages:
        assert_unchanged(server, lambda: server.receive(data, 9, Context(9)))
    else:
        assert torch.equal(server.receive(data, 9, Context(9)).dense(), values)  # whole vectors do not tell


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_wrong_number_of_coefficients_is_refused(count):
    client, server = ends([LookBack(0.2, rank=3)])
    for round_index, values in enumerate(([1.0, 0.0], [0.0, 1.0])):
        assert deliver(client, server, torch.tensor(values), round_index) == values
    message = forged(Coefficients(torch.ones(count), [2]), server)
    assert_unchanged(
        server, lambda: server.receive(message.to_bytes(), 9, Context(9)), match=rf"{count} .*coefficients.* 2\b"
    )
    assert server.receive(
        forged(Coefficients(torch.ones(2), [2]), server).to_bytes(), 9, Context(9)
    ).dense().tolist() == [1.0, 1.0]


def test_coefficients_for_nothing_are_refused():
    server = ServerEnd([LookBack(0.2)], [4])
    message = Message(5, Coefficients(torch.ones(1), [4]), {}, 9, 1)
    assert_unchanged(server, lambda: server.receive(message.to_bytes(), 9, Context(9)), match=r"1 .*coefficients.* 0\b")
    message = replace(message, state_version=3)
    assert_unchanged(server, lambda: server.receive(message.to_bytes(), 9, Context(9)), match=r"1 .*coefficients.* 0\b")


OUT_OF_PLACE = {
    "coefficients without a look-back": ([TopK(0.5)], Coefficients(torch.ones(1), [4])),
    "coefficients inside a sparse payload": (
        [LookBack(0.2)],
        Sparse(Coefficients(torch.ones(1), [2]), torch.tensor([1, 2]).int(), [4]),
    ),
    "coefficients for one of two parts": (
        [LookBack(0.2)],
        Blocks([Coefficients(torch.ones(1), [2]), Dense(torch.ones(2))], [4]),
    ),
    "coefficients for all of a look-back by layer": ([LookBack(0.2, "layer")], Coefficients(torch.ones(1), [4])),
}


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_coefficients_out_of_place_are_refused(name, base):
    uplink, payload = OUT_OF_PLACE[name]
    layout = payload.layout if not isinstance(payload, Blocks) else Layout([2, 2])
    server = ServerEnd(uplink, layout)
    server.receive(
        ClientEnd(5, uplink).send(Dense(torch.arange(1.0, 5.0), layout), 0, Context(0)).to_bytes(), 0, Context(0)
    )
    numbers = {} if base else {"base_version": 0, "state_version": 3}
    data = forged(payload, server, **numbers).to_bytes()
    assert_unchanged(server, lambda: server.receive(data, 9, Context(9)))


def test_a_client_that_does_not_name_its_tensors_is_refused_where_they_matter():
    # By layer the client would test one vector and the server two.
    uplink = [LookBack(0.2, "layer")]
    client, server = ClientEnd(5, uplink), ServerEnd(uplink, [2, 3])
    server.receive(client.send(first(5), 0, Context(0)).to_bytes(), 0, Context(0))
    message = client.send(2 * first(5), 1, Context(1))
    assert_unchanged(server, lambda: server.receive(message.to_bytes(), 1, Context(1)))


@pytest.mark.parametrize("layout", [[0, 3, 2], [3, 0, 2], [3, 2, 0]], ids=repr)
def test_parameter_tensors_without_entries_do_no_harm(layout):
    uplink = [LookBack(0.5, "layer")]
    client, server = ClientEnd(5, uplink), ServerEnd(uplink, layout)
    for round_index in range(4):
        message = client.send(Dense((1 + round_index) * first(5), layout), round_index, Context(round_index))
        expected = [(1 + round_index) * value for value in first(5).tolist()]
        assert server.receive(message.to_bytes(), round_index, Context(round_index)).dense().tolist() == expected
    assert message.num_bits < 5 * 32 + 24


def test_a_refused_message_leaves_both_ends_in_step():
    client, server = ends([LookBack(0.2)], 4, rounds=1)
    bad = forged(Coefficients(torch.ones(2), [4]), server)
    assert_unchanged(server, lambda: server.receive(bad.to_bytes(), 9, Context(9)))
    assert deliver(client, server, 2 * first(4), 1) == [2.0, 4.0, 6.0, 8.0]


def test_corrupt_bytes_are_no_message():
    client, server = ends([LookBack(0.2)], rounds=1)
    data = bytearray(client.send(2 * first(), 1, Context(1)).to_bytes())
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x10
        assert_unchanged(server, lambda changed=changed: server.receive(changed, 1, Context(1)))
    assert server.receive(data, 1, Context(1)).dense().tolist() == [2.0, 4.0]
