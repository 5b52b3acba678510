"""Server presets: the papers' formulas, and what differs from torch's optimizers of like names."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import FedAdam, FedAvgM, FedYogi, LBGMFederated

GRADIENTS = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRADIENTS[2] *= 100  # so that Yogi's second moment goes both ways


def steps(preset):
    """Make steps along fixed gradients, of which a parameter has none at times; return where they lead."""
    parameter, idle = (nn.Parameter(torch.ones(7, dtype=torch.float64)) for _ in range(2))
    optimizer = preset([parameter, idle])
    for gradient in GRADIENTS:
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(idle, torch.ones(7, dtype=torch.float64))
    return parameter.detach()


def adaptive_by_hand(lr, beta, decay, tau, yogi):
    w, m, v = [1.0] * 7, [0.0] * 7, [tau**2] * 7
    for gradient in GRADIENTS.tolist():
        for i, g in enumerate(gradient):
            m[i] = beta * m[i] + (1 - beta) * g
            if yogi:
                sign = (v[i] > g * g) - (v[i] < g * g)
                v[i] = v[i] - (1 - decay) * g * g * sign
            else:
                v[i] = decay * v[i] + (1 - decay) * g * g
            w[i] -= lr * m[i] / (v[i] ** 0.5 + tau)
    return torch.tensor(w, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"lr": 0.3, "betas": (0.5, 0.8), "eps": 0.1}, {"betas": (0.0, 0.0)}])
@pytest.mark.parametrize("preset", [FedAdam, FedYogi])
def test_adaptive_presets_follow_the_papers_formulas(preset, settings):
    lr, (beta, decay), tau = ({"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3} | settings).values()
    expected = adaptive_by_hand(lr, beta, decay, tau, preset is FedYogi)
    torch.testing.assert_close(steps(preset(**settings)), expected, rtol=0, atol=1e-12)


def test_they_differ_from_each_other_and_from_torchs_adam():
    found = [steps(FedAdam()), steps(FedYogi()), steps(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)))]
    assert all((one - two).abs().max() > 1e-5 for one, two in zip(found, found[1:] + found[:1]))


def test_fedavgm_is_a_sum_of_fading_updates():
    w, v = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for gradient in GRADIENTS:
        v = 0.7 * v + gradient
        w = w - 0.5 * v
    torch.testing.assert_close(steps(FedAvgM(lr=0.5, momentum=0.7)), w, rtol=0, atol=1e-12)
    assert (FedAvgM().lr, FedAvgM().momentum) == (1.0, 0.9)


PRESETS = [FedAvgM(0.5, 0.8), FedAdam(0.02), FedYogi(0.02, (0.8, 0.95), 0.01)]


def test_they_show_their_arguments_and_are_pickled():
    assert [repr(pickle.loads(pickle.dumps(preset))) for preset in PRESETS] == [
        "FedAvgM(lr=0.5, momentum=0.8)",
        "FedAdam(lr=0.02, betas=(0.9, 0.99), eps=0.001)",
        "FedYogi(lr=0.02, betas=(0.8, 0.95), eps=0.01)",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAdam(lr=0), r"`FedAdam\(lr=...\)` must be a finite number above 0; got 0"),
        (lambda: FedYogi(eps=-1.0), r"`FedYogi\(eps=...\)`"),
        (lambda: FedAdam(betas=(0.9, 1.0)), r"`FedAdam\(betas=...\)` must be in \[0, 1\).*got 1.0"),
        (lambda: FedAdam(betas=0.9), r"`FedAdam\(betas=...\)` must be two numbers"),
        (lambda: FedAvgM(momentum=1.0), r"`FedAvgM\(momentum=...\)`"),
        (lambda: FedAvgM(lr="1"), r"`FedAvgM\(lr=...\)`"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_is_no_preset():
    with pytest.raises(TypeError, match=r"`server_optimizer` must be.*FedAdam is a class: write FedAdam\(lr=0.01\)"):
        LBGMFederated(num_clients=3, server_optimizer=FedAdam)


def train(root, preset, ckpt_path=None, **trainer):
    torch.manual_seed(0)
    module = TinyModule()
    strategy = LBGMFederated(num_clients=3, uplink=[], server_optimizer=preset, seed=0)
    trainer = build_trainer(root, strategy, max_epochs=4, **trainer)
    trainer.fit(module, DataLoader(make_data(), batch_size=8), ckpt_path=ckpt_path)
    return strategy, flat_params(module)


@pytest.mark.parametrize("preset", PRESETS, ids=repr)
def test_a_federation_trains_and_resumes_with_them_to_the_bit(tmp_path, preset):
    callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    strategy, params = train(tmp_path, preset, callbacks=[callback], enable_checkpointing=True)
    name = {"FedAvgM": "SGD", "FedAdam": "ServerAdam", "FedYogi": "ServerYogi"}[type(preset).__name__]
    assert strategy.settings()["server_optimizer"].startswith(f"{name}(lr={preset.lr}")
    _, resumed = train(tmp_path, preset, ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(params, resumed)
    _, plain = train(tmp_path, None)
    assert (plain - params).abs().max() > 1e-3
    other = FedAdam(0.02, (0.5, 0.99))
    with pytest.raises(MisconfigurationException, match=r"`server_optimizer="):
        train(tmp_path, other, ckpt_path=tmp_path / "step=2.ckpt")
