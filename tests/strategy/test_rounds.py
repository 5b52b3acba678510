"""What a Lightning user expects of a Trainer's loop, metrics and schedules, with rounds for batches."""

from __future__ import annotations

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

    strategy = LBGMFederated(num_clients=2, rounds_per_epoch=rounds_per_epoch, execution="sequential")
    fit(strategy, module=Module(), max_epochs=2)
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
