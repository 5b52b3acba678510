"""``pytorch_lightning``, the twin of ``lightning.pytorch``: both packages' objects in one federation."""

from __future__ import annotations

import abc
import copy
import importlib
import io
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import make_data
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import GradientSpaceCallback, LBGMCallback, LBGMFederated

twin = pytest.importorskip("pytorch_lightning")

HERE = Path(__file__).parents[1]
PACKAGES = {"lightning": pl, "twin": twin}
COMBINATIONS = ["".join(letters) for letters in itertools.product("LT", repeat=4)]

both = pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)


def make_module(package=twin, **methods):
    """Make a class over a package's LightningModule."""

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(6, 3)

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def predict_step(self, batch, batch_idx):
            return float(batch[0].sum())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return type("Module", (Module,), methods)


def make_trainer(package, tmp_path, **settings):
    defaults = {
        "strategy": LBGMFederated(num_clients=4, seed=0),
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return package.Trainer(**{**defaults, **settings})


def loader():
    return DataLoader(make_data(), batch_size=8)


def run_python(*arguments, **env):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# Every combination


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = {}
    for order in ("ours", "twin"):
        folder = tmp_path_factory.mktemp(order)
        run_python(HERE / "twin_script.py", order, folder)
        found[order] = torch.load(folder / "results.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ours", "twin"])
def test_trainer_module_callbacks_and_logger_may_be_of_either_package(results, order):
    reference = results["ours"]["LLLL"]
    assert reference["rounds"] == (3, 5)
    assert sum("ckpt" in path for path in reference["files"]) == 2  # the best and the last, none by default
    assert set(results[order]) == set(COMBINATIONS if order == "ours" else ["LLTT", "LTLL", "TLLL", "TTTT"])
    for name, result in results[order].items():
        assert all(map(torch.equal, result["parameters"], reference["parameters"])), name
        for what in ("metrics", "rounds", "callbacks", "files", "logged"):
            assert result[what] == reference[what], (name, what)


# The import


def test_the_twin_is_not_imported_from_here_and_without_it_nothing_is_different():
    """That nothing has tried to import it is seen where it is installed; then it cannot be imported any more."""
    code = """
import sys, lightning_lbgm
lightning_lbgm.LBGMFederated()
print([name for name in sys.modules if name.partition('.')[0] in ('pytorch_lightning', 'lightning_fabric')])
sys.modules['pytorch_lightning'] = None
import lightning.pytorch as pl
pl.Trainer(strategy='lbgm_federated', accelerator='cpu', logger=False)
"""
    assert run_python("-c", code).stdout.splitlines()[0] == "[]"


def test_another_version_of_the_twin_is_refused_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(twin, "__version__", "2.5.1")
    for use in (
        lambda: make_trainer(twin, tmp_path),
        lambda: make_trainer(pl, tmp_path).fit(make_module()(), loader()),
    ):
        with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"pytorch_lightning 2\.5\.1 meet"):
            use()
    make_trainer(twin, tmp_path, strategy="auto")


# The Trainer and its settings


@both
def test_the_strategy_has_its_names_in_both_registries(package, tmp_path):
    for name in ("lbgm_federated", "FedAvg"):
        stopping = twin.callbacks.EarlyStopping("train/loss")
        trainer = make_trainer(package, tmp_path, strategy=name, callbacks=stopping)
        trainer.fit(make_module()(), loader())
        assert isinstance(trainer.strategy, LBGMFederated)
        assert trainer.early_stopping_callback is stopping


def test_a_trainer_with_another_strategy_is_as_strict_as_before(tmp_path):
    for one, two in ((pl, twin), (twin, pl)):
        with pytest.raises(TypeError, match="must be a `LightningModule`"):
            make_trainer(one, tmp_path, strategy="auto").fit(make_module(two)(), loader())


def test_errors_are_caught_under_either_name(tmp_path):
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.exceptions import MisconfigurationException as TwinsException

    module = make_module()()
    module.automatic_optimization = False
    with pytest.raises(TwinsException, match="`Module.automatic_optimization = False`") as caught:
        make_trainer(twin, tmp_path).fit(module, loader())
    assert isinstance(caught.value, MisconfigurationException)
    assert type(pickle.loads(pickle.dumps(caught.value))) is MisconfigurationException
    with pytest.raises(TwinsException, match=r"sync_batchnorm=True"):
        make_trainer(twin, tmp_path, sync_batchnorm=True).fit(make_module()(), loader())


def test_plugins_of_the_other_package_are_refused_in_words(tmp_path):
    plugin = twin.plugins.MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(Exception, match="Found invalid type for plugin"):
        make_trainer(pl, tmp_path, plugins=[plugin])
    make_trainer(twin, tmp_path, plugins=[plugin]).fit(make_module()(), loader())


@both
def test_a_single_callback_of_ours_is_a_callback_of_both(package, tmp_path):
    trainer = make_trainer(package, tmp_path, callbacks=LBGMCallback())
    trainer.fit(make_module()(), loader())
    assert [type(callback) for callback in trainer.callbacks] == [LBGMCallback]
    with pytest.raises(Exception, match="reports on a federation"):
        make_trainer(package, tmp_path, strategy="auto", callbacks=LBGMCallback()).fit(make_module(package)(), loader())


@both
def test_the_gradient_space_is_measured_in_either_trainer(package, tmp_path):
    callback = GradientSpaceCallback(figures=False)
    trainer = make_trainer(package, tmp_path, strategy="auto", callbacks=callback)
    trainer.fit(make_module(package)(), loader())
    assert trainer.callback_metrics["gradient_space/n95"] >= 1


@both
def test_plain_precision_is_recognised_and_vectorised(package, tmp_path):
    trainer = make_trainer(package, tmp_path, strategy=LBGMFederated(num_clients=4, execution="vectorized"))
    trainer.fit(make_module()(), loader())  # raises if it is not possible
    assert trainer.global_step == 2


def test_mixed_precision_is_the_same_in_both(tmp_path):
    modules = []
    for package in (pl, twin):
        module = make_module(package)()
        make_trainer(package, tmp_path, precision="bf16-mixed").fit(module, loader())
        modules.append(module)
    first, second = ([*module.parameters()] for module in modules)
    assert all(map(torch.equal, first, second))
    exact = make_module()()
    make_trainer(twin, tmp_path).fit(exact, loader())
    assert not all(map(torch.equal, first, exact.parameters()))


@both
def test_hooks_of_the_twins_callbacks_see_each_local_step(package, tmp_path):
    class Counter(twin.Callback):
        steps = 0

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.steps += 1

    counter = Counter()
    make_trainer(package, tmp_path, callbacks=[twin.callbacks.Timer(), counter]).fit(make_module()(), loader())
    assert counter.steps == 2 * (4 * 2 + 1)  # 15 examples a client in batches of 8, and Lightning's own


@both
def test_accumulation_by_the_twins_callback_is_refused(package, tmp_path):
    trainer = make_trainer(package, tmp_path, callbacks=[twin.callbacks.GradientAccumulationScheduler({0: 2})])
    with pytest.raises(Exception, match="`GradientAccumulationScheduler` would skip rounds"):
        trainer.fit(make_module()(), loader())


@both
@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_the_twins_bar_shows_the_clients_done(package, bar, tmp_path, capsys):
    from lightning_lbgm._compat.progress_bar import ClientProgress

    class Reader(package.Callback):
        def on_train_batch_start(self, trainer, *args):
            progress = ClientProgress(trainer)
            self.shown = progress.is_shown
            progress.show(1, 4)
            self.read = progress._read()
            progress.restore()

    reader = Reader()
    callbacks = [reader, getattr(twin.callbacks, bar)()]
    make_trainer(package, tmp_path, callbacks=callbacks, enable_progress_bar=True).fit(make_module()(), loader())
    assert reader.shown
    assert "1/4 clients]" in reader.read
    capsys.readouterr()


@both
def test_the_twins_mlflow_logger_gets_the_rounds(package, tmp_path):
    import mlflow
    from pytorch_lightning.loggers import MLFlowLogger

    uri = mlflow.get_tracking_uri()
    try:
        logger = MLFlowLogger("twin", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        make_trainer(package, tmp_path, logger=logger).fit(make_module()(), loader())
        history = logger.experiment.get_metric_history(logger.run_id, "comm/uplink_bytes_total")
        assert [metric.step for metric in history] == [0, 1]
        assert logger.experiment.get_run(logger.run_id).info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(uri)


# The module


class Halving:
    """A schedule that is none of torch's."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] /= 2

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@both
@pytest.mark.parametrize("written_for", PACKAGES.values(), ids=PACKAGES)
def test_hooks_that_lightning_looks_up_are_found(package, written_for, tmp_path):
    """A schedule of one's own is allowed if the module overrides ``lr_scheduler_step``."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        return [optimizer], [Halving(optimizer)]

    module = make_module(
        written_for,
        configure_optimizers=configure_optimizers,
        lr_scheduler_step=lambda self, scheduler, metric: scheduler.step(),
    )()
    trainer = make_trainer(package, tmp_path)
    trainer.fit(module, loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)


@both
def test_a_compiled_module_of_the_twin(package, tmp_path):
    module = make_module()()
    make_trainer(package, tmp_path).fit(torch.compile(module, backend="eager"), loader())
    plain = make_module()()
    make_trainer(package, tmp_path).fit(plain, loader())
    torch.testing.assert_close(module.net.weight, plain.net.weight)


@both
def test_predictions_come_back_in_order(package, tmp_path):
    module = make_module(learning_rate=0.1)()
    trainer = make_trainer(package, tmp_path)
    trainer.fit(module, loader())
    assert trainer.predict(module, [loader()]) == [float(batch[0].sum()) for batch in loader()]


def test_a_nested_module_of_the_other_package_knows_the_trainer(tmp_path):
    for one, two in ((pl, twin), (twin, pl)):
        seen = []
        inner = make_module(two, forward=lambda self, x, seen=seen: seen.append(self.trainer) or self.net(x))()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.inner(batch[0]), batch[1])

        outer = make_module(one, training_step=training_step)()
        outer.inner = inner
        trainer = make_trainer(one, tmp_path, strategy=LBGMFederated(num_clients=2, execution="sequential"))
        trainer.fit(outer, loader())
        assert set(seen) == {trainer}


class Pickled(twin.LightningModule):
    training_step = make_module().training_step
    configure_optimizers = make_module().configure_optimizers

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)


def test_copies_and_pickles_are_of_the_users_class(tmp_path):
    module = Pickled()
    trainer = make_trainer(pl, tmp_path)
    trainer.fit(module, loader())
    assert isinstance(module, Pickled)
    assert isinstance(module, pl.LightningModule)
    module.trainer = None
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    again = [pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), copy.deepcopy(module)]
    assert [type(copied) for copied in again] == [Pickled] * 3
    assert all(torch.equal(copied.net.weight, module.net.weight) for copied in again)
    # Back in a Trainer of its own package it is what it was.
    make_trainer(twin, tmp_path).fit(module, loader())
    assert type(module) is Pickled


def test_an_abstract_base_and_a_registry_of_subclasses_are_not_disturbed(tmp_path):
    registry = []

    class Base(twin.LightningModule, abc.ABC):
        def __init_subclass__(cls, *, tag, **kwargs) -> None:
            super().__init_subclass__(**kwargs)
            registry.append(tag)

        @abc.abstractmethod
        def loss(self, batch): ...

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    class Module(Base, tag="mine"):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        configure_optimizers = make_module().configure_optimizers

    module = Module()
    make_trainer(pl, tmp_path).fit(module, loader())
    assert registry == ["mine"]
    assert (type(module).__name__, type(module).__module__) == ("Module", __name__)


# LightningCLI


@both
def test_the_cli_takes_strategy_stages_and_callbacks(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI

    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return loader()

    (tmp_path / "config.in.yaml").write_text(f"""
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_lbgm.LBGMCallback
      init_args: {{figures: false}}
    - class_path: {package.__name__}.callbacks.EarlyStopping
      init_args: {{monitor: train/loss}}
  strategy:
    class_path: lightning_lbgm.LBGMFederated
    init_args:
      num_clients: 5
      uplink: [{{class_path: lightning_lbgm.LookBack, init_args: {{threshold: 0.3}}}}]
""")
    trainer = cli(make_module(package), Data, args=["fit", "--config=config.in.yaml"]).trainer
    assert (trainer.strategy.num_clients, trainer.global_step) == (5, 2)
    assert "threshold: 0.3" in (tmp_path / "config.yaml").read_text()
