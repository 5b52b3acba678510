"""Fits on an accelerator: those of the CPU up to rounding, and every setting that moves tensors about."""

import functools
import os
import warnings

import pytest
import torch
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from devices import ACCELERATOR, GPU, Device, near
from states import assert_same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lbgm import (
    DIANA,
    QSGD,
    SCAFFOLD,
    ConvergenceMonitor,
    CoordinateMedian,
    ErrorFeedback,
    FedDyn,
    FedProx,
    GradientSpaceCallback,
    LayerRecycling,
    LBGMFederated,
    LookBack,
    RandK,
    Relax,
    SignSGD,
    TopK,
)
from lightning_lbgm.protocol import WireChannel
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy import session

CPU = Device(torch.device("cpu"))
UPLINKS = {
    "fedavg": [],
    "lookback": [LookBack(0.7)],
    "ef(rowwise, rank 3)": [ErrorFeedback(LookBack(0.6, rank=3, rowwise=True))],
    "ef(topk, sign)": [ErrorFeedback([TopK(0.3), SignSGD()])],
    "diana by layer": [DIANA(LookBack(0.3, "layer"))],
    "layer recycling": [LayerRecycling(2)],
}
SETTINGS = {
    "files": lambda folder: {"client_store": str(folder / "store"), "uplink": UPLINKS["ef(topk, sign)"]},
    "capacity": lambda folder: {"client_capacity": 2, "uplink": UPLINKS["lookback"]},
    "median": lambda folder: {"aggregation": CoordinateMedian(memory=300)},
    "own buffers": lambda folder: {"buffers": "client"},
    "server adam": lambda folder: {"server_optimizer": functools.partial(torch.optim.Adam, lr=0.01)},
    "downlink": lambda folder: {"downlink": [TopK(0.3), SignSGD(), Relax(1.5)]},
    "downlink looking back": lambda folder: {"downlink": [TopK(0.5), LookBack(0.7)], "uplink": []},
    "downlink damped": lambda folder: {"downlink": [RandK(0.2)]},
    "fedprox": lambda folder: {"objective": FedProx(0.1)},
    "fedprox vectorized": lambda folder: {"objective": FedProx(0.1), "execution": "vectorized"},
    "scaffold": lambda folder: {"objective": SCAFFOLD()},
    "feddyn vectorized": lambda folder: {"objective": FedDyn(0.1), "execution": "vectorized"},
}


class BatchNormModule(TinyModule):
    """Has buffers, and logs a number in some steps and a tensor in others."""

    def __init__(self, **settings) -> None:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        super().__init__(net=net, **settings)

    def training_step(self, batch, batch_idx):
        self.log("train/share", 0.5 if batch_idx % 2 == 0 else batch[0].mean())
        return super().training_step(batch, batch_idx)


class OneByOne(Dataset):
    """No tensor dataset, so that a DataLoader fetches, and pins, its batches."""

    def __init__(self) -> None:
        self.data = make_data()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def fit(device, root, uplink=(), module=None, loader=None, trainer=None, ckpt_path=None, max_epochs=5, **settings):
    """Train; return the trainer, and on the CPU the parameters, the losses of the rounds and the ledger."""
    torch.manual_seed(0)
    module = BatchNormModule() if module is None else module
    wanted = {"num_clients": 4, "clients_per_round": 3, "execution": "sequential", "seed": 0, **settings}
    strategy, recorder = LBGMFederated(uplink=wanted.pop("uplink", list(uplink)), **wanted), Recorder()
    options = {**device.trainer_settings(), "max_epochs": max_epochs, **(trainer or {})}
    options["callbacks"] = [recorder, *options.get("callbacks", [])]
    made = build_trainer(root, strategy, **options)
    loader = DataLoader(make_data(), batch_size=8, shuffle=True) if loader is None else loader
    made.fit(module, loader, ckpt_path=ckpt_path)
    losses = [metrics["train/loss"] for metrics in recorder.callback_metrics]
    return made, near(recorder.params[-1]), losses, strategy.ledger.state_dict()


def check_like_cpu(device, root, record_property, **settings):
    _, params, losses, ledger = fit(device, root, **settings)
    assert losses[-1] < losses[0]
    cpu_trainer, cpu_params, cpu_losses, cpu_ledger = fit(CPU, root, **settings)
    record_property("distance of parameters to the CPU", float((params - cpu_params).norm() / cpu_params.norm()))
    assert losses == pytest.approx(cpu_losses, rel=1e-2)
    torch.testing.assert_close(params, cpu_params, rtol=1e-2, atol=1e-3)
    assert ledger == cpu_ledger
    assert cpu_trainer.global_step == 5


WAYS = [*((name, "sequential") for name in UPLINKS), ("lookback", "vectorized"), ("ef(topk, sign)", "vectorized")]


@pytest.mark.parametrize(("name", "execution"), WAYS)
def test_a_fit_is_that_of_the_cpu(device, tmp_path, name, execution, record_property):
    check_like_cpu(device, tmp_path, record_property, uplink=UPLINKS[name], execution=execution)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_that_of_the_cpu(device, tmp_path, name, record_property):
    check_like_cpu(device, tmp_path, record_property, **SETTINGS[name](tmp_path))


@pytest.mark.parametrize("name", ["lookback", "ef(rowwise, rank 3)", "diana by layer", "layer recycling"])
def test_a_fit_over_the_wire_is_that_of_the_shared_channel(device, tmp_path, name, monkeypatch):
    _, params, _, ledger = fit(device, tmp_path, UPLINKS[name])

    def make(flat, uplink, server, buffers, *rest, **settings):
        sent = {name: buffer for name, buffer in buffers.module.named_buffers() if buffer.is_floating_point()}
        settings["channel"] = WireChannel(uplink, flat.layout, sent)
        return Federation(flat, uplink, server, buffers, *rest, **settings)

    monkeypatch.setattr(session, "Federation", make)
    _, wire_params, _, wire_ledger = fit(device, tmp_path, UPLINKS[name])
    assert torch.equal(wire_params, params)
    assert wire_ledger == ledger


@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
@pytest.mark.parametrize("store", ["memory", "files"])
def test_a_resumed_fit_is_the_unbroken_one_to_the_bit(real_device, tmp_path, store, execution):
    settings = {
        "uplink": [ErrorFeedback([TopK(0.5), QSGD(4)]), LookBack(0.8, rank=2)],
        "downlink": [TopK(0.5), LookBack(0.5)],
        "server_optimizer": functools.partial(torch.optim.SGD, lr=0.9, momentum=0.5),
        "client_store": "memory" if store == "memory" else str(tmp_path / "store"),
        "execution": execution,
    }
    if execution == "sequential":
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    else:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def module():
        torch.manual_seed(0)
        for part in net:
            getattr(part, "reset_parameters", lambda: None)()
        return TinyModule(net=net, momentum=0.9, lr=0.05)

    _, params, _, ledger = fit(real_device, tmp_path, module=module(), **settings)
    first, *_ = fit(real_device, tmp_path, module=module(), max_epochs=2, **settings)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again, _, ledger_again = fit(
        real_device, tmp_path, module=module(), ckpt_path=tmp_path / "half.ckpt", **settings
    )
    assert resumed.global_step == 5
    assert torch.equal(again, params)
    assert ledger_again == ledger


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(real_device, tmp_path):
    settings = {"uplink": UPLINKS["ef(rowwise, rank 3)"]}
    _, params, _, ledger = fit(real_device, tmp_path, **settings)
    first, *_ = fit(real_device, tmp_path, max_epochs=2, **settings)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, on_cpu, _, cpu_ledger = fit(CPU, tmp_path, ckpt_path=tmp_path / "half.ckpt", **settings)
    torch.testing.assert_close(on_cpu, params, rtol=1e-2, atol=1e-3)
    assert cpu_ledger == ledger


def test_a_second_fit_goes_on(real_device, tmp_path):
    module = BatchNormModule()
    trainer, params, _, ledger = fit(real_device, tmp_path, UPLINKS["ef(topk, sign)"], module=module)
    before = {k: [leaf.clone() for leaf in _residuals(s)] for k, s in trainer.strategy._federation.clients.items()}
    assert all(real_device.holds(leaf) for leaves in before.values() for leaf in leaves)
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, DataLoader(make_data(), batch_size=8, shuffle=True))
    assert trainer.global_step == 7
    assert trainer.strategy.ledger.uplink_bits > ledger["uplink_bits"]
    assert not torch.equal(near(flat_params(module)), params)


def _residuals(state):
    return [stage["residual"] for stage in state["uplink"]["stages"]]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(real_device, tmp_path, precision, record_property):
    if precision == "16-mixed" and real_device.torch.type != "cuda":
        pytest.skip("float16 needs a CUDA GPU")
    _, params, losses, _ = fit(
        real_device, tmp_path, UPLINKS["ef(topk, sign)"], trainer={"precision": precision}, execution="auto"
    )
    record_property(f"loss in {precision}", losses[-1])
    assert losses[-1] < losses[0]
    assert params.isfinite().all()
    _, exact, *_ = fit(real_device, tmp_path, UPLINKS["ef(topk, sign)"])
    assert (params - exact).norm() < 0.5 * exact.norm()


def test_deterministic_algorithms(real_device, tmp_path):
    try:
        runs = [
            fit(real_device, tmp_path, UPLINKS["ef(rowwise, rank 3)"], trainer={"deterministic": True})
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_of_a_dataset_that_is_fetched(real_device, tmp_path, workers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a machine without an accelerator nothing is pinned
        pinned = DataLoader(OneByOne(), batch_size=8, shuffle=True, pin_memory=True, num_workers=workers)
        _, params, *_ = fit(real_device, tmp_path, loader=pinned)
    _, plain, *_ = fit(real_device, tmp_path)
    assert torch.equal(params, plain)


def test_data_that_lies_on_the_device(device, tmp_path):
    data = torch.utils.data.TensorDataset(*map(device.put, make_data().tensors))
    _, params, *_ = fit(device, tmp_path, loader=DataLoader(data, batch_size=8, shuffle=True))
    _, plain, *_ = fit(device, tmp_path)
    assert torch.equal(params, plain)


def test_the_measured_error_and_the_last_metrics(device, tmp_path):
    trainer, *_ = fit(
        device, tmp_path, UPLINKS["lookback"], trainer={"callbacks": [ConvergenceMonitor(lr=1.0, figure=False)]}
    )
    cpu_trainer, *_ = fit(
        CPU, tmp_path, UPLINKS["lookback"], trainer={"callbacks": [ConvergenceMonitor(lr=1.0, figure=False)]}
    )
    metrics, expected = ({k: float(v) for k, v in t.callback_metrics.items()} for t in (trainer, cpu_trainer))
    assert metrics == pytest.approx(expected, rel=5e-2, abs=1e-4, nan_ok=True)
    assert metrics["convergence/gap_norm"] >= 0


def test_the_gradient_space_of_ordinary_training(real_device, tmp_path):
    counts = []
    for device in (real_device, CPU):
        torch.manual_seed(0)
        callback = GradientSpaceCallback(figures=False)
        settings = device.trainer_settings()
        trainer = build_trainer(tmp_path, "auto", callbacks=[callback], max_epochs=4, **settings)
        trainer.fit(BatchNormModule(), DataLoader(make_data(), batch_size=8))
        counts.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient")})
    assert counts[0] == pytest.approx(counts[1], rel=1e-2, abs=1e-3, nan_ok=True)


def test_convolutions_fall_back_or_come_out_the_same(real_device, tmp_path, record_property):
    # cuDNN may round convolutions to TensorFloat-32, in grouped ones elsewhere than in plain ones.
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = (images.mean((1, 2, 3)) > 0).long()
    loader = DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8, shuffle=True)

    def module():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        return TinyModule(net=net, lr=0.1)

    trainer, params, losses, _ = fit(real_device, tmp_path, module=module(), loader=loader, execution="auto")
    record_property("convolutions are not vectorized because", trainer.strategy.execution._obstacle or "they are")
    _, alone, *_ = fit(real_device, tmp_path, module=module(), loader=loader)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(params, alone, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("gpu", [GPU])
def test_the_trainer_is_where_it_says(gpu, tmp_path):
    trainer, *_ = fit(gpu, tmp_path)
    assert trainer.strategy._federation.flat.device.type == ACCELERATOR.type
    assert trainer.strategy.root_device.type == ACCELERATOR.type
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert_same({"rounds": trainer.global_step}, {"rounds": 5})
