"""What several tests share: a small module, small data and a quiet Trainer on the CPU."""

from __future__ import annotations

import functools
import inspect
import logging
import os

import lightning.pytorch as pl
import pytest
import torch
from devices import DEVICES, REAL_DEVICES
from hypothesis import HealthCheck, settings
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import LBGMFederated

# `make test` draws the same examples everywhere; `make fuzz` draws new ones, as many times more.
FUZZ = int(os.environ.get("LBGM_FUZZ", "0"))
# Machines may be slow: no test is about its own duration.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fuzz" if FUZZ else "same")

# Lightning keeps its messages from the root logger, where `caplog` listens, if that has no handler at the first import.
logging.getLogger("lightning.pytorch").propagate = True


def pytest_pyfunc_call(pyfuncitem) -> None:
    """Run a test of random examples some more times under ``make fuzz``; the last time is pytest's own."""
    if FUZZ and pyfuncitem.get_closest_marker("hypothesis"):
        arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
        for _ in range(FUZZ - 1):
            pyfuncitem.obj(**arguments)


# Scripts that tests start as processes of their own.
collect_ignore = [
    "engine_script.py",
    "forked.py",
    "objective_script.py",
    "personal_script.py",
    "processes_death.py",
    "processes_script.py",
    "torchrun_script.py",
    "twin_script.py",
    "two_devices_script.py",
]


class TinyModule(pl.LightningModule):
    """Linear softmax classifier, 6 features and 3 classes, that knows nothing of clients."""

    def __init__(self, lr: float = 0.3, net: nn.Module | None = None, optimizer=torch.optim.SGD, **settings) -> None:
        super().__init__()
        self.lr, self.optimizer, self.settings = lr, optimizer, settings
        self.net = nn.Linear(6, 3) if net is None else net

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        self.log("val/loss", nn.functional.cross_entropy(output, y))
        self.log("val/acc", (output.argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr, **self.settings)


def make_data(num_examples: int = 60, seed: int = 0) -> TensorDataset:
    """Three Gaussian classes in six dimensions, in random order."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (num_examples,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    return TensorDataset(centres[y] + 0.7 * torch.randn(num_examples, 6, generator=generator), y)


@pytest.fixture
def data() -> TensorDataset:
    return make_data()


def build_trainer(root, strategy=None, **kwargs) -> pl.Trainer:
    """Make a quiet Trainer on the CPU; keyword arguments replace its settings."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    if strategy is None:
        strategy = LBGMFederated(num_clients=4, seed=0)
    return pl.Trainer(strategy=strategy, **{**settings, **kwargs})


def fit_tiny(
    root,
    strategy=None,
    module=None,
    dataset=None,
    batch_size=1000,
    shuffle=False,
    val=False,
    ckpt_path=None,
    **kwargs,
):
    """Train a seeded TinyModule and return (trainer, module)."""
    if module is None:
        torch.manual_seed(0)
        module = TinyModule()
    trainer = build_trainer(root, strategy, **kwargs)
    loader = DataLoader(dataset or make_data(), batch_size=batch_size, shuffle=shuffle)
    val_loader = DataLoader(make_data(30, seed=1), batch_size=30) if val else None
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture
def make_trainer(tmp_path):
    return functools.partial(build_trainer, tmp_path)


@pytest.fixture
def fit(tmp_path):
    return functools.partial(fit_tiny, tmp_path)


@pytest.fixture(params=DEVICES)
def device(request):
    with request.param.entered():
        yield request.param


@pytest.fixture(params=REAL_DEVICES)
def real_device(request):
    """A device without the emulated one, for what that cannot do."""
    return request.param


class Recorder(pl.Callback):
    """Collect each round's report, and the global parameters after it."""

    def __init__(self) -> None:
        self.reports, self.params, self.callback_metrics = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.reports.append(trainer.strategy.last_report)
        self.params.append(flat_params(pl_module))
        self.callback_metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def flat_params(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad]).clone()
