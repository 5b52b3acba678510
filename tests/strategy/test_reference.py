"""The whole of training against plain PyTorch, written out here."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import ErrorFeedback, LBGMFederated, LookBack, NaturalPartitioner, SignSGD, TopK


def reference_lbgm(dataset, owner, rounds, lr, threshold, granularity="model"):
    """Twenty lines of LBGM: full-batch clients, one local step, weights by examples. Returns (theta, decisions)."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    x, y = dataset.tensors
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    cuts = {"model": [theta.numel()], "layer": [p.numel() for p in net.parameters()]}[granularity]
    lbgs, history = {}, []
    for _ in range(rounds):
        total = torch.zeros_like(theta)
        for k in range(int(owner.max()) + 1):
            nn.utils.vector_to_parameters(theta.clone(), net.parameters())
            grads = torch.autograd.grad(
                nn.functional.cross_entropy(net(x[owner == k]), y[owner == k]), net.parameters()
            )
            update = lr * torch.cat([g.reshape(-1) for g in grads])
            sent = []
            for i, g in enumerate(update.split(cuts)):
                lbg = lbgs.get((k, i))
                error = 1.0 if lbg is None else float(1 - (g @ lbg) ** 2 / ((g @ g) * (lbg @ lbg)))
                if error <= threshold and lbg is not None:
                    sent.append((g @ lbg) / (lbg @ lbg) * lbg)
                else:
                    lbgs[k, i] = g
                    sent.append(g)
                history.append((sent[-1] is not g, error))
            total += float((owner == k).float().mean()) * torch.cat(sent)
        theta = theta - total
    return theta, history


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.6])
def test_lbgm_equals_a_plain_loop_decision_by_decision(fit, threshold, granularity):
    dataset = make_data(90)
    owner = torch.tensor([0] * 10 + [1] * 20 + [2] * 60)
    strategy = LBGMFederated(
        num_clients=3, partitioner=NaturalPartitioner(owner), uplink=[LookBack(threshold, granularity)]
    )
    recorder = Recorder()
    _, module = fit(strategy, dataset=dataset, max_epochs=25, callbacks=[recorder])
    theta, history = reference_lbgm(dataset, owner, 25, 0.3, threshold, granularity)
    recycled = [flag for r in recorder.reports for c in r.clients for flag in c.decision.recycled]
    errors = [error for r in recorder.reports for c in r.clients for error in c.decision.errors]
    assert recycled == [flag for flag, _ in history]
    assert 0 < sum(recycled) < len(recycled)  # both outcomes were seen
    np.testing.assert_allclose(errors, [error for _, error in history], atol=2e-4)
    torch.testing.assert_close(flat_params(module), theta, atol=1e-5, rtol=1e-4)


def test_two_clients_are_averaged_by_their_examples(fit):
    # One step of each client's full-batch gradient from the same start; weights 1/4 and 3/4 by hand.
    dataset = make_data(8)
    owner = [0, 0, 1, 1, 1, 1, 1, 1]
    strategy = LBGMFederated(num_clients=2, partitioner=NaturalPartitioner(owner), uplink=[])
    torch.manual_seed(0)
    module = TinyModule(lr=0.5)
    x, y = dataset.tensors
    begin = flat_params(module)
    gradients = []
    for part in (slice(0, 2), slice(2, 8)):
        grads = torch.autograd.grad(module.loss((x[part], y[part])), list(module.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in grads]))
    fit(strategy, module=module, dataset=dataset, max_epochs=1)
    expected = begin - 0.5 * (0.25 * gradients[0] + 0.75 * gradients[1])
    torch.testing.assert_close(flat_params(module), expected)


def test_uniform_weighting_ignores_the_number_of_examples(fit):
    dataset = make_data(8)
    partitioner = NaturalPartitioner([0, 0, 1, 1, 1, 1, 1, 1])
    torch.manual_seed(0)
    module = TinyModule(lr=0.5)
    x, y = dataset.tensors
    begin = flat_params(module)
    losses = module.loss((x[:2], y[:2])) + module.loss((x[2:], y[2:]))
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses, list(module.parameters()))])
    strategy = LBGMFederated(num_clients=2, partitioner=partitioner, uplink=[], weighting="uniform")
    fit(strategy, module=module, dataset=dataset, max_epochs=1)
    torch.testing.assert_close(flat_params(module), begin - 0.5 * grads / 2)


def test_threshold_zero_equals_fedavg_bitwise(fit):
    results = []
    for uplink in ([], [LookBack(threshold=0.0)]):
        strategy = LBGMFederated(num_clients=6, uplink=uplink, local_steps=3, clients_per_round=4, seed=1)
        _, module = fit(strategy, batch_size=4, shuffle=True, max_epochs=8)
        results.append(flat_params(module))
    assert torch.equal(*results)


def test_one_client_with_one_local_step_equals_a_plain_trainer(fit, data, make_trainer):
    # A plain epoch over one full batch is one optimizer step, as is a round of one client. SGD has no state to lose.
    _, federated = fit(LBGMFederated(num_clients=1, uplink=[]), max_epochs=20)
    torch.manual_seed(0)
    plain = TinyModule()
    make_trainer("auto", max_epochs=20).fit(plain, DataLoader(data, batch_size=1000))
    torch.testing.assert_close(flat_params(federated), flat_params(plain), atol=1e-6, rtol=1e-5)


def test_local_training_of_one_client_equals_a_plain_epoch_with_momentum(fit, data, make_trainer):
    # One round of one client with a local epoch of mini-batches in order is one plain epoch, momentum included.
    settings = {"optimizer": torch.optim.SGD, "momentum": 0.9}
    torch.manual_seed(0)
    _, federated = fit(
        LBGMFederated(num_clients=1, uplink=[]), module=TinyModule(**settings), batch_size=7, max_epochs=1
    )
    torch.manual_seed(0)
    plain = TinyModule(**settings)
    make_trainer("auto", max_epochs=1).fit(plain, DataLoader(data, batch_size=7))
    torch.testing.assert_close(flat_params(federated), flat_params(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=0.05),
    ],
)
def test_server_optimizer_steps_on_the_mean_update(fit, make_optimizer):
    # The clients' plain SGD makes the mean update lr times the full-batch gradient, since weights are by examples.
    _, module = fit(LBGMFederated(num_clients=3, uplink=[], server_optimizer=make_optimizer, seed=0), max_epochs=5)
    torch.manual_seed(0)
    reference = TinyModule()
    optimizer = make_optimizer(reference.parameters())
    for _ in range(5):
        loss = 0.3 * reference.loss(make_data().tensors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(flat_params(module), flat_params(reference), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "uplink",
    [
        [TopK(0.25)],
        [SignSGD()],
        [TopK(0.25), LookBack(0.3)],
        [SignSGD(), LookBack(0.3)],
        [ErrorFeedback(TopK(0.1)), LookBack(0.3)],
        [ErrorFeedback([TopK(0.25), LookBack(0.3)])],
        [ErrorFeedback(LookBack(0.5, "layer"))],
    ],
    ids=repr,
)
def test_every_uplink_learns_and_sends_less_than_fedavg(fit, uplink):
    trainer, _ = fit(LBGMFederated(num_clients=4, uplink=uplink, seed=0), max_epochs=60, val=True)
    assert trainer.callback_metrics["val/acc"] > 0.8
    assert trainer.callback_metrics["comm/savings"] > 0.4


def test_a_run_is_a_function_of_its_seed(fit):
    def params(seed):
        strategy = LBGMFederated(num_clients=5, clients_per_round=0.6, local_steps=2, seed=seed)
        return flat_params(fit(strategy, batch_size=3, shuffle=True, max_epochs=4)[1])

    assert torch.equal(params(3), params(3))
    assert not torch.equal(params(3), params(4))


def test_seed_everything_is_the_default_seed(fit):
    def params(seed):
        pl.seed_everything(seed, verbose=False)
        return flat_params(fit(LBGMFederated(num_clients=5, clients_per_round=2), max_epochs=3)[1])

    try:
        assert torch.equal(params(3), params(3))
        assert not torch.equal(params(3), params(4))
    finally:
        import os

        os.environ.pop("PL_GLOBAL_SEED", None)
        os.environ.pop("PL_SEED_WORKERS", None)
