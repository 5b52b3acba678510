"""Clients trained in chunks give what clients trained one after the other give, or say why they cannot."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lbgm import LBGMFederated, LookBack, NaturalPartitioner

IMAGES = TensorDataset(
    torch.randn(56, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.randint(0, 3, (56,), generator=torch.Generator().manual_seed(1)),
)


def fcn():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def fcn_batch_norm():
    # No bias in front of the BatchNorm: its gradient is rounding alone, which Adam would blow up.
    return nn.Sequential(nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


def train(fit, execution, net=fcn, module=None, dataset=None, num_clients=7, chunk=3, trainer=None, **strategy):
    """Train for three rounds in chunks of three; return (parameters, buffers, metrics, reports)."""
    trainer = dict(trainer or {})
    settings = trainer.pop("module", {"lr": 0.1})
    torch.manual_seed(0)
    module = TinyModule(net=net(), **settings) if module is None else module()
    recorder = Recorder()
    strategy = {"local_steps": 4, "seed": 0, "uplink": [LookBack(0.5)], **strategy}
    fit(
        LBGMFederated(num_clients=num_clients, execution=execution, vectorized_chunk=chunk, **strategy),
        module=module,
        dataset=dataset or make_data(56),
        **{"batch_size": 4, "shuffle": True, "callbacks": [recorder], "max_epochs": 3, **trainer},
    )
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return flat_params(module), buffers, recorder.callback_metrics, recorder.reports


def assert_agree(fit, tolerance=1e-5, **settings):
    sequential, vectorized = (train(fit, execution, **settings) for execution in ("sequential", "vectorized"))
    torch.testing.assert_close(vectorized[0], sequential[0], atol=tolerance, rtol=tolerance)
    for name, buffer in sequential[1].items():
        torch.testing.assert_close(vectorized[1][name], buffer, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(vectorized[2], sequential[2]):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
    for ours, theirs in zip(vectorized[3], sequential[3]):
        assert [c.client_id for c in ours.clients] == [c.client_id for c in theirs.clients]
        assert [c.local_steps for c in ours.clients] == [c.local_steps for c in theirs.clients]
        assert [c.uplink_bits for c in ours.clients] == [c.uplink_bits for c in theirs.clients]
        assert [c.loss for c in ours.clients] == pytest.approx([c.loss for c in theirs.clients], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
        (torch.optim.Adagrad, {"lr": 0.05}),
        (torch.optim.Adamax, {"lr": 0.01}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.RAdam, {"lr": 0.01}),
        (torch.optim.Adadelta, {"lr": 1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_optimizers(fit, optimizer, settings):
    assert_agree(fit, trainer={"module": {"optimizer": optimizer, **settings}})


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_per_client(fit, algorithm):
    # The median norm of a client's gradient is about 0.6, so that some are clipped and some are not.
    bound = 0.6 if algorithm == "norm" else 0.1
    assert_agree(fit, trainer={"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm})


def test_parameters_with_one_gradient_in_common_are_clipped_once(fit):
    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
            self.scalar = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.scalar * self.net(x) + (self.first + self.second)

    assert_agree(fit, module=Module, trainer={"gradient_clip_val": 0.1})


@pytest.mark.parametrize("buffers", ["average", "server", "client"])
@pytest.mark.filterwarnings("ignore:.*buffers='client'")
def test_batch_norm(fit, buffers):
    assert_agree(fit, net=fcn_batch_norm, buffers=buffers)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_convolutions(fit, optimizer):
    assert_agree(fit, net=cnn, dataset=IMAGES, trainer={"module": {"optimizer": optimizer, "lr": 0.01}})


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet18(fit, norm):
    from torchvision.models import resnet18

    # In double precision: BatchNorm over four values a channel makes much of rounding.
    def net():
        layer = nn.BatchNorm2d if norm == "batch" else (lambda channels: nn.GroupNorm(8, channels))
        return resnet18(num_classes=3, norm_layer=layer).double()

    images = TensorDataset(
        torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double(), IMAGES.tensors[1][:24]
    )
    settings = {"optimizer": torch.optim.SGD, "lr": 0.01, "momentum": 0.9}
    assert_agree(
        fit, net=net, dataset=images, num_clients=3, local_steps=2, trainer={"module": settings, "max_epochs": 2}
    )


def test_clients_of_unequal_size_form_chunks_of_their_like(fit):
    # 8, 8, 8, 5, 5, 13 and 9 examples, all of each in a round: 2, 2, 2, 2, 2, 4 and 3 steps, the last ones smaller.
    owners = [client for client, size in enumerate((8, 8, 8, 5, 5, 13, 8)) for _ in range(size)] + [6]
    assert_agree(fit, partitioner=NaturalPartitioner(owners), local_steps=None, local_epochs=1)


def test_some_of_the_clients_take_part(fit):
    assert_agree(fit, clients_per_round=4, num_clients=9)


def test_frozen_and_unused_parameters_stay_as_they_are(fit):
    class Module(TinyModule):
        def __init__(self):
            super().__init__(lr=0.05, net=fcn(), optimizer=torch.optim.AdamW, weight_decay=0.5)
            self.net[0].weight.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))  # no gradient: AdamW does not decay it

    before = fcn()
    assert_agree(fit, module=Module)
    parameters = train(fit, "vectorized", module=Module)[0]
    assert parameters[:3].tolist() == [1.0, 1.0, 1.0]
    assert len(parameters) == 3 + sum(p.numel() for p in before.parameters()) - 72


def test_tied_parameters_and_groups_of_parameters(fit):
    class Module(TinyModule):
        def __init__(self):
            super().__init__(net=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)))
            self.net[2].weight = self.net[0].weight

        def configure_optimizers(self):
            groups = [{"params": self.net[:3].parameters(), "lr": 0.05}, {"params": self.net[3].parameters()}]
            return torch.optim.SGD(groups, lr=0.2, momentum=0.5)

    assert_agree(fit, module=Module)


def test_schedules_hold_in_the_round(fit, recwarn):
    class Module(TinyModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]

    assert_agree(fit, module=Module)
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]


def test_every_way_of_logging(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss, True, False)
            self.log_dict({"norm": self.net.weight.norm(), "one": loss[None] * 2})
            self.log("max", loss, reduce_fx="max")
            self.log("sum", loss.detach().double(), reduce_fx="sum")
            self.log("number", 3.0)
            self.log("weighted", loss, batch_size=1 + batch_idx)
            if batch_idx == 2:
                self.log("sometimes", loss)
            return {"loss": loss, "other": 1}

    assert_agree(fit, module=Module)


def test_a_step_may_be_skipped(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) if batch_idx % 2 else None

    assert_agree(fit, module=Module)


class Dicts(Dataset):
    """Examples as nested dicts, with a plain value among the tensors."""

    def __len__(self):
        return 56

    def __getitem__(self, index):
        x, y = make_data(56)[index]
        return {"in": {"x": x}, "y": y}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nested_batches(tmp_path, num_workers):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            assert batch["scale"] == 2
            return self.loss((batch["in"]["x"], batch["y"]))

    def collate(examples):
        return {**torch.utils.data.default_collate(examples), "scale": 2}

    from conftest import build_trainer

    results = []
    for execution in ("sequential", "vectorized"):
        torch.manual_seed(0)
        module = Module()
        strategy = LBGMFederated(num_clients=7, execution=execution, local_steps=2, seed=0)
        trainer = build_trainer(tmp_path, strategy, max_epochs=2)
        trainer.fit(module, DataLoader(Dicts(), 4, shuffle=True, collate_fn=collate, num_workers=num_workers))
        results.append(flat_params(module))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_a_client_that_diverges_is_left_out_alone(fit):
    data = make_data(56)
    data.tensors[0][8:16] = float("nan")  # the second client of a chunk of three
    owners = NaturalPartitioner([i // 8 for i in range(56)])
    results = [train(fit, execution, dataset=data, partitioner=owners) for execution in ("sequential", "vectorized")]
    for _, _, metrics, reports in results:
        assert [c.client_id for c in reports[0].clients if c.rejected] == [1]
        assert metrics[0]["train/loss"] > 0
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)


def test_dropout_differs_between_clients_and_repeats_with_the_seed(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            kept = nn.functional.dropout(torch.ones(64), 0.5).mean() + 0 * self.loss(batch)
            self.log("min", kept, reduce_fx="min")
            self.log("max", kept, reduce_fx="max")
            return self.loss((nn.functional.dropout(batch[0], 0.5), batch[1]))

    first, again = train(fit, "vectorized", module=Module), train(fit, "vectorized", module=Module)
    other = train(fit, "vectorized", module=Module, seed=1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    # One local step and one chunk: the two would be equal if all clients drew the same.
    single = train(fit, "vectorized", module=Module, local_steps=1, chunk=7)[2]
    assert single[0]["min"] < single[0]["max"]
    assert single[0]["max"] != single[1]["max"]  # nor do rounds draw the same


class Item(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss * 2 if loss.item() > 0.1 else loss


class Late(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss if batch_idx < 3 or loss > 0 else 2 * loss


class Counting(TinyModule):
    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return self.loss(batch)


class Listing(TinyModule):
    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.losses.append(self.loss(batch))
        return self.losses[-1]


class Aside(TinyModule):
    def __init__(self):
        super().__init__()
        self.aside = [self.net.weight]

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + self.aside[0].square().sum()


class WithMetric(TinyModule):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return self.loss(batch)


class Lbfgs(TinyModule):
    def __init__(self):
        super().__init__(optimizer=torch.optim.LBFGS)


class Hooked(TinyModule):
    def on_after_backward(self):
        pass


class Transferring(TinyModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


OBSTACLES = {
    Item: "item",
    Late: "data-dependent",
    Counting: "keeps state in 'calls'",
    Listing: "keeps state in 'losses'",
    Aside: "another way than the module's attributes",
    WithMetric: "torchmetrics.Metric 'accuracy'",
    Lbfgs: "the optimizer LBFGS",
    Hooked: "`on_after_backward`",
    Transferring: "`on_after_batch_transfer`",
}


@pytest.mark.parametrize("module", OBSTACLES, ids=lambda cls: cls.__name__)
def test_auto_falls_back_and_says_why_once(fit, module, caplog):
    expected = train(fit, "sequential", module=module)
    with caplog.at_level(logging.INFO):
        found = train(fit, "auto", module=module)
    assert torch.equal(found[0], expected[0])
    assert found[2] == expected[2]
    messages = [r.getMessage() for r in caplog.records if "one after the other" in r.getMessage()]
    assert len(messages) == 1
    assert OBSTACLES[module] in messages[0]


@pytest.mark.parametrize("module", OBSTACLES, ids=lambda cls: cls.__name__)
def test_vectorized_refuses_what_it_cannot_do(fit, module):
    with pytest.raises(MisconfigurationException, match="execution='auto'") as error:
        train(fit, "vectorized", module=module)
    assert OBSTACLES[module] in str(error.value)


def test_a_failed_attempt_leaves_no_trace_in_attributes(fit):
    seen = []

    def make():
        seen.append(Listing())
        return seen[-1]

    train(fit, "auto", module=make)
    assert len(seen[0].losses) == 3 * 7 * 4
    assert all(type(loss.item()) is float for loss in seen[0].losses)


def test_an_error_of_the_step_is_the_steps_own(fit):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(fit, "auto", module=Module)


def test_a_metric_for_validation_is_no_obstacle(fit):
    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(3, average="micro")

        def validation_step(self, batch, batch_idx):
            self.accuracy(self(batch[0]), batch[1])
            self.log("accuracy", self.accuracy)

    _, _, metrics, _ = train(fit, "vectorized", module=Module, trainer={"val": True})
    assert 0 < metrics[-1]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("net", "dataset", "vectorized"),
    [
        (fcn, None, True),
        (cnn, IMAGES, False),
        (lambda: nn.Sequential(nn.Linear(6, 10**6), nn.Linear(10**6, 3)), None, False),
        (lambda: nn.Sequential(nn.Linear(6, 3 * 10**5).requires_grad_(False), nn.Linear(3 * 10**5, 3)), None, False),
    ],
    ids=["small", "convolutions", "large", "small on a large frozen base"],
)
def test_auto_vectorizes_on_a_cpu_what_is_small_and_without_convolutions(fit, net, dataset, vectorized, caplog):
    settings = {"local_steps": 1, "uplink": [], "trainer": {"max_epochs": 1}}
    with caplog.at_level(logging.INFO):
        train(fit, "auto", module=lambda: TinyModule(net=net()), dataset=dataset, num_clients=6, **settings)
    assert ("up to 3 are trained at once" in caplog.text) == vectorized


def test_parameters_unfrozen_in_training(fit):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    results = []
    for execution in ("sequential", "vectorized"):
        with pytest.warns(UserWarning, match="trainable parameters changed"):
            results.append(train(fit, execution, trainer={"callbacks": [Unfreeze()]})[0])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("argument", "value"), [("execution", "fast"), ("vectorized_chunk", 0), ("vectorized_chunk", 2.5)]
)
def test_wrong_settings_are_named(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*{value}"):
        LBGMFederated(**{argument: value})
