"""Hugging Face datasets: their columns as labels and client ids, and themselves as training data, in any format."""

from __future__ import annotations

import datasets
import numpy as np
import pandas
import pytest
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_lbgm import (
    ClientEvaluation,
    DirichletPartitioner,
    FeaturePartitioner,
    LBGMCallback,
    LBGMFederated,
    NaturalPartitioner,
    PathologicalPartitioner,
)
from lightning_lbgm.data import find_labels, make_partitions
from lightning_lbgm.data.columns import class_names
from lightning_lbgm.strategy.identity import identify

NAMES = ["ant", "bee", "cat"]
X, Y = make_data(60).tensors
USERS = [f"user {k % 4}" for k in range(60)]


def refuse_transform(batch):
    raise AssertionError("examples were loaded")


@pytest.fixture(scope="module")
def source():
    features = {
        "x": datasets.List(datasets.Value("float32")),
        "label": datasets.ClassLabel(names=NAMES),
        "user": datasets.Value("string"),
        "info": {"site": datasets.Value("int64")},
    }
    columns = {"x": X.tolist(), "label": Y.tolist(), "user": USERS, "info": [{"site": k % 3} for k in range(60)]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


FORMATS = {
    "plain": lambda ds: ds,
    "torch": lambda ds: ds.with_format("torch"),
    "numpy": lambda ds: ds.with_format("numpy"),
    "pandas": lambda ds: ds.with_format("pandas"),
    "a transform": lambda ds: ds.with_transform(refuse_transform),
}


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_labels_and_ids_in_any_format_without_loading_examples(source, name):
    dataset = FORMATS[name](source)
    assert find_labels(dataset).tolist() == Y.tolist()
    assert find_labels(dataset, dataset["label"]).tolist() == Y.tolist()
    assert find_labels(dataset, dataset["user"]).tolist() == [k % 4 for k in range(60)]
    parts = make_partitions(dataset, 4, NaturalPartitioner(dataset["user"]), seed=0)
    assert [part.tolist() for part in parts] == [list(range(k, 60, 4)) for k in range(4)]
    assert find_labels(source, dataset["label"]).tolist() == Y.tolist()


def test_a_column_within_another_is_read(source):
    assert find_labels(source, source["info"]["site"]).tolist() == [k % 3 for k in range(60)]


def test_labels_are_found_through_subsets_shuffles_and_concatenations(source):
    order = [5, 3, 8]
    assert find_labels(Subset(source, order)).tolist() == np.unique(Y[order], return_inverse=True)[1].tolist()
    shuffled = source.shuffle(seed=1)
    expected = [row["label"] for row in shuffled]
    assert find_labels(shuffled).tolist() == expected
    assert find_labels(ConcatDataset([source, shuffled])).tolist() == [*Y.tolist(), *expected]


@pytest.mark.parametrize(
    "make",
    [
        lambda: pandas.Series(USERS),
        lambda: pandas.Categorical(USERS),
        lambda: pandas.Series(USERS, index=range(60, 0, -1)),
        lambda: np.array(USERS),
        lambda: np.array(USERS, dtype=object),
        lambda: list(USERS),
        lambda: tuple(USERS),
        lambda: torch.arange(60) % 4,
        lambda: pandas.Series([k % 4 for k in range(60)]),
    ],
    ids=range(9),
)
def test_other_containers_of_labels_agree_with_the_column(source, make):
    assert find_labels(source, make()).tolist() == find_labels(source, source["user"]).tolist()
    parts = make_partitions(source, 4, NaturalPartitioner(make()), seed=0)
    assert [part.tolist() for part in parts] == [list(range(k, 60, 4)) for k in range(4)]


def test_a_column_is_a_feature_too(source):
    site = [k % 3 for k in range(60)]
    for partitioner in (FeaturePartitioner(source["info"]["site"], 0.3), FeaturePartitioner(site, 0.3)):
        parts = [part.tolist() for part in make_partitions(source, 4, partitioner, seed=0)]
        assert sorted(index for part in parts for index in part) == list(range(60))


def test_classes_are_called_as_their_column_says(source):
    for data in (source, source["label"], source.with_format("torch"), source.with_format("torch")["label"]):
        assert class_names(data) == NAMES
    for data in (source["user"], source.remove_columns("label"), USERS, make_data()):
        assert class_names(data) is None


def test_a_column_is_read_once_and_is_the_same_setting_as_its_list(source, monkeypatch):
    calls, read = [], datasets.Dataset.with_format
    monkeypatch.setattr(datasets.Dataset, "with_format", lambda self, *a, **k: calls.append(a) or read(self, *a, **k))
    dataset = source.select(range(50))
    partitioner = PathologicalPartitioner(2, labels=dataset["label"])
    make_partitions(dataset, 4, partitioner, seed=0)
    make_partitions(dataset, 4, DirichletPartitioner(0.5), seed=0)
    assert identify(partitioner) == identify(PathologicalPartitioner(2, labels=Y[:50].tolist()))
    assert calls == [(None,)]


def test_columns_that_are_no_labels_are_refused(source):
    with pytest.raises(ValueError, match="column 'x' of the dataset holds values of type list, and what is"):
        find_labels(source, source["x"])
    renamed = source.rename_column("label", "species")
    with pytest.raises(ValueError, match=r"no column `label` or `labels`.*'species'.* labels=dataset\["):
        find_labels(renamed)
    both = source.add_column("labels", [0] * 60)
    with pytest.raises(ValueError, match=r"two columns of labels.*labels=dataset\[\"label\"\]"):
        find_labels(both)
    missing = datasets.Dataset.from_dict({"label": [1, None, 2]})
    for dataset in (missing, missing.with_format("torch")):
        with pytest.raises(ValueError, match="1 of 3 are missing .* first at position 1"):
            find_labels(dataset)


# Training


class FromDicts(TinyModule):
    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch["x"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self(batch["x"]).argmax(1) == batch["label"]).float().mean())


def train(root, module_class, dataset, execution="sequential", callbacks=(), **settings):
    torch.manual_seed(0)
    module = module_class()
    strategy = LBGMFederated(num_clients=3, seed=0, execution=execution, **settings)
    trainer = build_trainer(root, strategy, callbacks=[LBGMCallback(figures=False), *callbacks], max_epochs=2)
    trainer.fit(module, DataLoader(dataset, batch_size=10, shuffle=True))
    return trainer, flat_params(module)


@pytest.fixture(scope="module")
def examples(source):
    return source.select_columns(["x", "label"]).with_format("torch")


@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
def test_a_dataset_of_dicts_trains_as_its_tensors_do(tmp_path, examples, execution):
    expected = train(tmp_path, TinyModule, make_data(60), execution)[1]
    assert torch.equal(train(tmp_path, FromDicts, examples, execution)[1], expected)


def test_labels_of_the_dataset_and_its_column_make_the_same_clients(tmp_path, examples, source):
    one, other = PathologicalPartitioner(2), PathologicalPartitioner(2, labels=source["label"])
    assert torch.equal(*(train(tmp_path, FromDicts, examples, partitioner=each)[1] for each in (one, other)))


def test_clients_are_evaluated_on_a_dataset_of_dicts(tmp_path, examples):
    for data in (None, examples):
        evaluation = ClientEvaluation(data=data, own_models=False, figure=False)
        trainer, _ = train(tmp_path, FromDicts, examples, callbacks=[evaluation], partitioner=DirichletPartitioner(1.0))
        assert 0 <= trainer.callback_metrics["clients/val/acc_mean"] <= 1


def test_a_dataset_is_no_loader(tmp_path, source):
    trainer = build_trainer(tmp_path, LBGMFederated(num_clients=None, seed=0))
    with pytest.raises(Exception, match=r"is a dataset, Dataset, not a loader: wrap it in `DataLoader\(dataset"):
        trainer.fit(FromDicts(), [source, source])
