"""Every misuse names the argument, its value and the remedy."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyModule, make_data
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_lbgm import (
    DirichletPartitioner,
    ErrorFeedback,
    LBGMCallback,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    PathologicalPartitioner,
    TopK,
)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LookBack(threshold=1.5), ValueError, r"threshold.*\[0, 1\].*1\.5.*Use 0\.2"),
        (lambda: LookBack(threshold=-0.1), ValueError, r"threshold.*-0\.1"),
        (lambda: LookBack(threshold=float("nan")), ValueError, "threshold.*nan"),
        (lambda: LookBack(threshold="0.2"), TypeError, "threshold.*'0.2'"),
        (lambda: LookBack(granularity="tensor"), ValueError, "granularity.*'model'.*'layer'.*'tensor'"),
        (lambda: TopK(0.0), ValueError, r"fraction.*\(0, 1\].*0\.0"),
        (lambda: TopK(2), ValueError, "fraction.*2"),
        (lambda: ErrorFeedback(0.1), TypeError, "stage.*0.1"),
        (lambda: LBGMFederated(uplink=[LookBack(), TopK(0.1)]), ValueError, r"LookBack.*must be the last.*TopK"),
        (lambda: LBGMFederated(uplink=[0.2]), TypeError, r"uplink.*0\.2"),
        (lambda: LBGMFederated(uplink=0.2), TypeError, r"uplink.*0\.2, a float"),
        (lambda: LBGMFederated(num_clients=0), ValueError, "num_clients.*0"),
        (lambda: LBGMFederated(num_clients=2.5), ValueError, r"num_clients.*2\.5"),
        (lambda: LBGMFederated(local_epochs=1, local_steps=5), ValueError, "local_epochs=1.*local_steps=5.*one of"),
        (lambda: LBGMFederated(local_steps=0), ValueError, "local_steps.*0"),
        (lambda: LBGMFederated(clients_per_round=11), ValueError, "clients_per_round=11.*num_clients=10"),
        (lambda: LBGMFederated(clients_per_round=1.5), ValueError, r"clients_per_round=1\.5.*\(0, 1\]"),
        (lambda: LBGMFederated(partitioner="iid"), TypeError, "partitioner.*'iid'"),
        (lambda: LBGMFederated(weighting="size"), ValueError, "weighting.*'examples'.*'size'"),
        (lambda: LBGMFederated(buffers="drop"), ValueError, "buffers.*'average'.*'drop'"),
        (lambda: LBGMFederated(rounds_per_epoch=0), ValueError, "rounds_per_epoch.*0"),
        (lambda: LBGMFederated(seed="a"), TypeError, "seed.*'a'"),
        (lambda: LBGMFederated(server_optimizer=3), TypeError, "server_optimizer.*callable.*3"),
        (lambda: PathologicalPartitioner(0), ValueError, "classes_per_client.*0"),
        (lambda: DirichletPartitioner(0), ValueError, "alpha.*0"),
        (lambda: DirichletPartitioner(1.0, min_examples=0), ValueError, "min_examples.*0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(6), 0)])


class Unlabelled(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.zeros(6), 0


@pytest.mark.parametrize(
    ("strategy", "dataset", "error", "message"),
    [
        (LBGMFederated(num_clients=61), None, ValueError, "num_clients=61.*60 training examples.*fewer clients"),
        (LBGMFederated(num_clients=2), Stream(), MisconfigurationException, "Stream.*IterableDataset.*map-style"),
        (
            LBGMFederated(num_clients=2, partitioner=PathologicalPartitioner(1)),
            Unlabelled(),
            ValueError,
            "labels.*cannot be found.*Unlabelled.*labels=my_labels",
        ),
        (
            LBGMFederated(num_clients=4, partitioner=PathologicalPartitioner(5)),
            None,
            ValueError,
            "classes_per_client=5.*3 classes",
        ),
        (LBGMFederated(partitioner=NaturalPartitioner()), None, ValueError, "ConcatDataset.*TensorDataset"),
        (
            LBGMFederated(partitioner=NaturalPartitioner([0, 1] * 30)),
            None,
            ValueError,
            "has 2 clients.*num_clients=10.*num_clients=2",
        ),
        (LBGMFederated(server_optimizer=lambda params: 1), None, TypeError, "server_optimizer.*returned 1"),
    ],
)
def test_misfitting_data_is_refused_at_fit_start(fit, strategy, dataset, error, message):
    with pytest.raises(error, match=message):
        fit(strategy, dataset=dataset)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2.*Use 1"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler.*drop the callback"),
        ({"sync_batchnorm": True}, "sync_batchnorm=True.*buffers"),
        ({"overfit_batches": 2}, "overfit_batches=2.*Subset"),
        ({"overfit_batches": 0.1}, "overfit_batches=0.1.*Subset"),
        ({"limit_train_batches": 0.5}, "limit_train_batches=0.5.*rounds_per_epoch=1.*Subset.*local_steps"),
    ],
)
def test_trainer_settings_that_make_no_sense_are_refused(fit, trainer, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(LBGMFederated(num_clients=4), **trainer)


def test_manual_optimization_is_refused(fit):
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization = False.*Use automatic"):
        fit(module=module)


def test_a_module_without_trainable_parameters_is_refused(fit):
    class Frozen(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Frozen().requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="no trainable parameter.*requires_grad=True"):
        fit(module=module)


@pytest.mark.parametrize("collect", [list, lambda loaders: {"a": loaders[0], "b": loaders[1]}])
def test_several_train_loaders_are_refused_unless_they_are_the_clients(make_trainer, collect):
    loaders = collect([DataLoader(make_data(20), batch_size=5), DataLoader(make_data(20), batch_size=5)])
    message = "`num_clients=4` and 2 training loaders.*num_clients=None.*ConcatDataset.*NaturalPartitioner"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer().fit(TinyModule(), loaders)


class Wrapper:
    """An iterable around a DataLoader, as prefetchers are."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("collect", [lambda loader: loader, lambda loader: [loader]])
def test_something_else_than_a_loader_is_refused(make_trainer, collect):
    loader = Wrapper(DataLoader(make_data(20), batch_size=5))
    with pytest.raises(MisconfigurationException, match="object of type Wrapper.*collate_fn.*num_clients=None"):
        make_trainer().fit(TinyModule(), collect(loader))


def test_no_loader_at_all_is_refused(make_trainer):
    with pytest.raises(MisconfigurationException, match="collection of training loaders is empty"):
        make_trainer().fit(TinyModule(), [])


@pytest.mark.parametrize("settings", [{"batch_size": None}, {"batch_sampler": [[0, 1], [2, 3]]}])
def test_loaders_without_a_batch_size_are_refused(make_trainer, settings):
    with pytest.raises(ValueError, match="batch sampler of its own or `batch_size=None`"):
        make_trainer().fit(TinyModule(), DataLoader(make_data(20), **settings))


class OwnIteration(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield 1000 * x, y


class OwnIterator(DataLoader):
    def _get_iterator(self):
        return super()._get_iterator()


@pytest.mark.parametrize(("cls", "method"), [(OwnIteration, "__iter__"), (OwnIterator, "_get_iterator")])
def test_a_loader_class_that_loads_in_its_own_way_is_refused(make_trainer, cls, method):
    with pytest.raises(MisconfigurationException, match=f"{cls.__name__} has a `{method}` of its own.*collate_fn"):
        make_trainer().fit(TinyModule(), cls(make_data(20), batch_size=5))


def test_a_loader_class_that_only_sets_a_collate_function_is_used(make_trainer):
    class Collating(DataLoader):
        def __init__(self, dataset, **settings):
            super().__init__(dataset, collate_fn=self.collate, **settings)

        def collate(self, examples):
            seen.append(len(examples))
            return torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples])

        def __len__(self):
            return 77

    seen = []
    make_trainer(max_epochs=1).fit(TinyModule(), Collating(make_data(20), batch_size=5))
    assert seen == [5, 5, 5, 5]  # four clients of five examples


def test_a_training_step_on_an_iterator_is_refused(fit):
    class Iterating(TinyModule):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(MisconfigurationException, match="dataloader_iter.*training_step\\(batch, batch_idx\\)"):
        fit(module=Iterating())


def test_the_callback_needs_the_strategy(fit):
    with pytest.raises(MisconfigurationException, match="LBGMCallback.*SingleDeviceStrategy.*LBGMFederated"):
        fit("auto", callbacks=[LBGMCallback()])


def test_devices_auto_takes_what_there_is(fit):
    trainer, _ = fit(LBGMFederated(num_clients=4), devices="auto", accelerator="auto")
    assert trainer.strategy.root_device.type in ("cpu", "cuda", "mps")
