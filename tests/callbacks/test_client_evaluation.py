"""``ClientEvaluation`` against a plain loop over each client's held-out examples, in real fits."""

from __future__ import annotations

import csv
import json
import math
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_lbgm import (
    ClientEvaluation,
    ConvergenceMonitor,
    ErrorFeedback,
    LBGMCallback,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    PathologicalPartitioner,
    TopK,
)

STATISTICS = ("mean", "worst", "p10", "std", "worse_than_own")


class Watch(Callback):
    """After each round: the parameters and what stands in ``callback_metrics``; and each client's local parameters."""

    def __init__(self) -> None:
        self.params, self.metrics, self.reports = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.params.append(flat_params(pl_module))
        self.reports.append(trainer.strategy.last_report)
        self.metrics.append({k: plain(v) for k, v in trainer.callback_metrics.items()})


def plain(value):
    """Return a number, with None for NaN, so that it can be compared."""
    return None if math.isnan(value) else float(value)


def evaluate(fit, strategy, callback, **kwargs):
    """Train with the callback and return (trainer, module, the watch), quietly."""
    watch = Watch()
    callbacks = [callback, watch, LBGMCallback(figures=False), *kwargs.pop("callbacks", [])]
    callback.figure = kwargs.pop("figure", False)
    trainer, module = fit(strategy, callbacks=callbacks, **kwargs)
    return trainer, module, watch


def partitions_of(trainer):
    """Return each client's training examples and held-out examples, as sets of positions in ``make_data``."""
    feed = trainer.strategy.feed
    held_out = feed.held_out
    x = make_data().tensors[0]
    positions = {tuple(row.tolist()): k for k, row in enumerate(x)}
    out = {
        k: [positions[tuple(row.tolist())] for batch in held_out.batches(k) for row in batch.data[0]]
        for k in held_out.clients
    }
    return [part.tolist() for part in feed.partitions], out


def accuracy_and_loss(params, examples, dataset=None):
    """Return what a linear classifier with 6 features and 3 classes comes to, by plain NumPy."""
    x, y = (t.double().numpy() for t in (dataset or make_data())[examples])
    weight, bias = params[:18].double().numpy().reshape(3, 6), params[18:].double().numpy()
    logits = x @ weight.T + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y.astype(int)]
    return float((logits.argmax(1) == y).mean()), float(losses.mean())


def locally_trained(params, examples, lr, steps):
    """Full-batch gradient steps of a client by plain autograd."""
    x, y = make_data()[examples]
    net = nn.Linear(6, 3)
    vector_to_parameters(params.clone(), net.parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients):
                parameter -= lr * gradient
    return parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
def test_the_metrics_are_those_of_a_plain_loop_over_the_held_out_examples(fit, execution):
    strategy = LBGMFederated(
        num_clients=5, partitioner=PathologicalPartitioner(2), local_steps=2, seed=3, execution=execution,
        uplink=[ErrorFeedback(TopK(0.3)), LookBack(0.4)],
    )  # fmt: skip
    callback = ClientEvaluation(split=0.3, every_n_rounds=2, fine_tune_steps=3)
    trainer, _, watch = evaluate(fit, strategy, callback, max_epochs=4)
    train, held_out = partitions_of(trainer)
    assert sorted(sum(train, []) + sum(held_out.values(), [])) == list(range(60))  # noqa: RUF017
    sizes = [len(held_out[k]) for k in range(5)]
    assert sizes == [max(1, round(0.3 * (len(train[k]) + len(held_out[k])))) for k in range(5)]
    assert [c.num_examples for c in watch.reports[0].clients] == [len(part) for part in train]

    torch.manual_seed(0)
    start = flat_params(TinyModule())
    for round_index in (0, 1, 3):
        before = start if round_index == 0 else watch.params[round_index - 1]
        local = [locally_trained(before, train[k], 0.3, 2) for k in range(5)]
        tuned = [locally_trained(watch.params[round_index], train[k], 0.3, 3) for k in range(5)]
        found = watch.metrics[round_index]
        for place, (name, worst, end) in enumerate([("acc", min, 10), ("loss", max, 90)]):
            values, own, after = (
                [accuracy_and_loss(p, held_out[k])[place] for k, p in enumerate(models)]
                for models in ([watch.params[round_index]] * 5, local, tuned)
            )
            expected = {
                "mean": sum(n * v for n, v in zip(sizes, values)) / sum(sizes),
                "worst": worst(values),
                "p10": float(np.percentile(values, end)),
                "std": math.sqrt(sum((v - sum(values) / 5) ** 2 for v in values) / 5),
                "worse_than_own": sum((v < o) if name == "acc" else (v > o) for v, o in zip(values, own)) / 5,
            }
            assert {s: found[f"clients/val/{name}_{s}"] for s in STATISTICS} == pytest.approx(expected, abs=2e-6)
            assert found[f"clients/tuned/val/{name}_worst"] == pytest.approx(worst(after), abs=2e-6)
            weighted = sum(n * v for n, v in zip(sizes, after)) / sum(sizes)
            assert found[f"clients/tuned/val/{name}_mean"] == pytest.approx(weighted, abs=2e-6)
    shown = [{k: v for k, v in metrics.items() if k.startswith("clients/")} for metrics in watch.metrics]
    assert shown[1] != shown[0]
    assert shown[2] == shown[1]  # what callbacks see between two evaluations


class Restless(TinyModule):
    """Buffers, dropout, random numbers, momentum, and metrics logged in each of Lightning's ways."""

    def __init__(self):
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        super().__init__(lr=0.1, net=net, momentum=0.9)
        self.net[0].eval()
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        kinds = [torchmetrics.classification.MulticlassPrecision, torchmetrics.classification.MulticlassRecall]
        self.both = torchmetrics.MetricCollection([kind(3, average="macro") for kind in kinds], prefix="val/")
        self.best = torchmetrics.MaxMetric()
        self.register_buffer("seen", torch.zeros(6))
        self.sums = []

    def training_step(self, batch, batch_idx):
        self.seen = 0.5 * (self.seen + batch[0].mean(0))
        self.train_acc(self(batch[0]), batch[1])
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self):
        self.sums = []

    def validation_step(self, batch, batch_idx):
        x, y = batch
        assert not self.training
        assert not torch.is_grad_enabled()
        assert not self.trainer.training
        output = self(x)
        self.seen += 1  # undone
        self.acc(output, y)
        self.log("val/acc", self.acc)
        self.both.update(output, y)
        self.log("val/noise", torch.rand(()))
        self.sums.append(float(x.sum()))

    def on_validation_epoch_end(self):
        self.log_dict(self.both.compute())
        self.both.reset()
        self.best(self.acc.compute())
        self.log("val/best", self.best.compute())
        self.log("val/sum", sum(self.sums))


def restless(fit, split, every=10**9, buffers="average", max_epochs=4, **settings):
    torch.manual_seed(0)
    strategy = LBGMFederated(
        num_clients=4, clients_per_round=3, uplink=[TopK(0.5)], seed=1, buffers=buffers, execution="sequential"
    )
    callback = ClientEvaluation(split, every_n_rounds=every, **settings)
    return evaluate(
        fit, strategy, callback, module=Restless(), batch_size=4, shuffle=True, max_epochs=max_epochs, val=True
    )


@pytest.mark.parametrize("buffers", ["average", "client"])
def test_training_is_the_same_with_evaluations_and_without(fit, buffers):
    trainer, module, watch = restless(fit, 0.25, every=1, buffers=buffers, fine_tune_steps=2)
    seldom_trainer, seldom, other = restless(fit, 0.25, buffers=buffers, own_models=False)
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
    assert all(map(torch.equal, watch.params, other.params))
    assert all(map(torch.equal, module.state_dict().values(), seldom.state_dict().values()))
    assert [part.training for part in module.modules()] == [part.training for part in seldom.modules()]
    for mine, theirs in zip(watch.metrics, other.metrics):
        kept = {k: v for k, v in mine.items() if not k.startswith("clients/")}
        assert kept == {k: v for k, v in theirs.items() if not k.startswith("clients/")}
        assert "train/loss" in kept
    assert trainer.callback_metrics["train/acc"] == seldom_trainer.callback_metrics["train/acc"]
    assert trainer.optimizers[0].state_dict() == seldom_trainer.optimizers[0].state_dict()  # no momentum is left
    assert torch.equal(module.best.max_value, seldom.best.max_value)  # Lightning's own validation has moved it
    own = {k: v["buffers"] for k, v in trainer.strategy._federation.clients.items() if "buffers" in v}
    others = {k: v["buffers"] for k, v in seldom_trainer.strategy._federation.clients.items() if "buffers" in v}
    assert (len(own) > 0) == (buffers == "client")
    assert all(torch.equal(tensor, others[k][name]) for k, kept in own.items() for name, tensor in kept.items())


def test_metrics_of_torchmetrics_are_of_one_client_each(fit):
    trainer, module, watch = restless(fit, 0.45, every=1, own_models=False, max_epochs=2)
    held_out = trainer.strategy.feed.held_out
    accuracies, precisions, recalls, sums, sizes = [], [], [], [], []
    module.eval()
    for k in held_out.clients:
        batches = [batch.data for batch in held_out.batches(k)]
        x, y = (torch.cat(parts) for parts in zip(*batches))
        assert len(batches) > 1
        predicted = module(x).argmax(1)
        accuracies.append((predicted == y).double().mean())
        hits = [((predicted == c) & (y == c)).sum().double() for c in range(3)]
        there = [c for c in range(3) if ((predicted == c) | (y == c)).any()]  # torchmetrics leaves out absent classes
        precisions.append(sum(hits[c] / max((predicted == c).sum(), 1) for c in there) / len(there))
        recalls.append(sum(hits[c] / max((y == c).sum(), 1) for c in there) / len(there))
        sums.append(float(x.sum()))
        sizes.append(len(y))
    metrics = watch.metrics[-1]
    mean = lambda values: sum(n * float(v) for n, v in zip(sizes, values)) / sum(sizes)  # noqa: E731
    assert metrics["clients/val/acc_mean"] == pytest.approx(mean(accuracies), abs=1e-6)
    assert metrics["clients/val/acc_worst"] == pytest.approx(float(min(accuracies)), abs=1e-6)
    assert metrics["clients/val/best_worst"] == pytest.approx(float(min(accuracies)), abs=1e-6)
    assert metrics["clients/val/MulticlassPrecision_mean"] == pytest.approx(mean(precisions), abs=1e-6)
    assert metrics["clients/val/MulticlassRecall_mean"] == pytest.approx(mean(recalls), abs=1e-6)
    assert metrics["clients/val/sum_mean"] == pytest.approx(mean(sums), rel=1e-4, abs=1e-3)


def test_with_own_buffers_each_client_is_evaluated_with_its_own(fit):
    class Offset(TinyModule):
        """Each client's buffer is the mean of its examples; validation logs it."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.mean.copy_(batch[0].mean())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val/mean", self.mean)

    strategy = LBGMFederated(num_clients=4, seed=0, buffers="client")
    trainer, module, watch = evaluate(fit, strategy, ClientEvaluation(0.2), module=Offset(), max_epochs=1)
    x, (train, held_out) = make_data().tensors[0], partitions_of(trainer)
    means = [float(x[part].mean()) for part in train]
    weighted = sum(len(held_out[k]) * means[k] for k in range(4)) / sum(map(len, held_out.values()))
    assert watch.metrics[-1]["clients/val/mean_mean"] == pytest.approx(weighted, abs=1e-6)
    assert watch.metrics[-1]["clients/val/mean_worst"] == pytest.approx(min(means), abs=1e-6)
    assert module.mean == 0


def test_clients_with_loaders_of_their_own(fit, tmp_path):
    torch.manual_seed(0)
    data, module = make_data(), TinyModule()
    parts = [Subset(data, range(0, 20)), Subset(data, range(20, 50)), Subset(data, [50]), Subset(data, range(51, 60))]
    loaders = {name: DataLoader(part, batch_size=4, shuffle=True) for name, part in zip("abcd", parts)}
    watch, root = Watch(), tmp_path
    callbacks = [ClientEvaluation(0.25, clients=["a", "d", 1]), watch]
    trainer = build_trainer(
        root, LBGMFederated(num_clients=None, seed=2), callbacks=callbacks, max_epochs=2, logger=CSVLogger(root)
    )
    trainer.fit(module, loaders)
    feed = trainer.strategy.feed
    assert feed.held_out.clients == (0, 1, 3)  # "c" has one example only
    assert [feed.num_examples(k) for k in range(4)] == [15, 22, 1, 7]
    values = []
    for k, client in enumerate("abcd"):
        trained = {tuple(row.tolist()) for batch in feed.loaders[k] for row in batch[0]}
        if k in feed.held_out.clients:
            x, y = (torch.cat(t) for t in zip(*[batch.data for batch in feed.held_out.batches(k)]))
            out = {tuple(row.tolist()) for row in x}
            assert trained.isdisjoint(out)
            assert len(trained) + len(out) == len(parts[k]), client
            values.append(accuracy_and_loss(flat_params(module), range(len(y)), TensorDataset(x, y))[0])
    assert watch.metrics[-1]["clients/val/acc_worst"] == pytest.approx(min(values))
    rows = list(csv.DictReader(next(root.rglob("client_evaluation.csv")).open()))
    assert [(row["client"], row["name"], row["num_examples"]) for row in rows[-3:]] == [
        ("0", "a", "5"), ("1", "b", "8"), ("3", "d", "2"),
    ]  # fmt: skip


def test_a_validation_set_of_natural_clients(fit):
    ids = ["cab"[k % 3] for k in range(60)]
    val = make_data(12, seed=7)
    strategy = LBGMFederated(num_clients=3, partitioner=NaturalPartitioner(ids), seed=0)
    callback = ClientEvaluation(data=val, keys=list("abbbbbcccccc"), own_models=False)
    _, _, watch = evaluate(fit, strategy, callback, max_epochs=2)
    values = [accuracy_and_loss(watch.params[-1], part, val)[0] for part in ([0], range(1, 6), range(6, 12))]
    found = {s: watch.metrics[-1][f"clients/val/acc_{s}"] for s in ("mean", "worst", "std")}
    mean = (values[0] + 5 * values[1] + 6 * values[2]) / 12
    assert found == pytest.approx({"mean": mean, "worst": min(values), "std": float(np.std(values))}, abs=1e-6)
    assert "clients/val/acc_worse_than_own" not in watch.metrics[-1]
    assert [c.num_examples for c in watch.reports[0].clients] == [20, 20, 20]  # nothing is held out


def test_callbacks_can_monitor_the_worst_client(fit, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="clients/val/acc_worst", mode="max", filename="best", save_top_k=1)
    stopping = EarlyStopping("clients/val/loss_worst", mode="min", patience=3, min_delta=100.0)
    strategy = LBGMFederated(num_clients=4, seed=0)
    trainer, _, watch = evaluate(
        fit, strategy, ClientEvaluation(every_n_rounds=3), callbacks=[checkpoint, stopping], max_epochs=20,
        enable_checkpointing=True, logger=CSVLogger(tmp_path),
    )  # fmt: skip
    assert trainer.global_step == 4  # the first sets the mark, and three rounds do not improve on it by 100
    assert checkpoint.best_model_score == max(m["clients/val/acc_worst"] for m in watch.metrics)
    steps = [int(row["step"]) for row in rows_of(tmp_path) if row.get("clients/val/acc_worst")]
    assert steps == [0, 2, 3]


def test_a_run_that_is_stopped_early_is_evaluated_at_its_end(fit, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.global_step == 3

    logger = CSVLogger(tmp_path)
    evaluate(
        fit, LBGMFederated(num_clients=4, seed=0), ClientEvaluation(every_n_rounds=50), callbacks=[Stop()],
        max_epochs=9, logger=logger, figure=True,
    )  # fmt: skip
    assert [int(row["step"]) for row in rows_of(tmp_path) if row.get("clients/val/acc_worst")] == [0, 2]
    table = list(csv.DictReader(next(tmp_path.rglob("client_evaluation.csv")).open()))
    assert [row["round"] for row in table] == ["0"] * 4 + ["2"] * 4
    assert len(list(tmp_path.rglob("figures/clients.png"))) == 1


def rows_of(folder):
    return list(csv.DictReader(next(folder.rglob("metrics.csv")).open()))


def test_resuming_goes_on_with_what_is_known_of_clients(fit, tmp_path):
    settings = {"every_n_rounds": 4, "fine_tune_steps": 1}

    def run(folder, **kwargs):
        checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        strategy = LBGMFederated(num_clients=6, clients_per_round=2, local_steps=2, seed=4, uplink=[TopK(0.4)])
        callback = ClientEvaluation(**settings)
        stopping = EarlyStopping("clients/val/acc_worst", patience=100)  # wants a value in the first round
        torch.manual_seed(0)
        _, _, watch = evaluate(
            fit, strategy, callback, callbacks=[checkpoint, stopping], enable_checkpointing=True, max_epochs=7,
            batch_size=4, shuffle=True, module=TinyModule(), **kwargs,
        )  # fmt: skip
        return callback, watch

    whole, watch = run(tmp_path / "whole")
    for step in (2, 5):
        resumed, other = run(tmp_path / f"from {step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.state_dict() == whole.state_dict()
        for mine, unbroken in zip(other.metrics, watch.metrics[step:], strict=True):
            assert {k: (v, unbroken[k]) for k, v in mine.items() if v != unbroken[k]} == {}
            assert {k for k in mine if k[:8] == "clients/"} == {k for k in unbroken if k[:8] == "clients/"}
    assert sum(whole.state_dict()["history"]["uplink_bytes"].values()) == sum(
        client.uplink_bits / 8 for report in watch.reports for client in report.clients
    )
    settings["split"] = 0.4
    with pytest.raises(MisconfigurationException, match=r"other training examples.*split"):
        run(tmp_path / "other", ckpt_path=tmp_path / "whole" / "step=2.ckpt")


class Interrupt(Callback):
    """Fails in the hook that ends round 2, once."""

    done = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.index == 2 and not self.done:
            self.done = True
            raise RuntimeError("stopped")


def test_a_round_that_is_taken_back_is_counted_once(tmp_path):
    def run(callbacks):
        torch.manual_seed(0)
        module, callback = TinyModule(), ClientEvaluation(every_n_rounds=2, figure=False)
        strategy = LBGMFederated(num_clients=4, clients_per_round=3, seed=0)
        trainer = build_trainer(tmp_path, strategy, callbacks=[callback, *callbacks], max_epochs=5)
        loader = DataLoader(make_data(), batch_size=5, shuffle=True)
        if callbacks:
            with pytest.raises(RuntimeError, match="stopped"):
                trainer.fit(module, loader)
        trainer.fit(module, loader)
        return callback.state_dict(), flat_params(module)

    (broken, params), (whole, expected) = run([Interrupt()]), run([])
    assert broken == whole
    assert torch.equal(params, expected)


def test_without_a_split_the_round_is_what_it_is_without_the_callback(fit):
    strategies = [LBGMFederated(num_clients=4, seed=0, uplink=[TopK(0.5)]) for _ in range(2)]
    recorder = Recorder()
    _, _, watch = evaluate(fit, strategies[0], ClientEvaluation(data=make_data(20, seed=5)), batch_size=5, shuffle=True)
    fit(strategies[1], callbacks=[recorder], batch_size=5, shuffle=True)
    assert all(map(torch.equal, watch.params, recorder.params))


# Errors


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "split=...)` must be a share in (0, 1), such as 0.2; got 1.0", {"split": 1.0}),
        (ValueError, "got True", {"split": True}),
        (ValueError, "holds out training examples", {"split": 0.2, "data": [1]}),
        (ValueError, "`data`, which is not given", {"keys": [1]}),
        (ValueError, "every_n_rounds=...)` must be an integer, at least 1; got 0", {"every_n_rounds": 0}),
        (ValueError, "fine_tune_steps=...)` must be an integer, at least 0; got 1.5", {"fine_tune_steps": 1.5}),
        (ValueError, "at least one client; got []", {"clients": []}),
        (ValueError, "at least one client; got 0", {"clients": 0}),
        (TypeError, "a list of ids or names; got 'a'", {"clients": "a"}),
        (TypeError, "`lower_is_better` must be", {"lower_is_better": "val/loss"}),
    ],
)
def test_arguments_out_of_range_are_refused(error, words, settings):
    with pytest.raises(error, match=re.escape(words)):
        ClientEvaluation(**settings)


class WithoutValidation(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Vectors(TinyModule):
    def validation_step(self, batch, batch_idx):
        self.log("val/both", torch.zeros(2))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(zip(*make_data(4).tensors))


def test_a_fit_that_cannot_be_evaluated_is_refused(fit, tmp_path):
    with pytest.raises(MisconfigurationException, match="`WithoutValidation` has none"):
        fit(module=WithoutValidation(), callbacks=[ClientEvaluation()])
    with pytest.raises(ValueError, match=r"'val/both'.* no single number"):
        fit(module=Vectors(), callbacks=[ClientEvaluation()])
    with pytest.raises(ValueError, match="more than the 4 clients"):
        fit(callbacks=[ClientEvaluation(clients=5)])
    with pytest.raises(MisconfigurationException, match="reports on a federation"):
        fit("auto", callbacks=[ClientEvaluation()])
    loaders = [DataLoader(make_data(4)), DataLoader(Endless())]
    trainer = build_trainer(tmp_path, LBGMFederated(num_clients=None), callbacks=[ClientEvaluation()])
    with pytest.raises(ValueError, match=r"client '1'.*`IterableDataset`.*ClientEvaluation\(data="):
        trainer.fit(TinyModule(), loaders)


def test_callbacks_that_want_other_shares_are_refused(fit):
    monitor = ConvergenceMonitor()
    monitor.held_out = 0.5
    with pytest.raises(
        MisconfigurationException, match=re.escape("different shares of the clients' examples held out, [0.2, 0.5]")
    ):
        fit(callbacks=[ClientEvaluation(), monitor])


def test_the_state_is_of_built_ins(fit):
    callback = ClientEvaluation(figure=False)
    evaluate(fit, LBGMFederated(num_clients=3, seed=0), callback, max_epochs=2)
    state = callback.state_dict()
    assert json.loads(json.dumps(state))["metrics"] == state["metrics"]
