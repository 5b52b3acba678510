"""What a Lightning user expects of a Trainer, with rounds for batches."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lbgm import IIDPartitioner, LBGMCallback, LBGMFederated, LookBack, NaturalPartitioner


def logged(trainer, name):
    """Return {step: value} from the CSV log."""
    import csv

    trainer.logger.save()
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_strategies_are_registered_by_name(fit):
    assert {"lbgm_federated", "fedavg"} <= set(StrategyRegistry)
    trainer, _ = fit("fedavg")
    assert isinstance(trainer.strategy, LBGMFederated)
    assert repr(trainer.strategy.uplink) == "[]"
    trainer, _ = fit("lbgm_federated")
    assert repr(trainer.strategy.uplink) == "[LookBack(threshold=0.2, granularity='model')]"
    LBGMFederated.register_strategies(StrategyRegistry)  # a second registration is no error


def test_a_round_is_a_batch(fit):
    trainer, _ = fit(LBGMFederated(num_clients=4, rounds_per_epoch=5), max_epochs=3)
    assert (trainer.global_step, trainer.current_epoch, trainer.num_training_batches) == (15, 3, 5)
    assert trainer.strategy.round_index == 15


def test_max_steps_and_limit_train_batches_count_rounds(fit):
    trainer, _ = fit(LBGMFederated(num_clients=4, rounds_per_epoch=5), max_epochs=-1, max_steps=7)
    assert trainer.strategy.round_index == 7
    trainer, _ = fit(LBGMFederated(num_clients=4, rounds_per_epoch=5), max_epochs=2, limit_train_batches=3)
    assert trainer.strategy.round_index == 6
    trainer, _ = fit(LBGMFederated(num_clients=4, rounds_per_epoch=4), max_epochs=2, limit_train_batches=0.5)
    assert trainer.strategy.round_index == 4


def test_fast_dev_run_makes_one_round_and_writes_nothing(fit, tmp_path):
    trainer, _ = fit(fast_dev_run=True, val=True, logger=True)
    assert trainer.strategy.round_index == 1
    assert not list(tmp_path.iterdir())


def test_validation_sees_the_aggregated_model(fit):
    seen = []

    class Module(TinyModule):
        def on_validation_start(self):
            seen.append(flat_params(self))

    torch.manual_seed(0)
    recorder = Recorder()
    fit(LBGMFederated(num_clients=4), module=Module(), val=True, callbacks=[recorder], max_epochs=3)
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen, recorder.params))


def test_val_check_interval_counts_rounds(fit):
    counts = []
    callback = LambdaCallback(on_validation_end=lambda trainer, _: counts.append(trainer.strategy.round_index))
    fit(
        LBGMFederated(num_clients=4, rounds_per_epoch=6),
        val=True,
        callbacks=[callback],
        max_epochs=1,
        val_check_interval=2,
    )
    assert counts == [2, 4, 6]


@pytest.mark.parametrize(("interval", "rounds_per_epoch", "expected"), [("epoch", 2, 0.05), ("step", 2, 0.0125)])
def test_schedulers_count_rounds(fit, interval, rounds_per_epoch, expected):
    # 0.1 halved: after each epoch, of which one is over before the second starts; or after each of three rounds.
    rates = []

    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    fit(LBGMFederated(num_clients=2, rounds_per_epoch=rounds_per_epoch), module=Module(), max_epochs=2)
    assert len(rates) == 8
    assert rates[-1] == pytest.approx(expected)


def test_a_scheduler_may_ask_for_the_number_of_steps(fit):
    class Module(TinyModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.total = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=self.total)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    _, module = fit(LBGMFederated(num_clients=4, rounds_per_epoch=3), module=Module(), max_epochs=4)
    assert module.total == 12


def test_logged_values_are_the_cohorts_weighted_mean(fit, tmp_path):
    # Client 0 has 2 examples, client 1 has 5, batches of up to 2: sizes 2 | 2, 2, 1. With lr = 0 and features as values
    # the mean of the logged batch means, weighted by size, is the mean over the seven examples, 22 / 7.
    x = torch.tensor([1.0, 2, 3, 4, 5, 6, 1])[:, None].repeat(1, 6)

    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            self.log("train/value", batch[0][:, 0].mean())
            self.log_dict({"train/sum": batch[0][:, 0].sum()}, reduce_fx="sum")
            self.log("train/max", batch[0].max(), reduce_fx="max", on_step=False, on_epoch=True)
            return self.loss(batch)

    trainer, _ = fit(
        LBGMFederated(num_clients=2, partitioner=NaturalPartitioner([0, 0, 1, 1, 1, 1, 1])),
        module=Module(lr=0.0),
        dataset=TensorDataset(x, torch.zeros(7, dtype=torch.long)),
        batch_size=2,
        logger=CSVLogger(tmp_path),
        max_epochs=2,
    )
    assert logged(trainer, "train/value") == pytest.approx({0: 22 / 7, 1: 22 / 7})
    assert logged(trainer, "train/sum") == pytest.approx({0: 22, 1: 22})
    assert logged(trainer, "train/max") == pytest.approx({0: 6, 1: 6})


def test_log_every_n_steps_is_one_by_default_and_counts_rounds(fit, tmp_path):
    trainer, _ = fit(logger=CSVLogger(tmp_path, version=0), max_epochs=4)
    assert sorted(logged(trainer, "train/loss")) == [0, 1, 2, 3]
    trainer, _ = fit(logger=CSVLogger(tmp_path, version=1), max_epochs=4, log_every_n_steps=2)
    assert sorted(logged(trainer, "train/loss")) == [1, 3]
    assert sorted(logged(trainer, "comm/uplink_bytes")) == [0, 1, 2, 3]


def test_a_torchmetrics_metric_sees_every_local_step(fit, data):
    class Module(TinyModule):
        def __init__(self):
            super().__init__(lr=0.0)
            self.acc = MulticlassAccuracy(3, average="micro")

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.acc(self(x), y)
            self.log("train/acc", self.acc, on_step=True, on_epoch=True)
            return self.loss(batch)

    torch.manual_seed(0)
    trainer, module = fit(LBGMFederated(num_clients=7), module=Module(), batch_size=4, max_epochs=1)
    x, y = data.tensors
    expected = float((module(x).argmax(1) == y).float().mean())  # lr = 0: the model never changes
    assert float(trainer.callback_metrics["train/acc_epoch"]) == pytest.approx(expected)
    assert float(trainer.callback_metrics["train/acc_step"]) == pytest.approx(expected)


def test_communication_metrics_by_hand(fit, tmp_path):
    # 21 parameters of 32 bits, 3 of 4 clients a round: 252 bytes a round up and down for FedAvg. At threshold 1 a
    # client sends one float of 4 bytes from its second round on.
    recorder = Recorder()
    strategy = LBGMFederated(num_clients=4, clients_per_round=3, uplink=[LookBack(1.0)], seed=0)
    trainer, _ = fit(strategy, logger=CSVLogger(tmp_path), callbacks=[recorder], max_epochs=6)
    seen, total = set(), 0
    for index, report in enumerate(recorder.reports):
        cohort = {client.client_id for client in report.clients}
        sent = sum(4 if client in seen else 84 for client in cohort)
        total += sent
        metrics = recorder.callback_metrics[index]
        assert metrics["comm/uplink_bytes"] == sent
        assert metrics["comm/uplink_bytes_total"] == total
        assert metrics["comm/uplink_floats_total"] == total / 4
        assert metrics["comm/downlink_bytes_total"] == 252 * (index + 1)
        assert metrics["comm/savings"] == pytest.approx(1 - total / (252 * (index + 1)))
        assert metrics["lbgm/recycled_fraction"] == pytest.approx(len(cohort & seen) / 3)
        assert metrics["fl/cohort_size"] == 3
        assert metrics["fl/rejected_clients"] == 0
        seen |= cohort
    assert logged(trainer, "comm/uplink_bytes_total")[5] == total
    assert set(logged(trainer, "lbgm/lbp_error_mean")) == set(range(6))


def test_update_norm_is_that_of_the_servers_step(fit):
    recorder = Recorder()
    torch.manual_seed(0)
    module = TinyModule()
    begin = flat_params(module)
    fit(LBGMFederated(num_clients=3, uplink=[]), module=module, callbacks=[recorder], max_epochs=1)
    expected = float((recorder.params[0] - begin).norm())
    assert recorder.callback_metrics[0]["fl/update_norm"] == pytest.approx(expected, rel=1e-5)


def test_byte_counts_in_callback_metrics_are_exact(fit):
    # From 2^24 on, float32 cannot hold every integer.
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 5000), nn.Linear(5000, 3)))
    trainer, _ = fit(LBGMFederated(num_clients=60, uplink=[]), module=module, max_epochs=7)
    expected = 7 * 60 * 4 * (6 * 5000 + 5000 + 5000 * 3 + 3)
    assert expected > 2**24
    assert int(trainer.callback_metrics["comm/uplink_bytes_total"]) == expected


def test_model_checkpoint_and_early_stopping_monitor_communication(fit, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="comm/savings", mode="max", filename="{epoch}")
    trainer, _ = fit(
        LBGMFederated(num_clients=4, uplink=[LookBack(1.0)], seed=0),
        callbacks=[checkpoint, EarlyStopping("comm/savings", mode="max", stopping_threshold=0.6)],
        enable_checkpointing=True,
        val=True,
        max_epochs=50,
    )
    # FedAvg: 84 bytes a client and round; here 84 once, then 4. Savings after t rounds: 1 - (84 + 4 (t - 1)) / 84 t,
    # which passes 0.6 at t = 3: 1 - 92 / 252 = 0.635.
    assert trainer.global_step == 3
    assert float(checkpoint.best_model_score) == pytest.approx(1 - 92 / 252)


def test_early_stopping_on_validation(fit):
    trainer, _ = fit(
        callbacks=[EarlyStopping("val/acc", mode="max", patience=1, min_delta=1.0)], val=True, max_epochs=50
    )
    assert trainer.global_step == 2


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
    assert int(trainer.callback_metrics["comm/uplink_bytes_total"]) == 2 * 3 * 4 * (51 + sent)
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
        strategy = LBGMFederated(num_clients=3, local_steps=4, seed=0)
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


class Exploding(TinyModule):
    """The loss of a client whose first feature is 100 is not finite."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        loss = loss / 0 if float(batch[0][0, 0]) == 100 else loss
        self.log("train/loss", loss)
        return loss


def test_a_client_whose_update_is_not_finite_is_left_out(fit):
    dataset = make_data(12)
    dataset.tensors[0][8:, 0] = 100
    partitioner = NaturalPartitioner([0] * 4 + [1] * 4 + [2] * 4)
    recorder = Recorder()
    torch.manual_seed(0)
    module = Exploding()
    with pytest.warns(UserWarning, match="Round 0: the update of client 2 is not finite"):
        trainer, _ = fit(
            LBGMFederated(num_clients=3, partitioner=partitioner),
            module=module,
            dataset=dataset,
            callbacks=[recorder],
            max_epochs=2,
        )
    # The two others, in a federation of their own with the weights 1/2 each.
    torch.manual_seed(0)
    reference = TinyModule()
    rest = TensorDataset(*(t[:8] for t in dataset.tensors))
    fit(
        LBGMFederated(num_clients=2, partitioner=NaturalPartitioner([0] * 4 + [1] * 4)),
        module=reference,
        dataset=rest,
        max_epochs=2,
    )
    torch.testing.assert_close(flat_params(module), flat_params(reference))
    assert recorder.callback_metrics[1]["fl/rejected_clients"] == 1
    assert recorder.callback_metrics[0]["comm/uplink_bytes"] == 2 * 84
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.filterwarnings("ignore:Round 0")
def test_a_round_without_any_finite_update_leaves_the_model(fit):
    dataset = make_data(8)
    dataset.tensors[0][:, 0] = 100
    torch.manual_seed(0)
    module = Exploding()
    begin = flat_params(module)
    trainer, _ = fit(LBGMFederated(num_clients=2), module=module, dataset=dataset, max_epochs=2)
    assert torch.equal(flat_params(module), begin)
    assert trainer.callback_metrics["fl/rejected_clients"] == 2


def test_an_exception_in_a_round_leaves_the_global_model(fit):
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1 and self.count == 2:
                raise RuntimeError("boom")
            self.count += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            self.count = 0

    torch.manual_seed(0)
    recorder, module = Recorder(), Failing()
    with pytest.raises(RuntimeError, match="boom"):
        fit(LBGMFederated(num_clients=4), module=module, callbacks=[recorder])
    assert torch.equal(flat_params(module), recorder.params[0])
    assert "log" not in vars(module)


def test_the_module_is_left_as_it_was_found(fit):
    torch.manual_seed(0)
    module = TinyModule()
    before = set(vars(module))
    _, module = fit(module=module)
    assert not {"log", "_on_before_batch_transfer"} & (set(vars(module)) - before)
    module.log  # noqa: B018 (is the class's own again)
    assert module.log.__func__ is pl.LightningModule.log


def test_client_randomness_does_not_touch_the_global_generators(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            torch.rand(3)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    module, state = Module(), torch.get_rng_state()
    torch.manual_seed(5)
    fit(LBGMFederated(num_clients=3, seed=1), module=module, shuffle=True, batch_size=4)
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(state, torch.get_rng_state())


def test_evaluation_and_prediction_use_the_global_model(fit, make_trainer):
    trainer, module = fit(val=True)
    loader = DataLoader(make_data(30, seed=1), batch_size=30)
    again = trainer.validate(module, loader, verbose=False)[0]
    assert again["val/acc"] == pytest.approx(float(trainer.callback_metrics["val/acc"]))

    class Predicting(TinyModule):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    predicting = Predicting()
    predicting.load_state_dict(module.state_dict())
    predictions = make_trainer(LBGMFederated()).predict(predicting, loader)
    assert torch.equal(predictions[0], module(make_data(30, seed=1).tensors[0]))


def test_learning_rate_monitor_and_a_users_own_callback(fit, tmp_path):
    trainer, _ = fit(
        callbacks=[LearningRateMonitor(), LBGMCallback(monitor="val/acc")], logger=CSVLogger(tmp_path), val=True
    )
    assert sum(isinstance(callback, LBGMCallback) for callback in trainer.callbacks) == 1
    assert set(logged(trainer, "lr-SGD").values()) == {0.3}


def test_fit_twice_continues(fit, data):
    strategy = LBGMFederated(num_clients=4, uplink=[LookBack(1.0)], seed=0)
    trainer, module = fit(strategy, max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, DataLoader(data, batch_size=1000))
    assert strategy.round_index == 4
    assert strategy.ledger.uplink_bits == 4 * 32 * (21 + 3)
    _, unbroken = fit(LBGMFederated(num_clients=4, uplink=[LookBack(1.0)], seed=0), max_epochs=4)
    assert torch.equal(flat_params(module), flat_params(unbroken))


def test_settings_are_resolved(fit):
    strategy = LBGMFederated(num_clients=20, clients_per_round=0.25, partitioner=IIDPartitioner(), seed=3)
    fit(strategy)
    settings = strategy.settings()
    assert settings["clients_per_round"] == 5
    assert settings["local_epochs"] == 1
    assert settings["seed"] == 3
    assert settings["num_parameters"] == 21
    assert settings["server_optimizer"] == "SGD(lr=1.0)"
