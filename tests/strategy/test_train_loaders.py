"""What ``fit`` takes as training data: one loader, one in a container, or a loader for each client."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from lightning_lbgm import IIDPartitioner, LBGMFederated, NaturalPartitioner
from lightning_lbgm.data import LoaderFeed
from lightning_lbgm.data.client_loaders import batch_size_of

# One loader


def shapes(batch):
    if isinstance(batch, torch.Tensor):
        return tuple(batch.shape)
    if isinstance(batch, dict):
        return {key: shapes(value) for key, value in batch.items()}
    return type(batch)(map(shapes, batch))


class NotedShapes(TinyModule):
    """Notes the shapes of the last batch."""

    def training_step(self, batch, batch_idx):
        self.noted = shapes(batch)
        return self.net.weight.sum()


class ExpectedShapes(TinyModule):
    """Takes batches of certain shapes alone; it keeps no state, so that clients can be trained at once."""

    def __init__(self, expected):
        super().__init__()
        self.expected = expected

    def training_step(self, batch, batch_idx):
        if shapes(batch) != self.expected:
            raise ValueError(f"{shapes(batch)} is not {self.expected}")
        return self.net.weight.sum()


def one_loader():
    return DataLoader(make_data(60), batch_size=15)


CONTAINERS = {
    "bare": one_loader,
    "dict": lambda: {"a": one_loader()},
    "list": lambda: [one_loader()],
    "tuple": lambda: (one_loader(),),
    "nested": lambda: {"a": [one_loader()]},
    "combined": lambda: CombinedLoader({"a": one_loader()}, "max_size"),
    "combined bare": lambda: CombinedLoader(one_loader()),
}


@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_the_batch_of_one_loader_has_the_structure_of_plain_lightning(tmp_path, make, execution):
    plain = NotedShapes()
    build_trainer(tmp_path, "auto", max_epochs=1).fit(plain, make())
    strategy = LBGMFederated(num_clients=4, uplink=[], execution=execution)
    trainer = build_trainer(tmp_path, strategy, max_epochs=1)
    trainer.fit(ExpectedShapes(plain.noted), make())
    assert trainer.global_step == 1


def test_one_loader_in_a_dict_trains_what_the_loader_trains(tmp_path):
    class OfDict(TinyModule):
        def loss(self, batch):
            return super().loss(batch["a"])

    results = []
    for module_class, loaders in ((TinyModule, one_loader()), (OfDict, {"a": one_loader()})):
        torch.manual_seed(0)
        module = module_class()
        build_trainer(tmp_path).fit(module, loaders)
        results.append(flat_params(module))
    assert torch.equal(*results)


def test_the_round_loader_has_the_attributes_of_the_users(tmp_path):
    def collate(examples):
        return torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples])

    class Asking(TinyModule):
        def on_train_start(self):
            seen.append(self.trainer.train_dataloader)

        def configure_optimizers(self):
            seen.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    class Named(DataLoader):
        source = "a class attribute"

    seen = []
    data = make_data(60)
    loader = Named(data, batch_size=7, drop_last=True, collate_fn=collate, shuffle=True)
    trainer = build_trainer(tmp_path, LBGMFederated(num_clients=4, rounds_per_epoch=5), max_epochs=3)
    trainer.fit(Asking(), loader)
    assert seen[0] == 15
    assert trainer.num_training_batches == 5
    rounds = seen[1]
    assert len(rounds) == 5
    assert rounds.dataset is data
    for name in ("batch_size", "num_workers", "collate_fn", "drop_last", "sampler", "batch_sampler", "source"):
        assert getattr(rounds, name) is getattr(loader, name)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        rounds.nothing_like_it  # noqa: B018
    trainer = build_trainer(tmp_path)
    trainer.fit(NotedShapes(), {"a": loader})
    assert trainer.train_dataloader["a"] is loader
    assert trainer.train_dataloader.dataset is data


@pytest.mark.parametrize(("limit", "rounds"), [(2, 2), (0.5, 2), (1.0, 4), (9, 4)])
def test_limit_train_batches_counts_rounds(fit, limit, rounds):
    trainer, _ = fit(LBGMFederated(num_clients=4, rounds_per_epoch=4), limit_train_batches=limit, max_epochs=2)
    assert trainer.global_step == 2 * rounds


def test_a_datamodules_loaders_are_taken(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return {"north": one_loader(), "south": [one_loader(), one_loader()]}

        def val_dataloader(self):
            return [one_loader(), one_loader()]

    class Several(TinyModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch, batch_idx)

    strategy = LBGMFederated(num_clients=None)
    trainer = build_trainer(tmp_path, strategy)
    trainer.fit(Several(), datamodule=Data())
    assert strategy.client_names == ("north", "south/0", "south/1")
    assert strategy.num_clients == strategy.cohort_size == 3
    assert {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"} <= set(trainer.callback_metrics)


# A loader for each client


def client_data(k):
    return make_data(10 + 5 * k, seed=k)


def of_tensors(**settings):
    return [DataLoader(client_data(k), batch_size=6, **settings) for k in range(3)]


def fit_clients(root, loaders, module=None, epochs=3, ckpt_path=None, **settings):
    torch.manual_seed(0)
    module = module or TinyModule()
    recorder = Recorder()
    strategy = LBGMFederated(**{"num_clients": None, "seed": 0, **settings})
    trainer = build_trainer(root, strategy, max_epochs=epochs, callbacks=[recorder])
    trainer.fit(module, loaders, ckpt_path=ckpt_path)
    return trainer, module, recorder.reports


@pytest.mark.parametrize("settings", [{"uplink": []}, {"uplink": [], "local_steps": 4}, {"clients_per_round": 2}])
def test_loaders_in_order_give_what_dealing_their_datasets_gives(tmp_path, settings):
    # The same federation, brought as one concatenated dataset: without shuffling the batches are the same.
    _, module, reports = fit_clients(tmp_path, of_tensors(), **settings)
    loader = DataLoader(torch.utils.data.ConcatDataset([client_data(k) for k in range(3)]), batch_size=6)
    dealt = {"num_clients": 3, "partitioner": NaturalPartitioner(), **settings}
    _, expected, expected_reports = fit_clients(tmp_path, loader, **dealt)
    assert torch.equal(flat_params(module), flat_params(expected))
    assert [[repr(c) for c in r.clients] for r in reports] == [[repr(c) for c in r.clients] for r in expected_reports]


def test_a_round_by_hand(tmp_path):
    # One batch a client, 10, 15 and 20 examples: a step from the same parameters, weighted by them.
    loaders = {str(k): Batches([client_data(k).tensors]) for k in range(3)}
    torch.manual_seed(0)
    module = TinyModule(lr=0.3)
    trained = copy.deepcopy(module)
    start = flat_params(module)
    expected = torch.zeros_like(start)
    for k in range(3):
        module.zero_grad()
        module.loss(client_data(k).tensors).backward()
        grad = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
        expected += (10 + 5 * k) / 45 * 0.3 * grad
    trainer, _, reports = fit_clients(tmp_path, loaders, trained, epochs=1, uplink=[])
    torch.testing.assert_close(start - flat_params(trained), expected)
    assert [c.num_examples for c in reports[0].clients] == [10, 15, 20]
    assert trainer.strategy.client_names == ("0", "1", "2")


class Batches:
    """An iterable of ready batches that says nothing of its length."""

    def __init__(self, batches):
        self.batches = batches
        self.iterations = 0

    def __iter__(self):
        self.iterations += 1
        return iter(self.batches)


class Stream(IterableDataset):
    """Examples with noise of all three global generators."""

    def __init__(self, size, seed=0):
        self.data = make_data(size, seed)

    def __iter__(self):
        for x, y in zip(*self.data.tensors):
            yield x + 0.1 * torch.rand(()) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), y


class OwnGenerators(Dataset):
    """Examples with noise of a generator of its own."""

    def __init__(self, size):
        self.data, self.rng = make_data(size), np.random.default_rng(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + self.rng.random(), y


class Episodes(Sampler):
    """Few-shot episodes: two examples of each of two classes."""

    def __init__(self, labels, episodes):
        self.labels, self.episodes = labels, episodes

    def __iter__(self):
        for _ in range(self.episodes):
            chosen = torch.randperm(3)[:2]
            own = [(self.labels == c).nonzero().flatten() for c in chosen]
            yield torch.cat([i[torch.randperm(len(i))[:2]] for i in own]).tolist()

    def __len__(self):
        return self.episodes


class Scaled(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


def streams(**settings):
    return [DataLoader(Stream(n, n), batch_size=4, **settings) for n in (10, 7)]


KINDS = {
    "streams": streams,
    "shuffled": lambda: of_tensors(shuffle=True),
    "with a generator": lambda: of_tensors(shuffle=True, generator=torch.Generator()),
    "own generators": lambda: [DataLoader(OwnGenerators(n), batch_size=4, shuffle=True) for n in (9, 5)],
    "workers": lambda: [
        DataLoader(Stream(9), batch_size=4, num_workers=2, persistent_workers=True),
        DataLoader(OwnGenerators(6), batch_size=4, shuffle=True, num_workers=1),
    ],
    "own iteration": lambda: [Scaled(client_data(k), batch_size=4, shuffle=True) for k in range(2)],
    "episodes": lambda: [
        DataLoader(client_data(k), batch_sampler=Episodes(client_data(k).tensors[1], 3)) for k in range(1, 3)
    ],
}


@pytest.mark.parametrize("settings", [{}, {"local_steps": 4, "clients_per_round": 1}], ids=["a pass", "steps"])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_a_resumed_run_is_the_unbroken_one_whatever_the_loaders(tmp_path, make, settings):
    settings = {"execution": "sequential", **settings}
    whole, module, reports = fit_clients(tmp_path, make(), **settings)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    half, _, _ = fit_clients(tmp_path, make(), epochs=1, **settings)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, later = fit_clients(tmp_path, make(), ckpt_path=tmp_path / "half.ckpt", **settings)
    assert torch.equal(flat_params(module), flat_params(resumed))
    assert repr(reports[1:]) == repr(later)
    losses = [client.loss for report in reports for client in report.clients]
    assert len(set(losses)) == len(losses)  # the noise and the order are new in each round and client
    assert whole.global_step == 3
    assert multiprocessing.active_children() == []  # no worker outlives its client's turn


@pytest.mark.parametrize(
    ("settings", "steps", "examples"),
    [
        ({}, (3, 2, 5), (10, 7, 20)),
        ({"local_epochs": 2}, (6, 4, 10), (10, 7, 20)),
        # Counted where all are counted alike: in the first four batches of each, 7 of 7 and 16 of 20.
        ({"local_steps": 4}, (4, 4, 4), (10, 7, 16)),
    ],
)
def test_streams_are_counted_once_before_they_train(tmp_path, settings, steps, examples):
    loaders = [Batches(list(zip(*[t.split(4) for t in make_data(n).tensors]))) for n in (10, 7)]
    loaders.append(DataLoader(make_data(20), batch_size=4))
    _, _, reports = fit_clients(tmp_path, loaders, epochs=2, execution="sequential", **settings)
    for report in reports:
        assert tuple(client.local_steps for client in report.clients) == steps
        assert tuple(client.num_examples for client in report.clients) == examples
    # A pass to count, and in two rounds as many as it takes: of 3 and 2 batches 2 passes make 4 steps.
    passes = {1: 3, 2: 5}[settings.get("local_epochs", 2 if "local_steps" in settings else 1)]
    assert [loader.iterations for loader in loaders[:2]] == [passes, passes]


def test_sized_loaders_are_not_iterated_to_count_them(tmp_path):
    class Counting(DataLoader):
        passes = 0

        def __iter__(self):
            Counting.passes += 1
            return super().__iter__()

    loaders = [Counting(client_data(k), batch_size=4) for k in range(2)]
    _, _, reports = fit_clients(tmp_path, loaders, epochs=2)
    assert Counting.passes == 4
    assert [c.num_examples for c in reports[0].clients] == [10, 15]


def test_n_k_is_what_the_sampler_draws(tmp_path):
    data = client_data(2)
    loaders = [
        DataLoader(data, batch_size=4, sampler=torch.utils.data.SubsetRandomSampler(range(7))),
        DataLoader(data, batch_sampler=BatchSampler(range(9), 4, drop_last=False)),
        DataLoader(data, batch_sampler=Episodes(data.tensors[1], 3)),  # of these no number is known but the dataset's
    ]
    _, _, reports = fit_clients(tmp_path, loaders, epochs=1)
    assert [c.num_examples for c in reports[0].clients] == [7, 9, 20]
    assert [c.local_steps for c in reports[0].clients] == [2, 3, 3]


def test_an_endless_stream_trains_by_local_steps(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.rand(6), torch.tensor(1)

    loaders = [DataLoader(Endless(), batch_size=b) for b in (2, 5)]
    _, _, reports = fit_clients(tmp_path, loaders, local_steps=3)
    assert [[c.num_examples for c in report.clients] for report in reports] == [[6, 15]] * 3


def test_batches_of_different_structure_are_each_clients_own(tmp_path):
    class Either(TinyModule):
        def loss(self, batch):
            return super().loss(batch if isinstance(batch, (list, tuple)) else (batch["x"], batch["y"]))

    def as_dict(examples):
        return {"y": torch.stack([y for _, y in examples]), "x": torch.stack([x for x, _ in examples])}

    loaders = [DataLoader(client_data(1), batch_size=5), DataLoader(client_data(1), batch_size=5, collate_fn=as_dict)]
    _, _, reports = fit_clients(tmp_path, loaders, Either(), epochs=1)
    first, second = reports[0].clients
    assert first.loss == pytest.approx(second.loss)


@pytest.mark.parametrize("make", [lambda k: make_data(12, k), lambda k: Stream(12, k)], ids=["dataset", "stream"])
def test_vectorized_clients_have_the_batches_of_sequential_ones(tmp_path, make):
    def loaders():
        return [DataLoader(make(k), batch_size=4) for k in range(4)]

    _, one, _ = fit_clients(tmp_path, loaders(), execution="sequential")
    _, other, _ = fit_clients(tmp_path, loaders(), execution="vectorized")
    torch.testing.assert_close(flat_params(one), flat_params(other))


def test_a_clients_noise_is_new_in_each_batch_pass_round_and_client():
    class Noise(IterableDataset):
        def __iter__(self):
            for _ in range(3):
                yield torch.tensor([float(torch.rand(())), float(np.random.rand()), random.random()])

    loaders = [DataLoader(Noise(), batch_size=1), DataLoader(Noise(), batch_size=1)]
    feed = LoaderFeed(loaders, ["a", "b"], local_epochs=2, local_steps=None, seed=0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def draw(round_index, cohort):
        return [tuple(batch.data[0].tolist()) for _, turn in feed.stream(round_index, cohort) for batch in turn]

    drawn = draw(0, (0, 1)) + draw(1, (0, 1))
    assert len(drawn) == 24
    for numbers in zip(*drawn):  # torch, NumPy, Python
        assert len(set(numbers)) == 24
    assert draw(1, (1,)) == drawn[18:]  # whoever else takes part, and whatever came before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_an_equal_number_of_clients_without_a_partitioner_says_the_same(tmp_path):
    _, module, _ = fit_clients(tmp_path, of_tensors(), num_clients=3)
    _, expected, _ = fit_clients(tmp_path, of_tensors())
    assert torch.equal(flat_params(module), flat_params(expected))


def test_one_loader_in_a_list_is_one_client_if_no_number_is_given(tmp_path):
    trainer, _, reports = fit_clients(tmp_path, [one_loader()])
    assert trainer.strategy.num_clients == 1
    assert [c.num_examples for c in reports[0].clients] == [60]


def test_the_settings_say_that_each_client_has_a_loader(tmp_path):
    strategy = LBGMFederated(num_clients=None, clients_per_round=0.5)
    assert strategy.settings()["num_clients"] is None
    build_trainer(tmp_path, strategy).fit(TinyModule(), of_tensors())
    settings = strategy.settings()
    assert settings["num_clients"] == 3
    assert settings["clients_per_round"] == 2
    assert settings["partitioner"] == "a loader for each client"


def test_the_users_loaders_are_found_under_their_keys(tmp_path):
    loaders = {"a": one_loader(), "b": one_loader()}
    trainer, _, _ = fit_clients(tmp_path, loaders)
    assert trainer.train_dataloader["b"] is loaders["b"]
    with pytest.raises(AttributeError, match="dataset"):
        trainer.train_dataloader.dataset  # noqa: B018


def test_an_error_in_a_clients_loader_ends_the_round_and_the_next_fit_goes_on(tmp_path):
    class Breaking(Batches):
        breaks = True

        def __iter__(self):
            yield self.batches[0]
            if self.breaks:
                raise OSError("disk gone")

    breaking = Breaking([make_data(5).tensors])
    breaking.dataset = range(5)  # so that it is not gone through to count it
    breaking.__class__.__len__ = lambda self: 1
    loaders = [DataLoader(client_data(0), batch_size=5), breaking]
    torch.manual_seed(0)
    module = TinyModule()
    before = flat_params(module)
    trainer = build_trainer(tmp_path, LBGMFederated(num_clients=None, seed=0, execution="sequential"), max_epochs=1)
    with pytest.raises(OSError, match="disk gone"):
        trainer.fit(module, loaders)
    assert torch.equal(flat_params(module), before)
    Breaking.breaks = False
    trainer.fit(module, loaders)
    _, expected, _ = fit_clients(tmp_path, loaders, epochs=1, execution="sequential")
    assert torch.equal(flat_params(module), flat_params(expected))


# What is refused


class EmptyStream(IterableDataset):
    def __iter__(self):
        return iter(())


class Once:
    """Gives its batches once, and then none."""

    def __init__(self):
        self.batches = iter([make_data(5).tensors] * 2)

    def __iter__(self):
        return self.batches


def good():
    return DataLoader(make_data(10), batch_size=5)


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        (
            good,
            MisconfigurationException,
            "num_clients=None.*loader for each client.*got one DataLoader.*num_clients=10",
        ),
        (lambda: [], MisconfigurationException, "empty"),
        (lambda: {"a": good(), "b": make_data(5)}, TypeError, "client 'b' is a dataset, TensorDataset.*DataLoader"),
        (lambda: [good(), torch.zeros(3)], TypeError, "client '1' is a Tensor"),
        (lambda: [good(), 7], TypeError, "client '1' is a int"),
        (lambda: [good(), (x for x in [1])], ValueError, "client '1' is a generator, which can be iterated only once"),
        (lambda: [good(), DataLoader(EmptyStream())], ValueError, "client '1' gives no batch at the start"),
        (
            lambda: {"x": good(), "y": DataLoader(make_data(3), 5, drop_last=True)},
            ValueError,
            "'y' gives no.*drop_last",
        ),
        (lambda: [good(), Once()], ValueError, "client '1' gives no batch in round 0.*iterated again"),
        (
            lambda: CombinedLoader({"a": good(), "b": good()}, "min_size"),
            MisconfigurationException,
            "CombinedLoader.*min_size.*cannot",
        ),
    ],
)
def test_loaders_that_cannot_be_clients_are_refused(tmp_path, loaders, error, message):
    with pytest.raises(error, match=message):
        fit_clients(tmp_path, loaders())


def test_an_iterable_dataset_that_is_dealt_is_refused_with_the_way_to_use_it(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"IterableDataset.*fit\(model, \[loader_a, loader_b\]\)"):
        fit_clients(tmp_path, DataLoader(Stream(5)), num_clients=2)


def test_a_partitioner_beside_loaders_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_clients=None.*partitioner=IIDPartitioner\(\)"):
        LBGMFederated(num_clients=None, partitioner=IIDPartitioner())
    message = r"`partitioner=IIDPartitioner\(\)` beside and 3 training loaders"
    with pytest.raises(MisconfigurationException, match=message):
        fit_clients(tmp_path, of_tensors(), num_clients=3, partitioner=IIDPartitioner())


@pytest.mark.parametrize(
    ("size", "message"), [(0, "between 1 and the number of clients"), (1.5, r"\(0, 1\]"), ("x", "int")]
)
def test_a_bad_cohort_size_is_refused_before_the_number_of_clients_is_known(size, message):
    with pytest.raises(ValueError, match=message):
        LBGMFederated(num_clients=None, clients_per_round=size)


def test_a_cohort_larger_than_the_clients_is_refused(tmp_path):
    with pytest.raises(ValueError, match="clients_per_round=4.*num_clients=3"):
        fit_clients(tmp_path, of_tensors(), clients_per_round=4)


def test_another_number_of_loaders_in_a_later_fit_is_refused(tmp_path):
    trainer, module, _ = fit_clients(tmp_path, of_tensors())
    trainer.fit_loop.max_epochs = 5
    with pytest.raises(MisconfigurationException, match="2 training loaders now.*has 3 clients"):
        trainer.fit(module, of_tensors()[:2])


def test_loaders_made_anew_each_epoch_go_on(tmp_path):
    class Reloading(TinyModule):
        def train_dataloader(self):
            return streams()

    results = []
    for every in (0, 1):
        torch.manual_seed(0)
        module = Reloading()
        strategy = LBGMFederated(num_clients=None, seed=0, execution="sequential")
        build_trainer(tmp_path, strategy, reload_dataloaders_every_n_epochs=every).fit(module)
        results.append(flat_params(module))
    assert torch.equal(*results)


def test_a_batch_without_tensors_counts_as_one_example(tmp_path):
    class OfNames(TinyModule):
        def training_step(self, batch, batch_idx):
            return self.net(torch.full((1, 6), float(len(batch["name"])))).sum()

    loaders = [Batches([{"name": "ann"}] * 3), Batches([{"name": "bob"}] * 2)]
    _, _, reports = fit_clients(tmp_path, loaders, OfNames(), epochs=1, execution="sequential")
    assert [c.num_examples for c in reports[0].clients] == [3, 2]


@dataclasses.dataclass
class Pair:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 2),
        torch.tensor(3.0),
        {"name": ["ann", "bob"], "x": torch.zeros(3, 2), "y": torch.zeros(5)},
        [("a", 1), [torch.zeros(2)]],
        Pair("ann", torch.zeros(6)),
        ({"x": None}, torch.zeros(7)),
        {"x": torch.tensor(1), "y": torch.zeros(5)},
    ],
)
def test_a_batch_is_as_large_as_lightning_takes_it_for(batch):
    assert batch_size_of(batch) == extract_batch_size(batch)


def test_looking_for_a_batchs_size_reads_no_iterator():
    batch = {"lines": iter([torch.zeros(3)]), "x": np.zeros((9, 2))}
    assert batch_size_of(batch) == 1
    assert len(list(batch["lines"])) == 1
