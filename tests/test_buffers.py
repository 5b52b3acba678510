"""Buffers between server and clients: averaged, the server's, or each client's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lbgm.buffers import Buffers

# BatchNorm1d(1) starts at mean 0 and variance 1 and moves a tenth of the way to the batch's mean and unbiased variance.
# Client A: inputs 0, 2: mean 1, variance 2. So its buffers become 0.1 * 1 = 0.1 and 0.9 * 1 + 0.1 * 2 = 1.1.
# Client B: inputs 2, 6: mean 4, variance 8. So 0.4 and 1.7.
INPUTS_A, INPUTS_B = torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [6.0]])
WEIGHT_A, WEIGHT_B = 0.25, 0.75


def run_client(buffers, inputs, own=None):
    """One client's turn: the server's buffers (or its own), a step, and what changed, as a message would carry it."""
    buffers.load(own)
    buffers.module.train()
    buffers.module(inputs)
    return {name: buffer.clone() for name, buffer in buffers.changed().items()}


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
            assert module.num_batches_tracked.item() == 1  # the integer counter is the server's at each start
        buffers.finish_round(1.0)
        assert state(module) == {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    # Two steps each. A: 0.9 * 0.1 + 0.1 = 0.19, 0.9 * 1.1 + 0.2 = 1.19. B: 0.9 * 0.4 + 0.4 = 0.76, 1.53 + 0.8 = 2.33.
    assert as_floats(own["a"]) == approx(0.19, 1.19)
    assert as_floats(own["b"]) == approx(0.76, 2.33)


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


def test_only_persistent_float_buffers_are_sent():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    buffers.load()
    module.drift()
    changed = buffers.changed()
    assert {name: buffer.tolist() for name, buffer in changed.items()} == {
        "inner.center": [1.0, 1.0, 1.0],
        "scale": [2.0, 2.0],
    }
    assert changed["scale"].dtype == torch.float16
    buffers.receive(changed, 1.0)
    buffers.finish_round(1.0)
    assert module.inner.center.tolist() == [1.0, 1.0, 1.0]
    assert module.scale.tolist() == [2.0, 2.0]
    assert module.inner.cache.tolist() == [0.0, 0.0]
    assert module.steps.item() == 5
    assert module.seen.item() is False


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


def test_a_buffer_of_another_shape_is_not_sent():
    module = Mixed()
    buffers = Buffers(module, "average")
    buffers.begin_round()
    module.inner.center = torch.zeros(5)
    assert buffers.changed() == {}


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
    assert buffers.downlink_bits == expected


@pytest.mark.parametrize("mode", ["average", "server", "client"])
def test_a_module_without_buffers_has_nothing_to_do(mode):
    module = nn.Linear(2, 1)
    buffers = Buffers(module, mode)
    buffers.begin_round()
    buffers.load()
    assert buffers.changed() == {}
    assert buffers.downlink_bits == 0
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
