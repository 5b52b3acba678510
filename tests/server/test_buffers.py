"""Buffers between server and clients: averaged, the server's, or each client's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lbgm.server.buffers import Buffers

# BatchNorm1d(1) starts at mean 0 and variance 1 and moves a tenth of the way to the batch's mean and unbiased variance.
# Client A: inputs 0, 2: mean 1, variance 2. So its buffers become 0.1 * 1 = 0.1 and 0.9 * 1 + 0.1 * 2 = 1.1.
# Client B: inputs 2, 6: mean 4, variance 8. So 0.4 and 1.7.
INPUTS_A, INPUTS_B = torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [6.0]])
WEIGHT_A, WEIGHT_B = 0.25, 0.75
INF, NAN = float("inf"), float("nan")


def downlink_bits(buffers):
    return sum(8 * buffer.nbytes for buffer in buffers.downlink.values())


def run_client(buffers, inputs, own=None):
    """One client's turn: the server's buffers (or its own), a step, and what changed, as a message would carry it."""
    buffers.load(own)
    buffers.module.train()
    buffers.module(inputs)
    return {name: buffer.clone() for name, buffer in buffers.changed(own=own).items()}


def as_floats(tensors):
    return {name: tensor.item() for name, tensor in tensors.items()}


def approx(mean, variance):
    return {"running_mean": pytest.approx(mean), "running_var": pytest.approx(variance)}


def state(module):
    return as_floats(dict(module.named_buffers()))


def test_average_is_the_clients_buffers_averaged_with_their_weights():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "average")
    buffers.begin_round()
    from_a = run_client(buffers, INPUTS_A)
    buffers.receive(from_a, WEIGHT_A)
    from_b = run_client(buffers, INPUTS_B)
    buffers.receive(from_b, WEIGHT_B)
    assert as_floats(from_a) == approx(0.1, 1.1)
    assert as_floats(from_b) == approx(0.4, 1.7)  # from the server's 0 and 1, not from what A left
    buffers.finish_round(1.0)
    # 0.25 * 0.1 + 0.75 * 0.4 = 0.325; 0.25 * 1.1 + 0.75 * 1.7 = 1.55; the integer counter is the server's.
    assert state(module) == {**approx(0.325, 1.55), "num_batches_tracked": 0}

    # The next round starts from there: 0.9 * 0.325 + 0.1 = 0.3925; 0.9 * 1.55 + 0.2 = 1.595.
    buffers.begin_round()
    assert as_floats(run_client(buffers, INPUTS_A)) == approx(0.3925, 1.595)


def test_server_keeps_its_buffers_and_nothing_is_sent():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "server")
    buffers.begin_round()
    for inputs in (INPUTS_A, INPUTS_B):
        assert run_client(buffers, inputs) == {}
        assert module.running_mean.item() != 0.0
    buffers.finish_round(1.0)
    assert state(module) == {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}


def test_a_client_keeps_its_own_buffers_and_the_server_its_own():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "client")
    own = {"a": None, "b": None}
    for _ in range(2):
        buffers.begin_round()
        for client, inputs in (("a", INPUTS_A), ("b", INPUTS_B)):
            own[client] = run_client(buffers, inputs, own[client])
        buffers.finish_round(1.0)
        assert state(module) == {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    # Two steps each. A: 0.9 * 0.1 + 0.1 = 0.19, 0.9 * 1.1 + 0.2 = 1.19. B: 0.9 * 0.4 + 0.4 = 0.76, 1.53 + 0.8 = 2.33.
    assert as_floats(own["a"]) == {**approx(0.19, 1.19), "num_batches_tracked": 2}
    assert as_floats(own["b"]) == {**approx(0.76, 2.33), "num_batches_tracked": 2}


def test_the_weights_of_fewer_clients_are_renormalised():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.receive(run_client(buffers, INPUTS_A), WEIGHT_A)
    run_client(buffers, INPUTS_B)  # rejected: not received
    buffers.finish_round(WEIGHT_A)
    assert state(module) == {**approx(0.1, 1.1), "num_batches_tracked": 0}


def test_a_round_without_a_client_keeps_the_servers_buffers():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "average")
    buffers.begin_round()
    run_client(buffers, INPUTS_A)
    buffers.finish_round(0.0)
    assert state(module) == {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}


def test_a_client_that_changed_nothing_counts_with_the_servers_value():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.receive(run_client(buffers, INPUTS_A), WEIGHT_A)
    buffers.receive({}, WEIGHT_B)
    buffers.finish_round(1.0)
    # 0.25 * 0.1 + 0.75 * 0 and 0.25 * 1.1 + 0.75 * 1.
    assert state(module) == {**approx(0.025, 1.025), "num_batches_tracked": 0}


def test_rounds_do_not_leak_into_each_other():
    module = nn.BatchNorm1d(1)
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.receive(run_client(buffers, INPUTS_B), 1.0)
    buffers.load()  # the round is given up
    buffers.begin_round()
    buffers.receive(run_client(buffers, INPUTS_A), 1.0)
    buffers.finish_round(1.0)
    assert state(module) == {**approx(0.1, 1.1), "num_batches_tracked": 0}


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-100, 100), min_size=3, max_size=3), st.floats(0.01, 1)), min_size=1, max_size=6
    )
)
@settings(deadline=None, max_examples=50)
def test_the_average_is_the_weighted_mean(clients):
    module = nn.Module()
    module.register_buffer("center", torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    buffers = Buffers(module, "average")
    buffers.begin_round()
    for values, weight in clients:
        buffers.load()
        module.center.copy_(torch.tensor(values, dtype=torch.float64))
        buffers.receive(buffers.changed(), weight)
    values, weights = [c[0] for c in clients], [c[1] for c in clients]
    buffers.finish_round(sum(weights))
    assert module.center.numpy() == pytest.approx(np.average(values, axis=0, weights=weights), abs=1e-9)


class Mixed(nn.Module):
    """A buffer of each kind, two of them in a submodule."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("center", torch.zeros(3))
        self.inner.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("scale", torch.ones(2, dtype=torch.float16))
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("seen", torch.tensor(False))

    def drift(self):
        self.inner.center += 1
        self.inner.cache += 1
        self.scale *= 2
        self.steps += 1
        self.seen.fill_(True)


def test_float_buffers_are_sent_and_others_noted():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.load()
    module.drift()
    changed = buffers.changed()
    assert {name: buffer.tolist() for name, buffer in changed.items()} == {
        "inner.center": [1.0, 1.0, 1.0],
        "inner.cache": [1.0, 1.0],
        "scale": [2.0, 2.0],
    }
    assert changed["scale"].dtype == torch.float16
    buffers.receive(changed, 1.0)
    buffers.finish_round(1.0)
    assert module.inner.center.tolist() == [1.0, 1.0, 1.0]
    assert module.scale.tolist() == [2.0, 2.0]
    assert module.inner.cache.tolist() == [1.0, 1.0]
    assert module.steps.item() == 5
    assert module.seen.item() is False
    assert buffers.take_notes() == {"seen": "of dtype bool", "steps": "of dtype int64"}
    assert buffers.take_notes() == {}


@pytest.mark.parametrize("mode", ["average", "server", "client"])
def test_each_client_starts_from_the_servers_buffers_of_every_kind(mode):
    module = Mixed()
    buffers = Buffers(module, mode)
    buffers.begin_round()
    for _ in range(2):
        buffers.load()
        assert module.inner.center.tolist() == [0.0, 0.0, 0.0]
        assert module.inner.cache.tolist() == [0.0, 0.0]
        assert module.scale.tolist() == [1.0, 1.0]
        assert module.steps.item() == 5
        assert module.seen.item() is False
        module.drift()


def test_reading_copies_the_buffers_of_every_kind():
    module = Mixed()
    copies = Buffers(module, "average").read()
    module.drift()
    assert {name: copy.tolist() for name, copy in copies.items()} == {
        "inner.center": [0.0, 0.0, 0.0],
        "inner.cache": [0.0, 0.0],
        "scale": [1.0, 1.0],
        "steps": 5,
        "seen": False,
    }


def test_unchanged_buffers_are_not_sent():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.load()
    assert buffers.changed() == {}
    module.scale[1] = 7
    assert list(buffers.changed()) == ["scale"]
    module.scale[1] = 1  # and back again
    assert buffers.changed() == {}


def test_a_buffer_that_became_nan_is_sent_so_that_the_client_can_be_rejected():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    module.inner.center[0] = float("nan")
    assert list(buffers.changed()) == ["inner.center"]


@pytest.mark.parametrize("replacement", [torch.full((3,), 9.0), torch.full((4, 2), 9.0), None], ids=str)
def test_a_buffer_replaced_during_training_is_restored_for_the_next_client(replacement):
    module = Mixed()
    buffers = Buffers(module, "server")
    buffers.begin_round()
    buffers.load()
    module.inner.center = replacement
    module.steps = module.steps + 10
    buffers.load()
    assert module.inner.center.tolist() == [0.0, 0.0, 0.0]
    assert module.steps.item() == 5
    assert {"inner.center", "steps"} <= dict(module.named_buffers()).keys()
    module.inner.center.fill_(4.0)  # nor is the restored tensor the server's own copy
    buffers.finish_round(1.0)
    assert module.inner.center.tolist() == [0.0, 0.0, 0.0]


def test_a_replaced_buffer_of_the_same_shape_is_averaged():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.load()
    module.inner.center = torch.tensor([4.0, 0.0, 8.0])
    buffers.receive(buffers.changed(), 0.5)
    buffers.load()
    buffers.receive(buffers.changed(), 0.5)
    buffers.finish_round(1.0)
    assert module.inner.center.tolist() == [2.0, 0.0, 4.0]


def test_a_resized_buffer_is_averaged_if_all_have_the_same_shape():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    for values, weight in (([1.0, 2.0], 0.25), ([5.0, 6.0], 0.75)):
        buffers.load()
        assert module.inner.center.tolist() == [0.0, 0.0, 0.0]
        module.inner.center = torch.tensor(values)
        buffers.receive(buffers.changed(), weight)
    buffers.finish_round(1.0)
    assert module.inner.center.tolist() == [4.0, 5.0]  # 0.25 * 1 + 0.75 * 5, 0.25 * 2 + 0.75 * 6
    buffers.begin_round()
    buffers.load()
    assert module.inner.center.tolist() == [4.0, 5.0]


def test_buffers_of_different_shapes_stay_the_servers_and_are_noted():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    for size in (2, 5):
        buffers.load()
        module.inner.center = torch.ones(size)
        buffers.receive(buffers.changed(), 0.5)
    buffers.finish_round(1.0)
    assert module.inner.center.tolist() == [0.0, 0.0, 0.0]
    assert buffers.take_notes() == {"inner.center": "of different shapes at different clients"}


class Making(nn.Module):
    """Makes one buffer that is announced, and one that is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("announced", None)

    def make(self, value):
        assert self.announced is None
        assert not hasattr(self, "sudden")
        self.announced = torch.tensor([value])
        self.register_buffer("sudden", torch.tensor([10 * value], dtype=torch.float16), persistent=False)


@pytest.mark.parametrize("undone", [False, True])
def test_buffers_made_in_training_are_averaged_and_no_client_sees_anothers(undone):
    module = Making()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    for value, weight in ((1.0, 0.25), (3.0, 0.75)):
        buffers.load()
        module.make(value)
        buffers.receive({name: b.clone() for name, b in buffers.changed().items()}, weight)
    buffers.finish_round(1.0)
    assert state(module) == {"announced": 2.5, "sudden": 25.0}
    assert module.sudden.dtype == torch.float16
    assert downlink_bits(buffers) == 32 + 16
    if undone:
        buffers.undo()
        assert state(module) == {}
        assert module.announced is None
        assert not hasattr(module, "sudden")
        assert downlink_bits(buffers) == 0


def test_a_made_buffer_of_a_client_is_its_own_in_client_mode():
    module = Making()
    buffers = Buffers(module, "client")
    buffers.begin_round()
    own = {}
    for client, value in (("a", 1.0), ("b", 3.0)):
        buffers.load()
        module.make(value)
        own[client] = {name: buffer.clone() for name, buffer in buffers.changed().items()}
    buffers.finish_round(1.0)
    assert state(module) == {}
    buffers.begin_round()
    for client, value in (("b", 3.0), ("a", 1.0)):
        buffers.load(own[client])
        assert state(module) == {"announced": value, "sudden": 10 * value}
    buffers.finish_round(1.0)
    assert state(module) == {}


class WithEncoder(nn.Module):
    """A momentum encoder beside a trainable weight, updated in three ways that are in use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([4.0]))
        self.encoder = nn.Parameter(torch.tensor([2.0]), requires_grad=False)

    def move(self, way):
        with torch.no_grad():
            if way == "in place":
                self.encoder.mul_(0.5).add_(self.weight, alpha=0.5)
            elif way == "data in place":
                self.encoder.data.mul_(0.5).add_(self.weight.data, alpha=0.5)
            else:
                self.encoder.data = 0.5 * self.encoder.data + 0.5 * self.weight.data


@pytest.mark.parametrize("way", ["in place", "data in place", "data"])
@pytest.mark.parametrize("mode", ["average", "server", "client"])
def test_frozen_parameters_that_a_step_changes_are_the_clients_for_its_turn(mode, way):
    module = WithEncoder()
    encoder = module.encoder
    buffers = Buffers(module, mode)
    buffers.begin_round()
    own = []
    for weight in (4.0, 8.0):
        buffers.load()
        assert module.encoder.item() == 2.0
        with torch.no_grad():
            module.weight.fill_(weight)
        module.move(way)
        changed = {name: tensor.clone() for name, tensor in buffers.changed().items()}
        own.append(changed)
        if mode == "average":
            buffers.receive(changed, 0.5)
    buffers.finish_round(1.0)
    # Half of 2 and half of the weight: 3 and 5.
    assert [as_floats(changed) for changed in own] == (
        [{}, {}] if mode == "server" else [{"encoder": 3.0}, {"encoder": 5.0}]
    )
    assert module.encoder.item() == (4.0 if mode == "average" else 2.0)
    assert module.encoder is encoder
    assert downlink_bits(buffers) == (32 if mode == "average" else 0)
    if mode == "client":
        buffers.load(own[1])
        assert module.encoder.item() == 5.0


def test_a_frozen_parameter_that_shares_a_trainable_ones_storage_gets_its_own_again():
    module = WithEncoder()
    buffers = Buffers(module, "server")
    buffers.begin_round()
    buffers.load()
    module.encoder.data = module.weight.data
    buffers.load()
    assert (module.weight.item(), module.encoder.item()) == (4.0, 2.0)
    module.weight.data = module.encoder.data  # the other way round
    buffers.load()
    with torch.no_grad():
        module.weight.fill_(7.0)
    assert module.encoder.item() == 2.0


@pytest.mark.parametrize(
    ("server", "clients", "mean"),
    [
        ([INF, 1.0], [[2.0, 3.0], [4.0, 5.0]], [3.5, 4.5]),  # 0.25 * 2 + 0.75 * 4, 0.25 * 3 + 0.75 * 5
        ([INF, 1.0], [[2.0, 3.0], [INF, 5.0]], [INF, 4.5]),
        ([-INF, 1.0], [[-2.0, 1.0], [-6.0, 1.0]], [-5.0, 1.0]),
        ([INF, 1.0], [[2.0, 3.0]], [INF, 1.5]),  # the other client, of weight 0.75, has the server's
    ],
)
def test_a_buffer_that_starts_at_infinity_is_averaged(server, clients, mean):
    module = nn.Module()
    module.register_buffer("range", torch.tensor(server))
    buffers = Buffers(module, "average")
    buffers.begin_round()
    for values, weight in zip(clients, (0.25, 0.75)):
        sent = {"range": torch.tensor(values)}
        assert buffers.is_sound(sent)
        buffers.receive(sent, weight)
    buffers.finish_round(1.0)
    assert module.range.tolist() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("server", "client", "sound"),
    [
        ([1.0, INF], [2.0, INF], True),
        ([1.0, INF], [INF, INF], False),  # infinite from a finite one
        ([1.0, INF], [1.0, NAN], False),
        ([1.0, NAN], [2.0, NAN], True),
        (None, [2.0, -INF], True),  # a mask that is made
        (None, [2.0, NAN], False),
    ],
)
def test_soundness_of_what_a_client_holds(server, client, sound):
    module = nn.Module()
    module.register_buffer("b", None if server is None else torch.tensor(server))
    buffers = Buffers(module, "average")
    buffers.begin_round()
    assert buffers.is_sound({"b": torch.tensor(client)}) is sound


@pytest.mark.parametrize("names", [("mean",), ("mean", "made")])
def test_two_processes_come_to_the_same_as_one(names):
    def make():
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(1))
        module.register_buffer("mean", torch.tensor([1.0, 2.0]))
        buffers = Buffers(module, "average")
        buffers.begin_round()
        return buffers

    values = {"mean": ([3.0, 4.0], [5.0, 8.0]), "made": ([1.0], [3.0])}
    sent = [{name: torch.tensor(values[name][client]) for name in names} for client in (0, 1)]
    one, ranks = make(), [make(), make()]
    for client, weight in ((0, 0.25), (1, 0.75)):
        one.receive(sent[client], weight)
        ranks[client].receive(sent[client], weight)
    parts = [rank.received for rank in ranks]
    flats = []
    for rank in ranks:
        rank.combine(parts, lambda tensor: flats.append(tensor.clone()))
    total = flats[0] + flats[1]
    results = []
    for rank in [make(), make()]:
        index = len(results)
        rank.receive(sent[index], (0.25, 0.75)[index])
        rank.combine(parts, lambda tensor: tensor.copy_(total))
        rank.finish_round(1.0)
        results.append({name: b.tolist() for name, b in rank.module.named_buffers()})
    one.finish_round(1.0)
    expected = {name: b.tolist() for name, b in one.module.named_buffers()}
    assert results == [expected, expected]
    assert expected["mean"] == [4.5, 7.0]  # 0.25 * 3 + 0.75 * 5, 0.25 * 4 + 0.75 * 8
    assert "made" not in names or expected["made"] == [2.5]


def test_what_was_averaged_and_is_in_no_checkpoint_of_the_module_is_kept_by_the_federations():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.load()
    module.drift()
    buffers.receive(buffers.changed(), 1.0)
    buffers.finish_round(1.0)
    kept = buffers.state_dict()
    fresh = Mixed()
    fresh.load_state_dict(module.state_dict())
    assert fresh.inner.cache.tolist() == [0.0, 0.0]
    restored = Buffers(fresh, "average")
    restored.load_state_dict(kept)
    assert fresh.inner.cache.tolist() == [1.0, 1.0]
    assert downlink_bits(restored) == downlink_bits(buffers) == 96 + 32 + 64


def test_buffers_left_out_of_the_checkpoint_by_the_user_are_still_sent():
    class Slim(nn.BatchNorm1d):
        def state_dict(self, *args, **kwargs):
            return {}

    buffers = Buffers(Slim(1), "average")
    buffers.begin_round()
    assert as_floats(run_client(buffers, INPUTS_A)) == approx(0.1, 1.1)


@pytest.mark.parametrize(("mode", "expected"), [("average", 128), ("server", 128), ("client", 0)])
def test_the_downlink_is_the_persistent_float_buffers(mode, expected):
    # inner.center: 3 of 32 bits; scale: 2 of 16. A client's own buffers are not sent.
    buffers = Buffers(Mixed(), mode)
    buffers.begin_round()
    assert downlink_bits(buffers) == expected


@pytest.mark.parametrize("mode", ["average", "server", "client"])
def test_a_module_without_buffers_has_nothing_to_do(mode):
    module = nn.Linear(2, 1)
    buffers = Buffers(module, mode)
    buffers.begin_round()
    buffers.load()
    assert buffers.changed() == {}
    assert downlink_bits(buffers) == 0
    buffers.receive({}, 1.0)
    buffers.finish_round(1.0)
    assert dict(module.named_buffers()) == {}


def test_a_buffer_replaced_by_an_alias_of_a_parameter_leaves_the_parameter_alone():
    module = nn.Linear(2, 1, bias=False)
    module.register_buffer("shadow", torch.zeros(1, 2))
    buffers = Buffers(module, "average")
    buffers.begin_round()
    module.shadow = module.weight.data
    weight = module.weight.detach().clone()
    buffers.load()
    assert torch.equal(module.weight, weight)
    assert module.shadow.tolist() == [[0.0, 0.0]]
