"""The server: the weighted mean of what arrives, and the step along it."""

import functools
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lbgm.compression import Signs
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Combination
from lightning_lbgm.payloads.sparse import Sparse
from lightning_lbgm.server.server import Server

ADAM = functools.partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.95), eps=1e-3)


class Model(nn.Module):
    """Two tensors of 2 and 1 numbers."""

    def __init__(self, *values, dtype=torch.float32):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([values[:2]], dtype=dtype))
        self.b = nn.Parameter(torch.tensor(values[2:], dtype=dtype))


def serve(*values, make_optimizer=None, dtype=torch.float32):
    module = Model(*values, dtype=dtype)
    flat = FlatParameters(module)
    return flat, Server(flat, make_optimizer)


def receive(server, values, weight):
    server.receive(Dense(torch.tensor(values, dtype=server.server_params.dtype)), weight)


def play(server, rounds):
    """Rounds of one client each; return the norms."""
    norms = []
    for values in rounds:
        server.begin_round(1)
        receive(server, values, 1.0)
        norms.append(server.step())
    return norms


def random_rounds(seed, number):
    return np.random.default_rng(seed).normal(size=(number, 3)).tolist()


def test_the_step_follows_the_weighted_mean_of_two_clients():
    # 0.25 (4, 0, 8) + 0.75 (0, 8, 0) = (1, 6, 2): theta (1, 2, 3) becomes (0, -4, 1); the norm is sqrt(41).
    flat, server = serve(1.0, 2.0, 3.0)
    server.begin_round(2)
    receive(server, [4.0, 0.0, 8.0], 0.25)
    receive(server, [0.0, 8.0, 0.0], 0.75)
    assert server.total_weight == 1.0
    assert server.step() == pytest.approx(math.sqrt(41), rel=1e-6)
    assert flat.read().tolist() == [0.0, -4.0, 1.0]
    assert server.server_params.tolist() == [0.0, -4.0, 1.0]


def test_one_client_that_sends_theta_minus_its_own_parameters_hands_them_to_the_server():
    flat, server = serve(1.0, 2.0, 3.0)
    play(server, [[1.0 - 7.0, 2.0 - 8.0, 3.0 - 9.0]])
    assert flat.read().tolist() == [7.0, 8.0, 9.0]


def test_the_weights_renormalise_where_a_client_is_missing():
    # Only the client with weight 0.25 arrives: its update counts in full.
    flat, server = serve(1.0, 2.0, 3.0)
    server.begin_round(2)
    receive(server, [4.0, 0.0, 8.0], 0.25)
    assert server.total_weight == 0.25
    assert server.step() == pytest.approx(math.sqrt(80), rel=1e-6)
    assert flat.read().tolist() == [-3.0, 2.0, -5.0]


def test_the_weights_renormalise_among_those_that_remain():
    # Weights 0.5 and 0.25 of 1 become 2/3 and 1/3: (3, 0, 0) 2/3 + (0, 3, 0) / 3 = (2, 1, 0).
    flat, server = serve(0.0, 0.0, 0.0)
    server.begin_round(3)
    receive(server, [3.0, 0.0, 0.0], 0.5)
    receive(server, [0.0, 3.0, 0.0], 0.25)
    server.step()
    np.testing.assert_allclose(flat.read().numpy(), [-2.0, -1.0, 0.0], rtol=1e-6)


def test_the_mean_is_known_before_the_step_and_asking_for_it_changes_nothing():
    # Weights 0.5 and 0.25 of three clients become 2/3 and 1/3, however often the mean is asked for.
    flat, server = serve(1.0, 2.0, 3.0)
    server.begin_round(3)
    receive(server, [3.0, 0.0, 0.0], 0.5)
    receive(server, [0.0, 3.0, 6.0], 0.25)
    for _ in range(3):
        np.testing.assert_allclose(server.finish().numpy(), [2.0, 1.0, 2.0], rtol=1e-6)
        assert flat.read().tolist() == [1.0, 2.0, 3.0]
    assert server.step() == pytest.approx(3.0, rel=1e-6)
    np.testing.assert_allclose(flat.read().numpy(), [-1.0, 1.0, 1.0], rtol=1e-6)


def test_the_mean_of_a_complete_cohort_is_not_divided_by_weights_that_sum_to_1_up_to_round_off():
    weights = [0.1] * 10
    assert sum(weights) != 1.0
    _, server = serve(0.0, 0.0, 0.0)
    server.begin_round(10)
    expected = torch.zeros(3)
    for index, weight in enumerate(weights):
        values = torch.tensor([1.0, index, index**2])
        server.receive(Dense(values), weight)
        expected.add_(values, alpha=weight)
    assert torch.equal(server.finish(), expected)


@pytest.mark.parametrize("make_optimizer", [None, ADAM, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_without_an_update_the_parameters_and_the_optimizer_stay(make_optimizer):
    flat, server = serve(1.0, 2.0, 3.0, make_optimizer=make_optimizer)
    play(server, [[1.0, -1.0, 2.0]])
    before, moments = flat.read(), repr(server.state_dict())
    server.begin_round(4)
    flat.write(torch.full((3,), 99.0))  # what some client left behind
    assert server.total_weight == 0.0
    assert server.step() == 0.0
    assert torch.equal(flat.read(), before)
    assert repr(server.state_dict()) == moments


def test_each_round_starts_from_an_empty_sum():
    flat, server = serve(10.0, 10.0, 10.0)
    norms = play(server, [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert norms == [1.0, 2.0]
    assert flat.read().tolist() == [9.0, 8.0, 10.0]
    server.begin_round(1)
    receive(server, [5.0, 5.0, 5.0], 0.5)
    server.undo()
    assert play(server, [[0.0, 0.0, 3.0]]) == [3.0]
    assert flat.read().tolist() == [9.0, 8.0, 7.0]


def test_the_modules_parameters_are_read_again_each_round():
    flat, server = serve(1.0, 2.0, 3.0)
    play(server, [[1.0, 1.0, 1.0]])
    flat.write(torch.tensor([10.0, 20.0, 30.0]))  # as a callback may, between two rounds
    play(server, [[1.0, 1.0, 1.0]])
    assert flat.read().tolist() == [9.0, 19.0, 29.0]


def test_what_local_training_leaves_in_the_module_does_not_count():
    flat, server = serve(1.0, 2.0, 3.0)
    server.begin_round(1)
    flat.write(torch.full((3,), 99.0))
    receive(server, [1.0, 1.0, 1.0], 1.0)
    assert server.server_params.tolist() == [1.0, 2.0, 3.0]
    server.step()
    assert flat.read().tolist() == [0.0, 1.0, 2.0]


def test_an_aborted_round_gives_the_parameters_back():
    flat, server = serve(1.0, 2.0, 3.0)
    server.begin_round(1)
    receive(server, [1.0, 1.0, 1.0], 1.0)
    flat.write(torch.full((3,), 99.0))
    server.undo()
    assert flat.read().tolist() == [1.0, 2.0, 3.0]


def test_payloads_of_every_kind_are_averaged_as_they_decode():
    flat, server = serve(0.0, 0.0, 0.0, dtype=torch.float64)
    one = torch.tensor([5.0, -3.0], dtype=torch.float64)
    sparse = Sparse(one, torch.tensor([0, 2], dtype=torch.int32), (2, 1))  # (5, 0, -3)
    signs = Signs.pack(torch.tensor([-1.0, 1.0, 1.0]), torch.tensor(2.0, dtype=torch.float64), (2, 1))  # 2 (-1, 1, 1)
    blocks = Blocks([Dense(one), Combination([Dense(one[:1])], [2.0])])  # (5, -3, 10)
    combination = Combination([sparse, signs], [-2.0, 0.5])  # (-10, 0, 6) + (-1, 1, 1)
    server.begin_round(4)
    for payload, weight in [(sparse, 0.5), (signs, 0.3), (blocks, 0.1), (combination, 0.1)]:
        server.receive(payload, weight)
    server.step()
    mean = (
        0.5 * np.array([5, 0, -3])
        + 0.3 * np.array([-2, 2, 2])
        + 0.1 * np.array([5, -3, 10])
        + 0.1 * np.array([-11, 1, 7])
    )
    np.testing.assert_allclose(flat.read().numpy(), -mean, rtol=1e-12, atol=1e-12)


def test_receiving_does_not_write_to_the_update():
    _, server = serve(1.0, 2.0, 3.0)
    update = torch.tensor([4.0, 0.0, 8.0])
    server.begin_round(2)
    server.receive(Dense(update), 0.25)
    server.step()
    assert update.tolist() == [4.0, 0.0, 8.0]


def test_the_norm_holds_where_float32_squares_underflow():
    _, server = serve(1.0, 2.0, 3.0)
    assert play(server, [[3e-25, 0.0, 4e-25]])[0] == pytest.approx(5e-25, rel=1e-6)


# Server optimizers


def test_fedadam_follows_adam_written_by_hand():
    theta = np.array([1.0, 2.0, 3.0])
    flat, server = serve(*theta, make_optimizer=ADAM, dtype=torch.float64)
    m, v = np.zeros(3), np.zeros(3)
    rng = np.random.default_rng(0)
    for t in range(1, 9):
        updates, n = rng.normal(size=(3, 3)), rng.integers(1, 50, size=3)
        server.begin_round(3)
        for update, weight in zip(updates, n / n.sum()):
            receive(server, update.tolist(), float(weight))
        norm = server.step()
        g = (n[:, None] * updates).sum(0) / n.sum()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        theta = theta - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        np.testing.assert_allclose(flat.read().numpy(), theta, rtol=1e-10)
        assert norm == pytest.approx(float(np.sqrt((g**2).sum())), rel=1e-12)


def test_fedavgm_follows_momentum_written_by_hand():
    theta, momentum = np.array([1.0, 2.0, 3.0]), np.zeros(3)
    make_optimizer = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    flat, server = serve(*theta, make_optimizer=make_optimizer, dtype=torch.float64)
    for update in random_rounds(1, 6):
        play(server, [update])
        momentum = 0.9 * momentum + np.array(update)
        theta = theta - 0.5 * momentum
        np.testing.assert_allclose(flat.read().numpy(), theta, rtol=1e-12)


def test_the_optimizer_is_made_from_one_parameter_for_each_tensor():
    seen = []

    def make(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, lr=1.0)

    flat, server = serve(1.0, 2.0, 3.0, make_optimizer=make)
    assert all(isinstance(parameter, nn.Parameter) for parameter in seen)
    assert [tuple(parameter.shape) for parameter in seen] == [(1, 2), (1,)]
    assert [parameter.tolist() for parameter in seen] == [[[1.0, 2.0]], [3.0]]
    assert all(parameter is not own for parameter, own in zip(seen, flat.parameters))
    play(server, [[1.0, 1.0, 1.0]])
    assert [parameter.tolist() for parameter in seen] == [[[0.0, 1.0]], [2.0]]


@pytest.mark.parametrize("result", [None, "adam", nn.Linear(1, 1)])
def test_what_makes_no_optimizer_is_refused_by_name_and_value(result):
    with pytest.raises(TypeError, match="`server_optimizer`") as info:
        serve(1.0, 2.0, 3.0, make_optimizer=lambda parameters: result)
    assert repr(result) in str(info.value)


@pytest.mark.parametrize("make_optimizer", [None, ADAM, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_state_survives_a_file_and_continues_bit_for_bit(make_optimizer):
    rounds = random_rounds(2, 8)
    flat, server = serve(1.0, 2.0, 3.0, make_optimizer=make_optimizer)
    play(server, rounds[:4])
    file = io.BytesIO()
    torch.save({"server": server.state_dict(), "parameters": flat.read()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed_flat, resumed = serve(0.0, 0.0, 0.0, make_optimizer=make_optimizer)
    resumed_flat.write(saved["parameters"])
    resumed.load_state_dict(saved["server"])
    assert play(resumed, rounds[4:]) == play(server, rounds[4:])
    assert torch.equal(resumed_flat.read(), flat.read())


def test_without_its_state_adam_would_continue_differently():
    # The test above can fail: a fresh optimizer takes another way.
    rounds = random_rounds(2, 8)
    flat, server = serve(1.0, 2.0, 3.0, make_optimizer=ADAM)
    play(server, rounds[:4])
    fresh_flat, fresh = serve(*flat.read().tolist(), make_optimizer=ADAM)
    play(fresh, rounds[4:])
    play(server, rounds[4:])
    assert not torch.allclose(fresh_flat.read(), flat.read())


def test_frozen_parameters_stay_as_they_are():
    module = Model(1.0, 2.0, 3.0)
    module.a.requires_grad_(False)
    server = Server(FlatParameters(module))
    play(server, [[1.0]])
    assert module.a.tolist() == [[1.0, 2.0]]
    assert module.b.tolist() == [2.0]
