"""``PartitionReport`` in real fits: what it logs and draws, once, of what clients train with."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_lbgm import (
    ClientEvaluation,
    DirichletPartitioner,
    LBGMCallback,
    LBGMFederated,
    NaturalPartitioner,
    PartitionReport,
    PathologicalPartitioner,
)
from lightning_lbgm.data import heterogeneity

FIGURES = {"partition_labels.png", "partition_sizes.png"}
Y = make_data().tensors[1]


def reported(trainer):
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("partition/")}


def expected(partitions, labels=Y):
    """The metrics of a partition, counted one by one."""
    names = sorted({int(labels[k]) for part in partitions for k in part})
    counts = [[sum(int(labels[k]) == name for k in part) for name in names] for part in partitions]
    found = heterogeneity([len(part) for part in partitions], counts)
    return pytest.approx({f"partition/{name}": value for name, value in found.items()})


def train(root, report, strategy=None, loader=None, callbacks=(), module=None, ckpt_path=None, **settings):
    torch.manual_seed(0)
    strategy = strategy or LBGMFederated(num_clients=4, partitioner=PathologicalPartitioner(2), seed=0)
    callbacks = [*callbacks, *([] if report is None else [report]), LBGMCallback(figures=False)]
    trainer = build_trainer(root, strategy, callbacks=callbacks, **{"max_epochs": 2, **settings})
    module = module or TinyModule()
    trainer.fit(module, loader or DataLoader(make_data(), batch_size=8), ckpt_path=ckpt_path)
    return trainer, module


def drawn(folder):
    return {path.name for path in (folder / "figures").glob("*")}


def test_without_a_logger_figures_go_to_the_root_folder_and_numbers_to_callback_metrics(tmp_path):
    trainer, module = train(tmp_path, PartitionReport())
    assert drawn(tmp_path) == FIGURES
    assert reported(trainer) == expected(trainer.strategy.feed.partitions)
    assert reported(trainer)["partition/labels_effective_mean"] < 2.01
    assert torch.equal(flat_params(module), flat_params(train(tmp_path, None)[1]))


def test_with_another_logger_figures_go_to_its_folder(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    trainer, _ = train(tmp_path, PartitionReport(), logger=logger)
    assert drawn(tmp_path / "csv" / "version_0") >= FIGURES
    text = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "partition/size_cv" in text[0]
    # A second fit of the same Trainer has nothing to add.
    before = (tmp_path / "csv/version_0/figures/partition_labels.png").stat().st_mtime_ns
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, DataLoader(make_data(), batch_size=8))
    assert (tmp_path / "csv/version_0/figures/partition_labels.png").stat().st_mtime_ns == before


def test_a_checkpoint_without_the_report_can_be_resumed_with_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(tmp_path, None, callbacks=[checkpoint], enable_checkpointing=True)
    trainer, _ = train(tmp_path, PartitionReport(), max_epochs=3, ckpt_path=tmp_path / "step=2.ckpt")
    assert reported(trainer) == expected(trainer.strategy.feed.partitions)


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}])
def test_a_trial_fit_draws_nothing(tmp_path, settings):
    train(tmp_path, PartitionReport(), **settings)
    assert drawn(tmp_path) == set()


def test_no_figures_on_request(tmp_path):
    trainer, _ = train(tmp_path, PartitionReport(figures=False))
    assert drawn(tmp_path) == set()
    assert reported(trainer) == expected(trainer.strategy.feed.partitions)


# What is shown


def test_examples_that_are_held_out_are_not_counted(tmp_path):
    trainer, _ = train(tmp_path, PartitionReport(figures=False), callbacks=[ClientEvaluation(0.3, figure=False)])
    assert sum(map(len, trainer.strategy.feed.partitions)) < 50
    assert reported(trainer) == expected(trainer.strategy.feed.partitions)


def test_examples_that_a_sampler_leaves_out_are_not_counted(tmp_path):
    chosen = list(range(5, 45))
    loader = DataLoader(make_data(), batch_size=8, sampler=SubsetRandomSampler(chosen))
    trainer, _ = train(tmp_path, PartitionReport(figures=False), loader=loader)
    assert reported(trainer) == expected([[chosen[k] for k in part] for part in trainer.strategy.feed.partitions])


def test_labels_are_the_partitioners_or_those_given(tmp_path):
    class Hidden(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            return make_data()[index]

    loader = DataLoader(Hidden(), batch_size=8)
    dealt = LBGMFederated(num_clients=4, partitioner=DirichletPartitioner(0.5, labels=Y), seed=0)
    trainer, _ = train(tmp_path, PartitionReport(figures=False), dealt, loader, max_epochs=1)
    assert reported(trainer) == expected(trainer.strategy.feed.partitions)
    natural = LBGMFederated(num_clients=4, partitioner=NaturalPartitioner([k % 4 for k in range(60)]), seed=0)
    trainer, _ = train(tmp_path, PartitionReport(labels=Y.tolist(), figures=False), natural, loader, max_epochs=1)
    assert reported(trainer) == expected([range(k, 60, 4) for k in range(4)])


def test_clients_with_loaders_over_parts_of_one_dataset(tmp_path):
    data, parts = make_data(), [range(20), range(20, 50), [50, 55, 59]]
    loaders = [DataLoader(Subset(data, part), batch_size=8, shuffle=True) for part in parts[:2]]
    loaders.append(DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(parts[2])))
    trainer, _ = train(tmp_path, PartitionReport(), LBGMFederated(num_clients=None, seed=0), loaders, max_epochs=1)
    assert reported(trainer) == expected(parts)
    assert drawn(tmp_path) == FIGURES


def test_classes_have_the_names_that_the_dataset_gives_them(tmp_path):
    class Named(TensorDataset):
        classes = ("ant", "bee", "cat")
        features = torch.zeros(3)  # no Hugging Face dataset's

    trainer, _ = train(tmp_path, None, loader=DataLoader(Subset(Named(*make_data().tensors), range(60)), batch_size=8))
    table = trainer.strategy.label_table()
    assert table.labels.tolist() == ["ant", "bee", "cat"]
    assert table.counts.sum(0).tolist() == Y.bincount().tolist()
    assert trainer.strategy.label_table([k % 5 for k in range(60)]).labels.tolist() == [0, 1, 2, 3, 4]
    Named.classes = ("ant", "bee")  # not enough of them
    assert trainer.strategy.label_table().labels.tolist() == [0, 1, 2]


# Labels that cannot be had


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*make_data(20).tensors))


class Expensive(Dataset):
    """Its labels are images, or an error, and each example may be loaded as often as there are epochs alone."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return make_data()[index]


class Failing(Expensive):
    targets = property(lambda self: 1 / 0)

    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            TensorDataset(make_data().tensors[0], torch.rand(60)),
            "are real numbers, not classes.*`PartitionReport",
        ),
        (Expensive(torch.zeros(60, 4, 4)), r"got the shape \(60, 4, 4\)"),
        (Expensive([f"mask_{k}.png" for k in range(60)]), "60 examples have 60 different labels"),
        (Expensive([1] * 59), r"got the shape \(59,\)"),
        (Expensive(None), "labels of the training dataset cannot be found"),
        (Failing(), "ZeroDivisionError: division by zero"),
    ],
    ids=range(6),
)
def test_without_labels_sizes_alone_are_shown_and_the_warning_says_why(tmp_path, dataset, message):
    class Any(TinyModule):
        def loss(self, batch):
            return self(batch[0]).square().mean()

    strategy = LBGMFederated(num_clients=4, seed=0)
    with pytest.warns(UserWarning, match=f"(?s)shows the clients' sizes alone, because their labels.*{message}"):
        trainer, _ = train(
            tmp_path, PartitionReport(), strategy, DataLoader(dataset, batch_size=8), module=Any(), max_epochs=1
        )
    assert drawn(tmp_path) == {"partition_sizes.png"}
    assert reported(trainer) == {
        "partition/clients": 4,
        "partition/size_min": 15,
        "partition/size_max": 15,
        "partition/size_cv": 0,
    }


def test_loaders_whose_examples_have_no_index_show_sizes(tmp_path):
    loaders = {"ward": DataLoader(Stream(), batch_size=5), "icu": DataLoader(make_data(30), batch_size=5)}
    with pytest.warns(UserWarning, match="client 'ward' are not known: its dataset Stream is an `IterableDataset`"):
        trainer, _ = train(tmp_path, PartitionReport(), LBGMFederated(num_clients=None, seed=0), loaders, max_epochs=1)
    assert (reported(trainer)["partition/size_min"], reported(trainer)["partition/size_max"]) == (20, 30)


def test_given_labels_that_do_not_go_with_the_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one class for each of the 60 examples; got the shape \(2,\)"):
        train(tmp_path, PartitionReport(labels=[0, 1]))
    loaders = [DataLoader(make_data(20), batch_size=5)] * 2
    with pytest.raises(ValueError, match="each client has a loader of its own: leave them out"):
        train(tmp_path, PartitionReport(labels=Y), LBGMFederated(num_clients=None, seed=0), loaders)


def test_a_trainer_without_a_federation_is_refused(tmp_path):
    trainer = build_trainer(tmp_path, "auto", callbacks=[PartitionReport()])
    with pytest.raises(MisconfigurationException, match="`PartitionReport` reports on a federation"):
        trainer.fit(TinyModule(), DataLoader(make_data(), batch_size=8))


def test_many_cells_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lbgm.data.label_table._MOST_CELLS", 11)
    with pytest.warns(UserWarning, match="4 clients and 3 labels are too many to be counted"):
        train(tmp_path, PartitionReport(), max_epochs=1)
