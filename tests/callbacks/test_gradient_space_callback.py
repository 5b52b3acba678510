"""The callback in real fits: which gradient it takes, what it logs and writes, and what it survives."""

from __future__ import annotations

import csv
import json
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import TinyModule, make_data
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_lbgm import GradientSpaceCallback, LBGMFederated

FIGURES = {f"gradient_space_{name}.png" for name in ("components", "principal", "cosines")}


class Hidden(TinyModule):
    def __init__(self, **settings):
        torch.manual_seed(0)
        super().__init__(net=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), **settings)


class Kept(GradientSpaceCallback):
    """Copy the gradients before they are discarded, and draw nothing, for that takes its time."""

    def __init__(self, **settings):
        super().__init__(**{"figures": False, **settings})

    def on_train_end(self, trainer, pl_module):
        self.kept = np.array(self.space.gradients)
        super().on_train_end(trainer, pl_module)


def fit(
    root, callback=None, module=None, ckpt_path=None, val=False, callbacks=(), dataset=None, batch_size=16, **settings
):
    """Train for three epochs of four batches, without a strategy of ours, and return (callback, trainer)."""
    callback = Kept() if callback is None else callback
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": root,
            "callbacks": [callback, *callbacks],
            **settings,
        }
    )
    loader = DataLoader(dataset or make_data(64), batch_size=batch_size)
    val_loader = DataLoader(make_data(30, seed=1), batch_size=30) if val else None
    trainer.fit(Hidden() if module is None else module, loader, val_loader, ckpt_path=ckpt_path)
    return callback, trainer


def plain_loop(epochs=3, accumulate=1, lr=0.3, clip=None, dtype=torch.float32, batch_size=16):
    """Return the sum of each epoch's gradients, in the order of the parameters, from a loop without Lightning."""
    module = Hidden().to(dtype)
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    sums = []
    for _ in range(epochs):
        total = [torch.zeros_like(p) for p in parameters]
        batches = list(DataLoader(make_data(64), batch_size=batch_size))
        for first in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for x, y in batches[first : first + accumulate]:
                (nn.functional.cross_entropy(module(x.to(dtype)), y) / accumulate).backward()
            for t, p in zip(total, parameters):
                t += p.grad
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
        sums.append(torch.cat([t.reshape(-1) for t in total]))
    return torch.stack(sums)


# Which gradient it is


def test_an_epochs_gradient_is_the_sum_of_its_steps_gradients(tmp_path):
    callback, _ = fit(tmp_path)
    np.testing.assert_allclose(callback.kept, plain_loop(), atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_are_one_step(tmp_path, accumulate):
    callback, _ = fit(tmp_path, accumulate_grad_batches=accumulate)
    np.testing.assert_allclose(callback.kept, plain_loop(accumulate=accumulate), atol=1e-6)


def test_the_gradient_is_that_before_clipping(tmp_path):
    callback, _ = fit(tmp_path, gradient_clip_val=0.05)
    np.testing.assert_allclose(callback.kept, plain_loop(clip=0.05), atol=1e-6)


def test_training_is_as_without_the_callback(tmp_path):
    with_it, without = Hidden(), Hidden()
    fit(tmp_path, module=with_it)
    fit(tmp_path, callback=pl.Callback(), module=without)
    assert all(torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters()))


def test_double_precision_is_stored_as_float32(tmp_path):
    callback, _ = fit(tmp_path, precision="64-true")
    assert callback.kept.dtype == np.float32
    np.testing.assert_allclose(callback.kept, plain_loop(dtype=torch.float64), atol=1e-6)


def test_bfloat16_gradients_are_added_up_in_float32(tmp_path):
    callback, _ = fit(tmp_path, precision="bf16-true")
    assert callback.kept.dtype == np.float32
    assert not np.array_equal(callback.kept, torch.from_numpy(callback.kept).bfloat16().float())
    np.testing.assert_allclose(callback.kept, plain_loop(), atol=0.1)


def test_a_gradient_scalers_scale_is_undone_and_a_step_that_it_skips_does_not_count(tmp_path):
    """From 2**40 the scale overflows float16 (largest 65504) and is halved with every skipped step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    steps = []

    class Counter(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters()]
            if all(g.isfinite().all() for g in gradients):
                steps.append(torch.cat([g.reshape(-1) for g in gradients]).clone())

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    callback, _ = fit(tmp_path, plugins=[plugin], max_epochs=12, callbacks=[Counter()])
    assert 0 < len(steps) < 48
    np.testing.assert_allclose(callback.kept.sum(0), torch.stack(steps).sum(0), rtol=1e-4, atol=1e-5)
    assert np.abs(callback.kept).max() < 100


class TwoOptimizers(pl.LightningModule):
    """Manual optimization; the loss of each step reaches all parameters, so both have gradients at both steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(6, 3), nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            x, y = batch
            self.manual_backward(nn.functional.cross_entropy(self.b(self.a(x)), y))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.a, self.b)]


def test_of_several_optimizers_each_steps_by_its_own_parameters(tmp_path):
    callback, _ = fit(tmp_path, module=TwoOptimizers(), max_epochs=1)
    module = TwoOptimizers()
    optimizers = module.configure_optimizers()
    sums = [torch.zeros_like(p) for p in module.parameters()]
    parts = [(0, list(module.a.parameters())), (2, list(module.b.parameters()))]
    for x, y in DataLoader(make_data(64), batch_size=16):
        for optimizer, (first, own) in zip(optimizers, parts):
            module.zero_grad()
            nn.functional.cross_entropy(module.b(module.a(x)), y).backward()
            for i, p in enumerate(own, first):
                sums[i] += p.grad
            optimizer.step()
    np.testing.assert_allclose(callback.kept[0], torch.cat([s.reshape(-1) for s in sums]), atol=1e-6)


def test_frozen_parameters_are_left_out_and_unused_ones_are_zeros(tmp_path):
    module = Hidden()
    module.net[0].bias.requires_grad_(False)
    module.unused = nn.Parameter(torch.ones(4))
    callback, _ = fit(tmp_path, Kept(log_layers=True), module=module)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert "unused" in names
    assert callback.kept.shape[1] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert names[0] == "unused"
    assert not callback.kept[:, :4].any()
    assert callback.space.components(0.95)[1] == 0


def test_sparse_gradients_are_added(tmp_path):
    class Words(TinyModule):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 6, sparse=True)

        def loss(self, batch):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x + self.words(y)), y)

    callback, _ = fit(tmp_path, module=Words())
    assert callback.kept[:, -30:-12].any()
    assert not callback.kept[:, -12:].any()  # words 3 and 4 do not occur


def test_parameters_that_are_freed_later_are_warned_of(tmp_path):
    class Unfreezing(Hidden):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 1)

    module = Unfreezing()
    module.net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="trainable parameters changed by epoch 2"):
        callback, _ = fit(tmp_path, module=module)
    assert callback.kept.shape == (3, 18)


# What it logs


def test_metrics_are_logged_and_can_be_monitored(tmp_path):
    seen = []

    class Seen(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gradient_space/")})

    logger = CSVLogger(tmp_path, name="", version="")
    stopping = EarlyStopping("gradient_space/n99", mode="max", patience=100)
    callback, trainer = fit(tmp_path, callbacks=[Seen(), stopping], logger=logger)
    names = [name for name, _ in Hidden().named_parameters()]
    layers = {f"gradient_space/{n}/{layer}" for n in ("n95", "n99") for layer in names}
    assert set(seen[0]) == layers | {"gradient_space/n95", "gradient_space/n99"}
    assert set(seen[-1]) == set(seen[0]) | {"gradient_space/cosine_previous"}
    a, b = callback.kept[-2:].astype(float)
    final = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert final["gradient_space/cosine_previous"] == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6
    )
    centered = callback.kept - callback.kept.mean(1, keepdims=True)
    variances = np.linalg.svd(centered, compute_uv=False) ** 2
    for name, share in (("n95", 0.95), ("n99", 0.99)):
        assert final[f"gradient_space/{name}"] == (np.cumsum(variances) < share * variances.sum()).sum() + 1
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row["gradient_space/n95"] for row in csv.DictReader(file) if row["gradient_space/n95"]]
    assert list(map(float, logged)) == [row["gradient_space/n95"] for row in seen]
    assert stopping.best_score == max(row["gradient_space/n99"] for row in seen)


@pytest.mark.parametrize(("log_layers", "count"), [(None, 0), (True, 24), (False, 0)])
def test_many_tensors_are_logged_on_demand(tmp_path, log_layers, count):
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)), nn.Linear(6, 3))
    _, trainer = fit(tmp_path, Kept(log_layers=log_layers), TinyModule(net=net), max_epochs=1)
    assert sum(name.count("/") == 2 for name in trainer.callback_metrics) == count


def test_the_whole_model_alone_can_be_analysed(tmp_path):
    with_layers, _ = fit(tmp_path)
    callback, trainer = fit(tmp_path, Kept(layers=False))
    assert {n for n in trainer.callback_metrics if "gradient" in n} == {
        "gradient_space/n95",
        "gradient_space/n99",
        "gradient_space/cosine_previous",
    }
    torch.testing.assert_close(callback.space.gram(), with_layers.space.gram())


# What it writes


def test_files_go_to_the_loggers_folder(tmp_path):
    fit(tmp_path / "root", GradientSpaceCallback(), logger=CSVLogger(tmp_path, name="run", version=0), val=True)
    folder = tmp_path / "run" / "version_0"
    assert {path.name for path in (folder / "figures").iterdir()} == FIGURES
    with (folder / "gradient_space_layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = ["(model)", *(name for name, _ in Hidden().named_parameters())]
    assert [(int(row["epoch"]), row["layer"]) for row in rows] == [(t, layer) for t in range(3) for layer in layers]
    assert [int(row["num_parameters"]) for row in rows[:5]] == [53, 30, 5, 15, 3]
    assert all(1 <= int(row["n95"]) <= int(row["n99"]) <= int(row["epoch"]) + 1 for row in rows)
    assert not list((tmp_path / "root").iterdir())


def test_without_a_logger_the_figures_go_to_the_root_folder_and_the_gradients_away(tmp_path):
    fit(tmp_path, GradientSpaceCallback())
    assert {path.name for path in tmp_path.rglob("*")} == FIGURES | {"figures"}


def test_figures_can_be_switched_off(tmp_path):
    fit(tmp_path, GradientSpaceCallback(figures=False))
    assert not list(tmp_path.iterdir())


def test_the_monitored_metric_is_drawn(tmp_path):
    callback, _ = fit(tmp_path, GradientSpaceCallback(monitor="val/loss"), val=True)
    curve = callback._curve
    figures = callback._history.figures(callback.space, curve.metric, curve.points())
    (axes, below) = figures["gradient_space_components.png"]().axes
    assert below.get_ylabel() == "val/loss"
    assert [x for x, _ in below.lines[0].get_xydata()] == [0, 1, 2]
    assert axes.get_ylabel() == "principal components"


def test_kept_gradients_can_be_read(tmp_path):
    fit(tmp_path, Kept(folder=tmp_path / "gradients", keep_gradients=True))
    stored = np.fromfile(tmp_path / "gradients" / "gradients.f32", np.float32).reshape(3, -1)
    np.testing.assert_allclose(stored, plain_loop(), atol=1e-6)


# What it survives


def assert_same_analysis(a, b):
    assert a._history.epochs == b._history.epochs
    assert torch.equal(a.space.gram(), b.space.gram())
    assert json.dumps(list(a._history.rows(a.space))) == json.dumps(list(b._history.rows(b.space)))
    assert a._curve.points() == b._curve.points()


class Stopped(Exception):
    pass


class StopAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Stopped


@pytest.mark.parametrize("step", [2, 4, 6, 9])
def test_a_fit_that_failed_resumes_as_if_unbroken(tmp_path, step):
    """The checkpoint is of the middle of the first epoch, of its last batch, and of later epochs.

    All batches are the same, for Lightning begins the loader of a resumed epoch anew.
    """
    settings = {"val": True, "dataset": ConcatDataset([make_data(16)] * 4)}
    unbroken, _ = fit(tmp_path / "a", **settings)
    with pytest.raises(Stopped):
        fit(tmp_path / "b", callbacks=[StopAt(step, tmp_path / "b.ckpt")], **settings)
    resumed, _ = fit(tmp_path / "b", ckpt_path=tmp_path / "b.ckpt", **settings)
    np.testing.assert_array_equal(resumed.kept, unbroken.kept)
    assert torch.equal(resumed.space.gram(), unbroken.space.gram())
    assert resumed._history.epochs == [0, 1, 2]


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_any_checkpoint_of_an_epoch_resumes_as_if_unbroken(tmp_path, at_epoch_end):
    unbroken, _ = fit(tmp_path / "a", val=True, max_epochs=4)
    checkpoint = ModelCheckpoint(
        tmp_path / "ckpts", save_top_k=-1, save_on_train_epoch_end=at_epoch_end, filename="{epoch}"
    )
    settings = {"val": True, "enable_checkpointing": True}
    fit(tmp_path / "b", Kept(keep_gradients=True), callbacks=[checkpoint], max_epochs=3, **settings)
    resumed, _ = fit(tmp_path / "b", val=True, max_epochs=4, ckpt_path=tmp_path / "ckpts" / "epoch=1.ckpt")
    np.testing.assert_array_equal(resumed.kept, unbroken.kept)
    if at_epoch_end:
        assert_same_analysis(resumed, unbroken)
    assert resumed._history.epochs == [0, 1, 2, 3]


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    callback, trainer = fit(tmp_path, Kept(keep_gradients=True))
    trainer.fit_loop.max_epochs = 5
    trainer.fit(trainer.lightning_module, DataLoader(make_data(64), batch_size=16))
    unbroken, _ = fit(tmp_path / "b", max_epochs=5)
    assert_same_analysis(callback, unbroken)


def test_the_callback_starts_anew_with_another_trainer(tmp_path):
    callback, _ = fit(tmp_path)
    fit(tmp_path, callback)
    assert callback._history.epochs == [0, 1, 2]
    assert callback.space.count == 3


def test_without_the_earlier_gradients_it_says_so_and_starts_afresh(tmp_path):
    _, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(
        UserWarning, match=r"starts afresh at epoch 3, for .*holds 0 gradients of 3.*keep_gradients=True"
    ):
        callback, _ = fit(tmp_path, max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert callback._history.epochs == [3, 4]
    np.testing.assert_allclose(callback.kept, plain_loop(epochs=5)[3:], atol=1e-6)


def test_a_moved_folder_is_named_anew(tmp_path):
    first = Kept(folder=tmp_path / "old", keep_gradients=True)
    _, trainer = fit(tmp_path, first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "old").rename(tmp_path / "new")
    callback, _ = fit(tmp_path, Kept(folder=tmp_path / "new"), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert callback._history.epochs == [0, 1, 2, 3]


def test_other_settings_are_refused_on_resuming(tmp_path):
    _, trainer = fit(tmp_path, Kept(keep_gradients=True))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=r"has `center='entries'`, this callback .*center=None"):
        fit(tmp_path, Kept(center=None), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_without_its_state_is_no_hindrance(tmp_path):
    _, trainer = fit(tmp_path, callback=pl.Callback())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback, _ = fit(tmp_path, max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert callback._history.epochs == [3, 4]


def test_a_failed_fit_draws_its_figures_and_keeps_the_gradients(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, GradientSpaceCallback(), callbacks=[StopAt(9, tmp_path / "a.ckpt")])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == FIGURES
    (file,) = tmp_path.glob("gradient_space_*/gradients.f32")
    assert file.stat().st_size == 2 * 53 * 4


def test_a_fit_that_fails_at_once_leaves_nothing(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path / "root", callbacks=[StopAt(2, tmp_path / "a.ckpt")])
    assert not list((tmp_path / "root").iterdir())


def test_an_epoch_that_is_not_finite_is_left_out(tmp_path):
    class Exploding(Hidden):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.current_epoch == 1 and batch_idx == 0 else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)  # nothing stays broken

    module = Exploding()
    module.on_before_optimizer_step = lambda optimizer: [torch.nan_to_num_(p.grad) for p in module.parameters()]
    with pytest.warns(UserWarning, match="gradient of epoch 1 is not finite"):
        callback, trainer = fit(tmp_path, module=module, val=True)
    assert callback._history.epochs == [0, 2]
    assert callback.space.count == 2
    assert float(trainer.callback_metrics["gradient_space/cosine_previous"]) == pytest.approx(1)


@pytest.mark.parametrize("setting", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}], ids=str)
def test_dry_runs_leave_nothing(tmp_path, setting):
    if "barebones" in setting:
        setting = {**setting, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
        setting["enable_model_summary"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, GradientSpaceCallback(), val="barebones" not in setting, **setting)
    assert not [path for path in tmp_path.rglob("*") if "lightning_logs" not in path.parts]


def test_validating_and_testing_do_nothing(tmp_path):
    callback = GradientSpaceCallback()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.validate(Hidden(), DataLoader(make_data(30), batch_size=30), verbose=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no gradients before a fit"):
        _ = callback.space


@pytest.mark.slow
def test_of_several_processes_the_first_stores_the_averaged_gradient_and_all_have_the_metrics(tmp_path):
    """Two processes with half of the examples each step by the mean gradient over all."""
    callback = GradientSpaceCallback(folder=tmp_path / "g", keep_gradients=True)
    stopping = EarlyStopping("gradient_space/n95", mode="max", patience=100)  # fails where the metric is missing
    fit(tmp_path, callback, callbacks=[stopping], strategy="ddp_spawn", devices=2, batch_size=32)
    stored = np.fromfile(tmp_path / "g" / "gradients.f32", np.float32).reshape(3, -1)
    np.testing.assert_allclose(stored, plain_loop(batch_size=64), atol=1e-6)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == FIGURES


def test_a_federation_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`GradientSpaceCallback` analyses .*centralized training"):
        fit(tmp_path, strategy=LBGMFederated(num_clients=2))


def test_a_module_that_cannot_be_analysed_is_refused_with_the_remedy(tmp_path):
    class Complex(TinyModule):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))

    with pytest.raises(MisconfigurationException, match=r"`Complex` cannot be analysed.*'phase' is complex"):
        fit(tmp_path, module=Complex())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"center": "rows"}, "`center` must be"), ({"momentum": -0.1}, "`momentum` must lie in")],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientSpaceCallback(**arguments)
