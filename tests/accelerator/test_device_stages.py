"""Every uplink on an accelerator: the CPU's payloads, decisions and bytes, up to rounding, and no tensor elsewhere."""

import pytest
import torch
from devices import near
from states import leaves
from uplinks import CLIENT, LAYOUT, SIZE, UPLINKS

from lightning_lbgm import ATOMO, DIANA, QSGD, Cast, ErrorFeedback, LookBack, PowerSGD, Predict, RandK, SignSGD, TopK
from lightning_lbgm.compression import Context, RoundResult, as_chain
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.core.nested import map_leaves
from lightning_lbgm.payloads import Dense
from lightning_lbgm.protocol import Message, WireChannel
from lightning_lbgm.server.aggregation import WeightedMean
from lightning_lbgm.server.compression_error import CompressionError
from lightning_lbgm.server.median import CoordinateMedian

LARGE = Layout([(200, 300), 200, (64, 16, 3, 3), 64, (10, 200), 10])  # many blocks of threads
LARGE_UPLINKS = {
    "topk, sign": [TopK(0.03), SignSGD()],
    "sign": [SignSGD()],
    "qsgd": [QSGD(4)],
    "qsgd of 3 bits": [TopK(0.1), QSGD(3)],
    "randk": [RandK(0.05)],
    "cast": [Cast("float16")],
    "atomo": [ATOMO(2)],
    "atomo, unbiased": [ATOMO(2, "unbiased")],
    "powersgd": [PowerSGD(2)],
    "ef(diana)": [ErrorFeedback(DIANA([TopK(0.03), SignSGD()]))],
    "ef(rowwise, rank 4)": [ErrorFeedback(LookBack(0.7, rank=4, rowwise=True))],
    "ef(predict)": [ErrorFeedback(Predict(3, TopK(0.03)))],
    "bfloat16, rank 3 by layer": [LookBack(0.7, "layer", rank=3, dtype="bfloat16")],
}


def updates(size, rounds, seed=0):
    """Updates that keep a direction for four rounds; no two entries are equal, which devices may order as they like."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(rounds):
        if index % 4 == 0:
            direction = torch.randn(size, generator=generator)
        yield direction + 0.1 * (1 + index % 3) * torch.randn(size, generator=generator)


class End:
    """One run of an uplink: its chain, what a client and the server keep, and the round."""

    def __init__(self, uplink, layout, put):
        self.chain, self.layout, self.put = as_chain(uplink), layout, put
        self.state, self.shared = self.chain.init(), self.chain.init_shared()

    def context(self, index, client=CLIENT):
        return Context(index, self.shared, seed=0, path=(client,))

    def encode(self, update, index):
        return self.chain.encode(Dense(self.put(update), self.layout), self.state, self.context(index))

    def end_round(self, encoded, index):
        decoded, bits, dense = encoded.decoded.dense(), (encoded.payload.num_bits,), (32 * self.layout.size,)
        params = self.put(torch.linspace(1, 2, self.layout.size))
        result = RoundResult(self.layout, params, decoded, bits, dense, (encoded.decision,))
        self.chain.end_round(self.shared, result, self.context(index, -1))


@pytest.fixture
def drawn(monkeypatch):
    """The kinds of device whose random numbers were used."""
    kinds, original = set(), Context.generator

    def generator(context, device):
        kinds.add(device.type)
        return original(context, device)

    monkeypatch.setattr(Context, "generator", generator)
    return kinds


def check_uplink(uplink, layout, rounds, device, drawn):
    """Compare a client on the device with one on the CPU, and with what the server reads off its bytes."""
    here, there = End(uplink, layout, lambda tensor: tensor), End(uplink, layout, device.put)
    server_state = here.chain.init()
    largest = 0.0
    for index, update in enumerate(updates(layout.size, rounds)):
        server_context = Context(index, map_leaves(there.shared, _near), seed=0, path=(CLIENT,))
        encoded = there.encode(update, index)
        decoded = encoded.decoded.dense()
        assert device.holds(decoded)
        decoded = near(decoded)
        # What a server without the device makes of the bytes.
        data = Message(CLIENT, encoded.payload).to_bytes()
        received = Message.from_bytes(data, layout).payload
        assert 8 * len(received.to_bytes()) == encoded.payload.num_bits
        torch.testing.assert_close(
            here.chain.decode(received, server_state, server_context).dense(), decoded, rtol=1e-3, atol=1e-4
        )
        sums = device.put(torch.ones(layout.size))
        encoded.decoded.add_to(sums, -0.5)
        torch.testing.assert_close(near(sums), 1 - 0.5 * decoded, rtol=1e-3, atol=1e-4)
        for path, leaf in leaves(there.state):
            assert not isinstance(leaf, torch.Tensor) or device.holds(leaf), path
        # What the CPU makes of the update, unless the two draw different numbers.
        if device.torch.type == "cpu" or device.torch.type not in drawn:
            expected = here.encode(update, index)
            torch.testing.assert_close(decoded, expected.decoded.dense(), rtol=1e-3, atol=1e-4)
            largest = max(largest, float((decoded - expected.decoded.dense()).norm() / decoded.norm()))
            assert encoded.payload.num_bits == expected.payload.num_bits
            assert (encoded.decision is None) == (expected.decision is None)
            if expected.decision is not None:
                assert encoded.decision.recycled == expected.decision.recycled
                assert encoded.decision.errors == pytest.approx(expected.decision.errors, abs=1e-3)
            here.end_round(expected, index)
        there.end_round(encoded, index)
    return largest


def _near(leaf):
    return near(leaf) if isinstance(leaf, torch.Tensor) else leaf


@pytest.mark.parametrize("name", UPLINKS)
def test_an_uplink_is_the_same_on_the_device(device, name, drawn, record_property):
    largest = check_uplink(UPLINKS[name], LAYOUT, 6, device, drawn)
    record_property("relative distance to the CPU", largest)


@pytest.mark.parametrize("name", LARGE_UPLINKS)
def test_a_large_update_is_the_same_on_the_device(device, name, drawn, record_property):
    largest = check_uplink(LARGE_UPLINKS[name], LARGE, 3, device, drawn)
    record_property("relative distance to the CPU", largest)


@pytest.mark.parametrize("name", LARGE_UPLINKS)
def test_an_uplink_gives_the_same_twice_and_knows_deterministic_algorithms(real_device, name):
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            end = End(LARGE_UPLINKS[name], LARGE, real_device.put)
            encoded = [end.encode(update, index) for index, update in enumerate(updates(LARGE.size, 2))]
            runs.append([(one.payload.to_bytes(), near(one.decoded.dense())) for one in encoded])
    finally:
        torch.use_deterministic_algorithms(False)
    for (one, one_decoded), (two, two_decoded) in zip(*runs):
        assert one == two
        assert torch.equal(one_decoded, two_decoded)


@pytest.mark.parametrize("name", UPLINKS)
def test_what_is_read_off_the_wire_comes_to_the_device_of_the_sums(device, name):
    channel = WireChannel(UPLINKS[name], LAYOUT, {"running_mean": torch.zeros(2)})
    chain, state = channel.uplink, channel.init()
    shared = chain.init_shared()
    for index, update in enumerate(map(device.put, updates(SIZE, 5))):
        context = Context(index, shared, seed=0, path=(CLIENT,))
        buffers = {"running_mean": device.put(torch.ones(2))}
        received = channel.send(CLIENT, Dense(update, LAYOUT), buffers, context, state)
        assert device.holds(received.buffers["running_mean"])
        mean, errors = WeightedMean(), CompressionError(update)
        mean.begin(update, 1)
        mean.receive(received.update, 1.0)
        squared = errors.receive(update, received.update, 1.0)
        aggregated = mean.finish()
        assert errors.finish(aggregated, 1.0).norm == pytest.approx(squared**0.5, abs=1e-4)
        result = RoundResult(LAYOUT, update, aggregated, (received.bits,), (32 * SIZE,), (received.decision,))
        chain.end_round(shared, result, Context(index, shared, seed=0, path=(-1,)))


@pytest.mark.parametrize("memory", [2**28, 300])  # with 300 bytes the updates go to a file
def test_the_median_of_updates_on_the_device(device, memory):
    rows = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0))
    median = CoordinateMedian(memory)
    median.begin(device.put(torch.zeros(SIZE)), 5)
    for row in rows:
        median.receive(Dense(device.put(row)), 0.2)
    result = median.finish()
    assert device.holds(result)
    assert torch.equal(near(result), rows.median(0).values)
