"""The trainable parameters of a module as one vector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lbgm.core.flat import FlatParameters


def net(dtype=torch.float32):
    """Weights (2, 3) and (1, 2), one bias (2,): 6 + 2 + 2 = 10 numbers."""
    return nn.Sequential(nn.Linear(3, 2, dtype=dtype), nn.ReLU(), nn.Linear(2, 1, bias=False, dtype=dtype))


class Tied(nn.Module):
    """A decoder that shares the encoder's weight; its own bias is the only other parameter."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2, bias=False)
        self.decoder = nn.Linear(2, 2)
        self.decoder.weight = self.encoder.weight


class Parameters(nn.Module):
    """A module of given tensors."""

    def __init__(self, *tensors):
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])


def test_sizes_names_and_order_are_the_modules():
    module = net()
    flat = FlatParameters(module)
    assert flat.sizes == (6, 2, 2)
    assert flat.num_parameters == 10
    assert flat.names == ("0.weight", "0.bias", "2.weight")
    assert flat.device == torch.device("cpu")
    expected = [*module[0].weight.flatten().tolist(), *module[0].bias.tolist(), *module[2].weight.flatten().tolist()]
    assert flat.read().tolist() == expected


def test_the_vector_is_float32_and_carries_no_gradient():
    flat = FlatParameters(net())
    assert flat.read().dtype == flat.empty().dtype == torch.float32
    assert flat.empty().shape == (10,)
    assert not flat.read().requires_grad


@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=10, max_size=10))
@settings(deadline=None, max_examples=50)
def test_what_is_written_is_read_back(values):
    module = net()
    flat = FlatParameters(module)
    flat.write(torch.tensor(values))
    assert flat.read().tolist() == values
    assert module[0].weight.flatten().tolist() == values[:6]
    assert module[0].bias.tolist() == values[6:8]
    assert module[2].weight.tolist() == [values[8:]]


def test_write_is_in_place_and_copies():
    module = net()
    flat = FlatParameters(module)
    before = [(p, p.data_ptr()) for p in module.parameters()]
    vector = torch.arange(10.0)
    flat.write(vector)
    assert all(p is old and p.data_ptr() == pointer for p, (old, pointer) in zip(module.parameters(), before))
    vector.fill_(99.0)
    assert flat.read().tolist() == list(range(10))
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in module.parameters())


def test_read_copies_into_the_given_vector():
    module = net()
    flat = FlatParameters(module)
    out = flat.empty()
    assert flat.read(out) is out
    assert torch.equal(out, flat.read())
    out.fill_(99.0)
    assert not (flat.read() == 99.0).any()


def test_views_share_the_vectors_memory_in_the_parameters_shapes():
    flat = FlatParameters(net())
    vector = torch.arange(10.0)
    views = flat.views(vector)
    assert [tuple(view.shape) for view in views] == [(2, 3), (2,), (1, 2)]
    assert views[0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    views[2][0, 1] = -1.0
    assert vector.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -1.0]


def test_any_number_of_vectors_may_take_turns():
    flat = FlatParameters(net())
    kept = [torch.full((10,), float(i)) for i in range(7)]
    for _ in range(2):
        for vector in kept:
            vector += 100
            flat.write(vector)
            assert torch.equal(flat.read(), vector)
            temporary = torch.arange(10.0) - vector  # its memory may be that of the one before
            flat.write(temporary)
            assert torch.equal(flat.read(flat.empty()), temporary)
            assert torch.equal(flat.update_from(vector, flat.empty()), vector - temporary)
            del temporary


def test_frozen_parameters_take_no_part():
    module = net()
    module[0].weight.requires_grad_(False)
    frozen = module[0].weight.detach().clone()
    flat = FlatParameters(module)
    assert flat.sizes == (2, 2)
    assert flat.names == ("0.bias", "2.weight")
    flat.write(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(module[0].weight, frozen)
    assert module[2].weight.tolist() == [[3.0, 4.0]]


def test_buffers_take_no_part():
    assert FlatParameters(nn.BatchNorm1d(4)).sizes == (4, 4)


def test_tied_parameters_count_once_and_stay_tied():
    module = Tied()
    flat = FlatParameters(module)
    assert flat.sizes == (4, 2)
    flat.write(torch.arange(6.0))
    assert module.decoder.weight is module.encoder.weight
    assert module.decoder.weight.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert module.decoder.bias.tolist() == [4.0, 5.0]


def test_scalar_and_empty_parameters_have_their_place():
    module = Parameters(torch.tensor(1.5), torch.empty(0, 3), torch.tensor([[2.0]]))
    flat = FlatParameters(module)
    assert flat.sizes == (1, 0, 1)
    assert flat.read().tolist() == [1.5, 2.0]
    flat.write(torch.tensor([7.0, 8.0]))
    assert [p.tolist() for p in module.parameters()] == [7.0, [], [[8.0]]]
    out = flat.update_from(torch.tensor([10.0, 10.0]), flat.empty())
    assert out.tolist() == [3.0, 2.0]


# Precision


def test_a_float64_module_keeps_its_precision():
    module = net(torch.float64)
    flat = FlatParameters(module)
    assert flat.dtype == flat.read().dtype == torch.float64
    values = torch.full((10,), 1.0 + 2.0**-40, dtype=torch.float64)  # rounds to 1 in float32
    flat.write(values)
    assert torch.equal(flat.read(), values)
    assert flat.update_from(values + 2.0**-41, flat.empty()).tolist() == [2.0**-41] * 10


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_half_precision_module_is_seen_in_float32_and_rounded_when_written(dtype, digits):
    module = net(dtype)
    flat = FlatParameters(module)
    assert flat.dtype == torch.float32
    expected = torch.cat([p.detach().float().flatten() for p in module.parameters()])
    assert torch.equal(flat.read(), expected)
    # With a significand of `digits` bits, 1 + 2^-digits lies half way to the next number: it rounds to even, 1.
    server = torch.full((10,), 1.0 + 2.0**-digits)
    flat.write(server)
    assert all(p.dtype == dtype for p in module.parameters())
    assert flat.read().tolist() == [1.0] * 10
    # The update is the difference in float32, of what the client really has.
    assert flat.update_from(server, flat.empty()).tolist() == [2.0**-digits] * 10


def test_a_mixed_module_is_seen_in_its_widest_precision():
    module = Parameters(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2.0**-40], dtype=torch.float64))
    flat = FlatParameters(module)
    assert flat.dtype == torch.float64
    assert flat.read().tolist() == [1.0, 1.0 + 2.0**-40]
    flat.write(torch.tensor([3.0, 5.0], dtype=torch.float64))
    assert [p.dtype for p in module.parameters()] == [torch.bfloat16, torch.float64]
    assert flat.update_from(torch.tensor([4.5, 5.0], dtype=torch.float64), flat.empty()).tolist() == [1.5, 0.0]


# The update


def test_the_update_is_server_minus_local():
    module = Parameters(torch.tensor([[1.0, 2.0]]), torch.tensor([5.0]))
    flat = FlatParameters(module)
    server, out = torch.tensor([4.0, 1.0, 5.0]), flat.empty()
    assert flat.update_from(server, out) is out
    assert out.tolist() == [3.0, -1.0, 0.0]
    assert server.tolist() == [4.0, 1.0, 5.0]
    assert flat.read().tolist() == [1.0, 2.0, 5.0]
    assert not out.requires_grad


def test_the_update_of_plain_sgd_is_the_learning_rate_times_the_sum_of_gradients():
    torch.manual_seed(0)
    module, inputs = net(torch.float64), torch.randn(8, 3, dtype=torch.float64)
    flat = FlatParameters(module)
    optimizer, server = torch.optim.SGD(module.parameters(), lr=0.125), flat.read()
    total = torch.zeros(10, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        total += torch.cat([p.grad.flatten() for p in module.parameters()])
        optimizer.step()
    assert total.abs().max() > 0
    torch.testing.assert_close(flat.update_from(server, flat.empty()), 0.125 * total, rtol=1e-12, atol=1e-14)


# Memory formats


def test_transposed_parameters_are_read_in_logical_order_and_keep_their_strides():
    module = Parameters(torch.arange(6.0).view(2, 3).t())  # rows (0, 3), (1, 4), (2, 5)
    (parameter,) = module.parameters()
    assert not parameter.is_contiguous()
    flat = FlatParameters(module)
    assert flat.read().tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    strides = parameter.stride()
    flat.write(torch.arange(6.0))
    assert parameter.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert parameter.stride() == strides
    assert flat.update_from(10 * torch.arange(6.0), flat.empty()).tolist() == [0.0, 9.0, 18.0, 27.0, 36.0, 45.0]


def test_channels_last_parameters_are_read_in_logical_order_and_keep_their_format():
    plain = nn.Conv2d(3, 4, 2)
    module = nn.Conv2d(3, 4, 2)
    module.load_state_dict(plain.state_dict())
    module = module.to(memory_format=torch.channels_last)
    assert not module.weight.is_contiguous()
    one, other = FlatParameters(plain), FlatParameters(module)
    assert torch.equal(other.read(), one.read())
    vector = torch.arange(52.0)  # 4 * 3 * 2 * 2 + 4
    one.write(vector)
    other.write(vector)
    assert torch.equal(module.weight, plain.weight)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(other.update_from(vector + 1, other.empty()), torch.ones(52))
    assert torch.equal(other.update_from(3 * vector, other.empty()), 2 * vector)


# Staying current


def test_a_view_is_current_while_the_trainable_parameters_are_the_same_objects():
    module = net()
    flat = FlatParameters(module)
    assert flat.is_current(module)
    flat.write(torch.zeros(10))
    assert flat.is_current(module)
    assert not flat.is_current(net())


@pytest.mark.parametrize("change", ["freeze", "replace", "add", "swap"])
def test_a_view_is_out_of_date_once_the_trainable_parameters_change(change):
    module = net()
    flat = FlatParameters(module)
    if change == "freeze":
        module[0].bias.requires_grad_(False)
    elif change == "replace":
        module[0].bias = nn.Parameter(module[0].bias.detach().clone())
    elif change == "add":
        module.append(nn.Linear(1, 1))
    else:
        module[0], module[2] = module[2], module[0]
    assert not flat.is_current(module)


def test_unfreezing_a_parameter_makes_a_view_out_of_date():
    module = net()
    module[2].weight.requires_grad_(False)
    flat = FlatParameters(module)
    assert flat.is_current(module)
    module[2].weight.requires_grad_(True)
    assert not flat.is_current(module)


# What is refused


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_module_without_a_trainable_parameter_is_refused(module):
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatParameters(module)


def test_an_uninitialised_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'1\.weight' is not initialised"):
        FlatParameters(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_a_lazy_module_is_accepted_after_a_forward_pass():
    module = nn.LazyLinear(3)
    module(torch.zeros(1, 2))
    assert FlatParameters(module).sizes == (6, 3)


def test_a_complex_parameter_is_refused_by_name_and_dtype():
    with pytest.raises(ValueError, match=r"'list\.1' is complex \(torch\.complex64\)"):
        FlatParameters(Parameters(torch.zeros(2), torch.zeros(2, dtype=torch.complex64)))


def test_parameters_on_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"\['cpu', 'meta'\]"):
        FlatParameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


def test_what_is_frozen_may_be_complex_or_elsewhere():
    backbone = nn.Linear(2, 2, device="meta").requires_grad_(False)
    scale = Parameters(torch.zeros(2, dtype=torch.complex64)).requires_grad_(False)
    assert FlatParameters(nn.Sequential(backbone, scale, nn.Linear(2, 1))).sizes == (2, 1)


@pytest.mark.parametrize("length", [0, 9, 11])
def test_a_vector_of_another_length_is_refused_and_nothing_is_written(length):
    module = net()
    flat = FlatParameters(module)
    before = flat.read()
    with pytest.raises(RuntimeError, match="split"):
        flat.write(torch.zeros(length))
    assert torch.equal(flat.read(), before)
    with pytest.raises(RuntimeError, match="split"):
        flat.read(torch.zeros(length))
