"""A client's local steps: a fresh optimizer for each, and the loss weighted by batch size."""

import pytest
import torch
from torch import nn

from lightning_lbgm.clients import LocalLoop, LocalResult
from lightning_lbgm.data import LocalBatch
from lightning_lbgm.strategy.log_capture import LogCapture


def do_nothing(batch, index):
    return None


def make_optimizer(lr=0.1):
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)


def make_loop(step=do_nothing, optimizer=None, capture=None):
    return LocalLoop(optimizer or make_optimizer(), step, capture or LogCapture())


def losses_of(batch, index):
    """A step whose loss is the batch itself."""
    return None if batch is None else torch.tensor(batch)


def test_each_batch_is_one_step_with_its_index_and_its_size_told_to_the_capture():
    capture, seen = LogCapture(), []

    def step(batch, index):
        seen.append((batch, index, capture.batch_size))

    result = make_loop(step, capture=capture).train([LocalBatch("a", 3), LocalBatch("b", 1)])
    assert seen == [("a", 0, 3), ("b", 1, 1)]
    assert result.num_steps == 2


def test_the_index_starts_again_for_each_client():
    indices = []
    local_loop = make_loop(lambda batch, index: indices.append(index))
    local_loop.train([LocalBatch(None, 1)] * 2)
    local_loop.train([LocalBatch(None, 1)] * 3)
    assert indices == [0, 1, 0, 1, 2]


def test_the_loss_is_weighted_by_batch_size():
    result = make_loop(losses_of).train([LocalBatch(1.0, 2), LocalBatch(4.0, 4), LocalBatch(-3.0, 1)])
    assert result.num_steps == 3
    assert result.num_examples == 7
    assert result.loss_sum.item() == 15.0  # 2 * 1 + 4 * 4 - 3


def test_a_step_without_a_loss_is_a_step_but_has_no_weight():
    result = make_loop(losses_of).train([LocalBatch(None, 50), LocalBatch(2.0, 3), LocalBatch(None, 50)])
    assert result.num_steps == 3
    assert result.num_examples == 3
    assert result.loss_sum.item() == 6.0


def test_no_loss_at_all_is_none():
    assert make_loop(losses_of).train([LocalBatch(None, 5)]) == LocalResult(1, 0, None)
    assert make_loop(losses_of).train([]) == LocalResult(0, 0, None)


def test_results_of_clients_are_apart():
    local_loop = make_loop(losses_of)
    first = local_loop.train([LocalBatch(1.0, 2)])
    second = local_loop.train([LocalBatch(5.0, 1)])
    assert (first.loss_sum.item(), first.num_examples) == (2.0, 2)
    assert (second.loss_sum.item(), second.num_examples) == (5.0, 1)


def test_the_loss_sum_is_detached_and_the_losses_are_left_alone():
    weight, losses = torch.tensor(1.0, requires_grad=True), []

    def step(batch, index):
        losses.append(weight * batch)
        return losses[-1]

    result = make_loop(step).train([LocalBatch(2.0, 1), LocalBatch(3.0, 1)])
    assert not result.loss_sum.requires_grad
    assert result.loss_sum.item() == 5.0
    assert [loss.item() for loss in losses] == [2.0, 3.0]


def test_batches_are_drawn_one_step_at_a_time():
    events = []

    def batches():
        for k in range(2):
            events.append(f"draw {k}")
            yield LocalBatch(k, 1)

    make_loop(lambda batch, index: events.append(f"step {batch}")).train(batches())
    assert events == ["draw 0", "step 0", "draw 1", "step 1"]


OPTIMIZERS = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.05, momentum=0.5),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_client_trains_as_with_an_optimizer_of_its_own(make):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 4, 3, generator=generator)  # two clients, four steps, three features
    start = torch.randn(3, generator=generator)

    def loop(parameter, optimizer, inputs):
        def step(batch, index):
            optimizer.zero_grad()
            loss = (parameter @ batch - 1) ** 2
            loss.backward()
            optimizer.step()
            return loss

        return step if inputs is None else [step(batch, 0) for batch in inputs]

    expected = []
    for inputs in data:
        own = nn.Parameter(start.clone())
        loop(own, make([own]), inputs)
        expected.append(own.detach())

    shared = nn.Parameter(start.clone())
    optimizer = make([shared])
    local_loop = LocalLoop(optimizer, loop(shared, optimizer, None), LogCapture())
    for inputs, result in zip(data, expected):
        with torch.no_grad():
            shared.copy_(start)
        local_loop.train([LocalBatch(batch, 1) for batch in inputs])
        assert torch.equal(shared, result)


def test_reset_leaves_no_state():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])

    def step(batch, index):
        parameter.grad = torch.ones(2)
        optimizer.step()

    local_loop = LocalLoop(optimizer, step, LogCapture())
    local_loop.train([LocalBatch(None, 1)])
    assert optimizer.state[parameter]["step"] == 1
    local_loop.reset_optimizer()
    assert len(optimizer.state) == 0
    assert optimizer.param_groups[0]["params"][0] is parameter


def test_hyperparameters_changed_within_a_client_are_restored_for_the_next():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 3.0}], lr=8.0, momentum=0.9)
    seen = []

    def step(batch, index):
        seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        for group in optimizer.param_groups:  # what a schedule over local steps does
            group["lr"] /= 2
            group["momentum"] = 0.0

    local_loop = make_loop(step, optimizer)
    for _ in range(2):
        local_loop.train([LocalBatch(None, 1)] * 2)
    one_client = [[(8.0, 0.9), (3.0, 0.9)], [(4.0, 0.0), (1.5, 0.0)]]
    assert seen == 2 * one_client
    local_loop.reset_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [8.0, 3.0]


def test_a_schedule_over_rounds_stays_in_force():
    optimizer = make_optimizer(lr=16.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    seen = []

    def step(batch, index):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = 99.0
        optimizer.step()

    for _ in range(3):
        local_loop = make_loop(step, optimizer)  # a round
        for _ in range(2):
            local_loop.train([LocalBatch(None, 1)])
        local_loop.reset_optimizer()
        schedule.step()
    assert seen == [16.0, 16.0, 8.0, 8.0, 4.0, 4.0]
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_losses_in_half_precision_are_summed_in_float32():
    # In bfloat16 a sum of 600 x 32 stops growing long before 19200.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    local_loop = LocalLoop(optimizer, lambda data, index: torch.ones((), dtype=torch.bfloat16), LogCapture())
    result = local_loop.train([LocalBatch(None, 32)] * 600)
    assert float(result.loss_sum) / result.num_examples == 1.0


def test_a_learning_rate_held_as_a_tensor_is_restored():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=torch.tensor(0.1))

    def step(data, index):
        optimizer.param_groups[0]["lr"].mul_(0.5)

    local_loop = LocalLoop(optimizer, step, LogCapture())
    for _ in range(2):
        local_loop.train([LocalBatch(None, 1)])
    local_loop.reset_optimizer()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
