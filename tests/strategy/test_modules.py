"""Modules run unchanged: frozen parameters, buffers, precisions, hooks, optimizers."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from lightning_lbgm import LBGMFederated, LookBack, NaturalPartitioner


def test_only_trainable_parameters_are_trained_sent_and_counted(fit):
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 100), nn.Linear(100, 3)))
    module.net[0].requires_grad_(False)
    frozen = module.net[0].weight.clone()
    trainer, _ = fit(LBGMFederated(num_clients=4, uplink=[]), module=module, max_epochs=1)
    assert torch.equal(module.net[0].weight, frozen)
    assert int(trainer.callback_metrics["comm/uplink_bytes_total"]) == 4 * 303 * 4


def test_parameters_unfrozen_in_training_join_the_federation(fit):
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)))
    module.net[0].requires_grad_(False)

    def unfreeze(trainer, pl_module):
        if trainer.current_epoch == 2:
            pl_module.net[0].requires_grad_(True)

    recorder = Recorder()
    with pytest.warns(UserWarning, match="trainable parameters changed before round 2, from 15 to 43"):
        fit(
            LBGMFederated(num_clients=2, uplink=[LookBack(1.0)]),
            module=module,
            callbacks=[LambdaCallback(on_train_epoch_start=unfreeze), recorder],
            max_epochs=4,
        )
    assert [r.uplink_bits // 32 for r in recorder.reports] == [30, 2, 86, 2]


def batch_norm_module():
    return TinyModule(net=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))


@pytest.mark.parametrize(("buffers", "sent"), [("average", 8), ("server", 0), ("client", 0)])
@pytest.mark.filterwarnings("ignore:.*buffers='client'")
def test_buffers_that_are_sent_are_counted(fit, buffers, sent):
    trainer, module = fit(
        LBGMFederated(num_clients=3, uplink=[], buffers=buffers), module=batch_norm_module(), max_epochs=2
    )
    # In front of the values: the length of the update (2 bytes); for each buffer its name, and 4 bytes for the name's
    # length, the dtype, the number of dimensions and the extent.
    framing = 2 + len("net.1.running_mean") + len("net.1.running_var") + 2 * 4 if sent else 0
    assert int(trainer.callback_metrics["comm/uplink_bytes_total"]) == 2 * 3 * (4 * (51 + sent) + framing)
    changed = not torch.equal(module.net[1].running_mean, torch.zeros(4))
    assert changed == (buffers == "average")
    down = 0 if buffers == "client" else 8
    assert int(trainer.callback_metrics["comm/downlink_bytes_total"]) == 2 * 3 * 4 * (51 + down)


def test_averaged_batch_norm_buffers_by_hand(fit):
    # One full-batch step a client: running_mean = 0.1 x batch mean (momentum 0.1, from 0), averaged by 1/3 and 2/3.
    dataset = make_data(12)
    torch.manual_seed(0)
    module = TinyModule(net=nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)))
    partitioner = NaturalPartitioner([0] * 4 + [1] * 8)
    fit(LBGMFederated(num_clients=2, partitioner=partitioner), module=module, dataset=dataset, max_epochs=1)
    x = dataset.tensors[0]
    expected = 0.1 * (x[:4].mean(0) / 3 + x[4:].mean(0) * 2 / 3)
    torch.testing.assert_close(module.net[0].running_mean, expected)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_applies_to_every_local_step(fit, algorithm):
    # SGD with lr 1 and one local step: the update is the clipped gradient itself.
    recorder = Recorder()
    fit(
        LBGMFederated(num_clients=3, uplink=[]),
        module=TinyModule(lr=1.0),
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
        callbacks=[recorder],
        max_epochs=1,
    )
    bound = 1e-3 if algorithm == "norm" else 1e-3 * 21**0.5
    norms = [client.update_norm for client in recorder.reports[0].clients]
    assert all(0.5 * bound < norm < 1.001 * bound for norm in norms)


def test_bf16_mixed_precision_trains_float32_parameters(fit):
    dtypes = []

    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            dtypes.append(self(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    trainer, module = fit(
        LBGMFederated(num_clients=4, seed=0), module=Module(), precision="bf16-mixed", max_epochs=40, val=True
    )
    assert set(dtypes) == {torch.bfloat16}
    assert module.net.weight.dtype == torch.float32
    assert trainer.callback_metrics["val/acc"] > 0.8


@pytest.mark.parametrize(
    ("precision", "dtype", "bits"), [("64-true", torch.float64, 64), ("bf16-true", torch.bfloat16, 32)]
)
def test_true_precisions(fit, precision, dtype, bits):
    trainer, module = fit(LBGMFederated(num_clients=4, uplink=[], seed=0), precision=precision, max_epochs=2)
    assert module.net.weight.dtype == dtype
    assert int(trainer.callback_metrics["comm/uplink_bytes_total"]) == 2 * 4 * 21 * bits // 8


@pytest.mark.slow
def test_a_compiled_module_trains_like_an_eager_one(fit):
    torch.manual_seed(0)
    module = torch.compile(TinyModule(), backend="aot_eager")
    torch._dynamo.reset()
    trainer, _ = fit(LBGMFederated(num_clients=4, seed=0), module=module, max_epochs=3)
    torch.manual_seed(0)
    eager, eager_module = fit(LBGMFederated(num_clients=4, seed=0), max_epochs=3)
    torch.testing.assert_close(flat_params(trainer.lightning_module), flat_params(eager_module), atol=1e-5, rtol=1e-4)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(
        float(eager.callback_metrics["train/loss"]), rel=1e-4
    )


def test_step_hooks_are_called_at_every_local_step(fit):
    calls = []

    class Module(TinyModule):
        def on_before_zero_grad(self, optimizer):
            calls.append("module zero_grad")

        def on_before_optimizer_step(self, optimizer):
            assert self.net.weight.grad is not None
            calls.append("module optimizer_step")

    class Hooks(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            calls.append("callback backward")

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            calls.append("callback optimizer_step")

    fit(LBGMFederated(num_clients=3, local_steps=2), module=Module(), callbacks=[Hooks()], max_epochs=1)
    assert calls.count("callback backward") == 6
    assert calls.count("callback optimizer_step") == calls.count("module optimizer_step") == 6
    plain = []
    Module.on_before_optimizer_step = lambda self, optimizer: plain.append(1)
    fit(LBGMFederated(num_clients=3, local_steps=2), module=Module(), max_epochs=1)
    assert len(plain) == 6


def test_plain_and_full_local_steps_agree(fit):
    class Hooks(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pass  # its presence makes every local step go through Lightning's precision plugin

    settings = {"optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
    results = []
    for callbacks in ([], [Hooks()]):
        torch.manual_seed(0)
        module = TinyModule(**settings)
        strategy = LBGMFederated(num_clients=3, local_steps=4, seed=0, execution="sequential")
        fit(strategy, module=module, callbacks=callbacks, gradient_clip_val=0.1, batch_size=5, shuffle=True)
        results.append(flat_params(module))
    assert torch.equal(*results)


def test_lbfgs_gets_its_closure(fit):
    torch.manual_seed(0)
    module = TinyModule(optimizer=torch.optim.LBFGS, lr=0.5)
    trainer, _ = fit(LBGMFederated(num_clients=2, uplink=[]), module=module, val=True, max_epochs=3)
    assert trainer.callback_metrics["val/acc"] > 0.8


def test_batch_transfer_hooks_see_local_batches(fit):
    class Module(TinyModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] - 1, batch[1]]

        def training_step(self, batch, batch_idx):
            assert isinstance(batch, list)
            return super().training_step(batch, batch_idx)

    results = []
    for cls in (TinyModule, Module):
        torch.manual_seed(0)
        module = cls()
        fit(LBGMFederated(num_clients=4, seed=0), module=module, val=True)
        results.append(flat_params(module))
    torch.testing.assert_close(*results)


def test_training_step_may_return_a_dict_or_none(fit):
    class Module(TinyModule):
        def training_step(self, batch):
            loss = self.loss(batch)
            return {"loss": loss, "extra": 1} if len(batch[0]) == 6 else None

    # Clients of 6 and 4 examples: the second always skips, so its update is zero.
    recorder = Recorder()
    partitioner = NaturalPartitioner([0] * 6 + [1] * 4)
    fit(
        LBGMFederated(num_clients=2, partitioner=partitioner, uplink=[]),
        module=Module(),
        dataset=make_data(10),
        callbacks=[recorder],
        max_epochs=1,
    )
    first, second = recorder.reports[0].clients
    assert first.update_norm > 0
    assert second.update_norm == 0
