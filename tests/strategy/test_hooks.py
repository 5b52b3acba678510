"""Batch hooks are called once a round, with a `Round`; what takes it for a batch of tensors is told what to do."""

from __future__ import annotations

import collections.abc
import copy
import dataclasses

import pytest
import torch
from conftest import TinyModule, flat_params, make_data
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated, LookBack
from lightning_lbgm.data import ClientFeed, Round, make_partitions, plan_from_loader
from lightning_lbgm.data.access import BatchAccessError
from lightning_lbgm.strategy.local_outputs import LocalOutput


@pytest.fixture
def round_() -> Round:
    loader = DataLoader(make_data(20), batch_size=4)
    strategy = LBGMFederated(num_clients=3)
    partitions = make_partitions(loader.dataset, 3, strategy.partitioner, seed=0)
    return Round(5, (0, 2), ClientFeed(loader, plan_from_loader(loader, 1, None), partitions, seed=0))


USES = {
    "unpacking": lambda batch: [x for x, y in [batch]],
    "index": lambda batch: batch[0],
    "key": lambda batch: batch["image"],
    "item": lambda batch: batch.__setitem__("image", 1),
    "length": len,
    "loop": list,
    "membership": lambda batch: "image" in batch,
    "to": lambda batch: batch.to("cpu"),
    "size": lambda batch: batch.size(0),
    "items": lambda batch: batch.items(),
    "torch": torch.relu,
    "keyword": lambda batch: torch.add(input=torch.ones(1), other=batch),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_using_a_round_as_a_batch_names_the_remedy(round_, use):
    remedy = r"Round\(index=5, cohort_size=2\).*on_after_batch_transfer.*training_step.*batch\.clients\(\)"
    with pytest.raises(BatchAccessError, match=remedy):
        use(round_)


def test_what_probes_a_round_finds_an_opaque_object(round_):
    assert not hasattr(round_, "to")
    assert not hasattr(round_, "__array__")
    assert not isinstance(round_, collections.abc.Iterable)
    assert not isinstance(round_, collections.abc.Mapping)
    assert not dataclasses.is_dataclass(round_)
    assert bool(round_)
    assert getattr(round_, "image", None) is None
    assert tree_leaves([round_]) == [round_]
    assert move_data_to_device(round_, torch.device("cpu")) is round_
    assert repr(round_) == "Round(index=5, cohort_size=2)"
    assert copy.copy(round_).cohort == (0, 2)
    with pytest.raises(AttributeError, match="__missing__"):
        _ = Round.__new__(Round).__missing__


@pytest.mark.parametrize("owner", ["callback", "module"])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_hook_that_unpacks_the_batch_is_told_what_to_do(fit, owner, hook):
    def unpack(*args):
        _x, _y = args[-2]

    module = TinyModule()
    if owner == "module":
        setattr(module, hook, unpack)
        callbacks = []
    else:
        callbacks = [LambdaCallback(**{hook: unpack})]
    with pytest.raises(BatchAccessError, match="on_after_batch_transfer"):
        fit(module=module, callbacks=callbacks)


def test_a_hook_may_draw_the_rounds_batches(fit):
    seen, trained = [], []

    class Module(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            seen.extend(float(data[0].sum()) for _, batches in batch.clients() for data, _ in batches)

        def training_step(self, batch, batch_idx):
            trained.append(float(batch[0].sum()))
            return super().training_step(batch, batch_idx)

    fit(LBGMFederated(num_clients=4, execution="sequential"), module=Module(), batch_size=7, shuffle=True)
    assert seen == trained
    assert len(seen) == 3 * 4 * 3  # rounds, clients, batches of 15 examples


def test_logging_in_a_batch_hook_weighs_rounds_by_their_examples(fit):
    class Module(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.log("start", float(batch.index), on_step=False, on_epoch=True)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("end", float(outputs["loss"]), on_step=False, on_epoch=True)

    # 60 examples at 7 clients: 9, 9, 9, 9, 8, 8, 8 of them, of which a round has three clients.
    sizes = []
    strategy = LBGMFederated(num_clients=7, clients_per_round=3, rounds_per_epoch=4, seed=0)
    callback = LambdaCallback(on_train_batch_end=lambda *args: sizes.append(sum(args[3].num_examples)))
    trainer, _ = fit(strategy, module=Module(), max_epochs=1, callbacks=[callback])
    assert len(set(sizes)) > 1
    expected = sum(index * size for index, size in enumerate(sizes)) / sum(sizes)
    assert float(trainer.callback_metrics["start"]) == pytest.approx(expected)


# Outputs


@pytest.mark.parametrize("execution", ["sequential", "auto"])
def test_outputs_hold_the_mean_loss_and_no_local_output(fit, execution):
    losses = []

    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append((loss.detach(), len(batch[0])))
            return {"loss": loss, "preds": self(batch[0])}

    got = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            got.append(outputs)

    fit(LBGMFederated(num_clients=4, execution=execution), module=Module(), max_epochs=1, callbacks=[Look()])
    outputs = got[0]
    assert list(outputs) == ["loss", "preds"]
    if execution == "sequential":
        assert float(outputs["loss"]) == pytest.approx(sum(float(x) * n for x, n in losses) / 60)
    for use in (
        lambda value: value.argmax(1),
        lambda value: value[0],
        lambda value: value + 1,
        lambda value: 2 * value,
        float,
        torch.sigmoid,
        lambda value: f"{value:.3f}",
    ):
        with pytest.raises(BatchAccessError, match=r"outputs\['preds'\].*each local step.*self\.log"):
            use(outputs["preds"])
    assert repr(outputs["preds"]) == "LocalOutput('preds')"


def test_extra_outputs_that_nobody_uses_do_no_harm(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "preds": self(batch[0]).detach()}

    torch.manual_seed(0)
    _, module = fit(module=Module())
    torch.manual_seed(0)
    _, plain = fit(module=TinyModule())
    assert torch.equal(flat_params(module), flat_params(plain))
    assert isinstance(LocalOutput("a"), LocalOutput)


# A module's own optimizer_step


class Own(TinyModule):
    how = "step"

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if self.how == "closure, then step":
            optimizer_closure()
            optimizer.step()
        elif self.how == "closure" or (self.how == "every second" and batch_idx % 2):
            optimizer_closure()
        elif self.how == "step without closure":
            optimizer.step()
        elif self.how == "twice":
            optimizer.step(closure=optimizer_closure)
            optimizer.step(closure=optimizer_closure)
        elif self.how == "closure and step":
            optimizer_closure()
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("how", ["step", "closure, then step"])
def test_a_modules_own_step_with_the_closure_works(fit, how):
    torch.manual_seed(0)
    module = Own()
    module.how = how
    trainer, _ = fit(module=module)
    torch.manual_seed(0)
    _, plain = fit(module=TinyModule())
    assert trainer.strategy.round_index == 3
    assert torch.equal(flat_params(module), flat_params(plain))
    assert "optimizer_step" not in vars(module)


@pytest.mark.parametrize(
    ("how", "message", "done"),
    [
        ("closure", "Own.optimizer_step.*closure in round 0, but not `optimizer.step`.*exactly once", 0),
        ("every second", "closure in round 1, but not", 1),
        ("step without closure", "`optimizer.step` in round 0 without a closure", 0),
        ("twice", "closure a second time in round 0", 0),
        ("closure and step", "closure a second time in round 0", 0),
    ],
)
def test_a_modules_own_step_that_is_no_single_step_is_refused(fit, how, message, done):
    module = Own()
    module.how = how
    begin = flat_params(module)
    strategy = LBGMFederated(num_clients=4, uplink=[LookBack(1.0)], seed=0, rounds_per_epoch=4)
    with pytest.raises(MisconfigurationException, match=message):
        fit(strategy, module=module)
    assert strategy.round_index == done
    if not done:
        assert torch.equal(flat_params(module), begin)
        assert strategy.ledger.uplink_bits == 0


# Lightning's callbacks


def throughput(fit, tmp_path, **functions):
    callback = ThroughputMonitor(**functions)
    trainer, _ = fit(
        LBGMFederated(num_clients=4, local_epochs=2, execution="sequential"),
        batch_size=7,
        val=True,
        callbacks=[callback],
        logger=CSVLogger(tmp_path),
    )
    return callback, trainer


@pytest.mark.filterwarnings("ignore:.*flops_per_batch")
def test_throughput_monitor_counts_local_examples(fit, tmp_path):
    def size(batch):
        return batch[0].size(0)

    callback, trainer = throughput(fit, tmp_path, batch_size_fn=size, length_fn=lambda batch: batch[0].numel())
    trainer.logger.save()
    assert "train/samples" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    # Three rounds of two passes over 60 examples of six numbers; 30 for validation, where counting starts each time.
    assert dict(callback._samples) == {"train": 3 * 2 * 60, "validate": 30}
    assert dict(callback._lengths) == {"train": 3 * 2 * 360, "validate": 180}
    assert callback.batch_size_fn is size  # as it was given


@pytest.mark.filterwarnings("ignore:.*flops_per_batch")
@pytest.mark.parametrize("size", [lambda batch: batch.num_examples, lambda batch: sum(batch.num_examples)])
def test_throughput_monitor_takes_functions_of_a_round(fit, size):
    callback = ThroughputMonitor(batch_size_fn=size)
    fit(LBGMFederated(num_clients=4), callbacks=[callback])
    assert callback._samples["train"] == 3 * 60


@pytest.mark.filterwarnings("ignore:.*flops_per_batch")
def test_throughput_monitor_with_a_wrong_function_shows_its_error(fit):
    with pytest.raises(BatchAccessError, match="has no attribute 'image'"):
        fit(callbacks=[ThroughputMonitor(batch_size_fn=lambda batch: batch.image.size(0))])


CALLBACKS = {
    "device stats": lambda: DeviceStatsMonitor(cpu_stats=False),
    "learning rate": LearningRateMonitor,
    "pruning": lambda: ModelPruning("l1_unstructured", amount=0.3),
    "spikes": SpikeDetection,
    "timer": lambda: Timer(duration={"minutes": 5}),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.3, swa_epoch_start=2),
    "averaging": WeightAveraging,
    "EMA": EMAWeightAveraging,
}


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_lightnings_callbacks_work(fit, tmp_path, make):
    trainer, module = fit(callbacks=[make()], val=True, logger=CSVLogger(tmp_path), max_epochs=4)
    assert trainer.strategy.round_index == trainer.global_step == 4
    assert torch.isfinite(flat_params(module)).all()


class Globals(Callback):
    def __init__(self) -> None:
        self.params = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.params.append(flat_params(pl_module))


def test_averaging_callbacks_average_the_global_models(fit):
    def mean(params):
        return torch.stack(params).mean(0)

    torch.manual_seed(0)
    globals_ = Globals()
    _, module = fit(callbacks=[globals_, WeightAveraging()], max_epochs=4)
    assert torch.allclose(flat_params(module), mean(globals_.params), atol=1e-6)
    torch.manual_seed(0)
    globals_ = Globals()
    swa = StochasticWeightAveraging(swa_lrs=0.3, swa_epoch_start=2, annealing_epochs=1)
    _, module = fit(callbacks=[globals_, swa], max_epochs=5)
    # Lightning averages at the start of an epoch, from the second to the last: the models after the first four.
    assert torch.allclose(flat_params(module), mean(globals_.params[:4]), atol=1e-6)


def test_swa_with_batch_norm_is_refused(fit):
    module = TinyModule(net=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging.*EMAWeightAveraging"):
        fit(module=module, callbacks=[StochasticWeightAveraging(swa_lrs=0.1)])
