"""Where a logger, a disk or a figure fails, training goes on, the user's own error comes through, and what was to be
written is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from conftest import Recorder, TinyModule, fit_tiny
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from running import lay_store

from lightning_lbgm import ConvergenceMonitor, GradientSpaceCallback, LBGMCallback, LBGMFederated
from lightning_lbgm.callbacks import mlflow_table as _mlflow_table
from lightning_lbgm.callbacks import sender as _sender
from lightning_lbgm.callbacks.mlflow_batches import _BARS
from lightning_lbgm.callbacks.outputs import is_mlflow_logger, metric_to_draw
from lightning_lbgm.callbacks.run_outputs import outputs_of

OURS = ("comm/", "lbgm/", "fl/", "convergence/")


@pytest.fixture(scope="module")
def make_logger(tmp_path_factory):
    """Return a function that makes a logger; all share one store. The artifacts of a broken one cannot be written."""
    root, before = tmp_path_factory.mktemp("mlflow"), mlflow.get_tracking_uri()
    (root / "file").write_text("")
    lay_store(root)

    def make(name="fl", broken=False, kind=MLFlowLogger, **kwargs):
        artifacts = root / "file" / "x" if broken else root / "artifacts"
        uri = f"sqlite:///{root}/mlflow.db"
        name = f"{name}, broken" if broken else name
        return kind(name, tracking_uri=uri, artifact_location=artifacts.as_uri(), **kwargs)

    yield make
    mlflow.set_tracking_uri(before)


class Failing(TinyModule):
    """Raise at the start of a round."""

    def __init__(self, error, at):
        super().__init__()
        self.error, self.at = error, at

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.at:
            raise self.error
        return super().training_step(batch, batch_idx)


def train(root, logger=False, module=None, callbacks=(), strategy=None, **settings):
    """Train for four rounds and return (trainer, our warnings)."""
    strategy = strategy or LBGMFederated(num_clients=3, seed=0)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit_tiny(
            root,
            strategy,
            module or TinyModule(),
            logger=logger,
            callbacks=list(callbacks),
            val=True,
            **{"max_epochs": 4, **settings},
        )
    return trainer, [str(w.message) for w in caught if "Training goes on" in str(w.message)]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


FIGURES = {"figures/metric_vs_uplink.png", "figures/metric_vs_total.png", "figures/lbp_error.png"}


def kept_folder(root: Path, logger) -> Path:
    return root / logger.experiment_id / logger.run_id / "unsent"


def steps(logger, name="comm/savings"):
    return [point.step for point in logger.experiment.get_metric_history(logger.run_id, name)]


def status(logger):
    return logger.experiment.get_run(logger.run_id).info.status


# An artifact store that cannot be written


def test_what_a_broken_artifact_store_does_not_take_is_kept_and_warned_of_once(make_logger, tmp_path):
    logger = make_logger(broken=True)
    trainer, told = train(tmp_path, logger, callbacks=[ConvergenceMonitor()])
    assert trainer.global_step == 4
    folder = kept_folder(tmp_path, logger)
    assert files(folder) == FIGURES | {"figures/convergence.png", "federated/clients.json"}
    assert len(told) == 1
    assert str(folder) in told[0]
    table = pd.read_json(folder / "federated" / "clients.json", orient="split")
    assert table["round"].tolist() == [t for t in range(4) for _ in range(3)]
    assert status(logger) == "FINISHED"
    assert steps(logger) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [ValueError("my own bug"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_users_error_comes_through_and_the_run_fails(make_logger, tmp_path, error, broken):
    logger, handler = make_logger(broken=broken), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)) as caught:
            train(tmp_path, logger, Failing(error, at=2), [ConvergenceMonitor()])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored after an interrupt
    assert isinstance(error, KeyboardInterrupt) or caught.value is error
    assert status(logger) == "FAILED"
    assert steps(logger) == [0, 1]
    if broken:
        table = pd.read_json(kept_folder(tmp_path, logger) / "federated" / "clients.json", orient="split")
    else:
        table = logger.experiment.load_table(logger.experiment_id, "federated/clients.json", [logger.run_id])
        assert not list(tmp_path.iterdir())
    assert table["round"].tolist() == [0, 0, 0, 1, 1, 1]


def test_an_error_before_the_first_round_leaves_nothing(make_logger, tmp_path):
    logger = make_logger(broken=True)
    with pytest.raises(ValueError, match="my own bug"):
        train(tmp_path, logger, Failing(ValueError("my own bug"), at=0), [ConvergenceMonitor()])
    assert status(logger) == "FAILED"
    assert not list(tmp_path.iterdir())


def test_where_warnings_are_errors_the_users_own_still_comes_through(make_logger, tmp_path):
    module, settings = Failing(ValueError("my own bug"), at=2), {"callbacks": [ConvergenceMonitor()]}
    logger = make_logger(broken=True)
    warnings.filterwarnings("error", "MLflow did not take")
    with pytest.raises(ValueError, match="my own bug"):
        fit_tiny(tmp_path, LBGMFederated(num_clients=3), module, logger=logger, **settings)
    assert status(logger) == "FAILED"


def test_a_broken_artifact_store_does_not_stop_the_gradient_space(make_logger, tmp_path):
    logger = make_logger(broken=True)
    trainer, told = train(tmp_path, logger, callbacks=[GradientSpaceCallback()], strategy="auto")
    names = {f"figures/gradient_space_{name}.png" for name in ("components", "cosines", "principal")}
    assert files(kept_folder(tmp_path, logger)) == {"gradient_space/layers.json", *names}
    assert (trainer.global_step, len(told)) == (4, 1)


def test_a_run_that_was_ended_before_gets_what_is_left(make_logger, tmp_path):
    class Early(TinyModule):
        def on_train_epoch_end(self):
            if self.current_epoch == 3:
                self.trainer.logger.finalize("success")

    logger = make_logger()
    _, told = train(tmp_path, logger, Early())
    assert (steps(logger), told, status(logger)) == ([0, 1, 2, 3], [], "FINISHED")


# Loggers that raise


class Picky(CSVLogger):
    """Takes neither our metrics nor our settings."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith(OURS) for name in metrics):
            raise RuntimeError("no room\nat all")
        super().log_metrics(metrics, step)

    def log_hyperparams(self, params=None):
        raise TypeError("unknown params")


def test_what_another_logger_does_not_take_is_kept_in_its_folder(tmp_path):
    recorder = Recorder()
    trainer, told = train(tmp_path, Picky(tmp_path, name="a", version=0), callbacks=[ConvergenceMonitor(), recorder])
    folder = tmp_path / "a" / "version_0" / "unsent"
    assert files(folder) == {"settings.json", "metrics.csv"}
    assert len(told) == 1
    assert "unknown params" in told[0]
    assert json.loads((folder / "settings.json").read_text())["federated"]["num_clients"] == 3
    kept = pd.read_csv(folder / "metrics.csv", float_precision="round_trip")
    names = {name for name in trainer.callback_metrics if name.startswith(OURS)}
    assert set(kept["metric"]) == names
    for name in ("comm/uplink_bytes_total", "convergence/gap_norm"):
        values = kept[kept["metric"] == name]
        assert values["step"].tolist() == [0, 1, 2, 3]
        assert values["value"].tolist() == [metrics[name] for metrics in recorder.callback_metrics]


class PickyMLFlow(MLFlowLogger):
    """A user's own way to log, which is called for each round."""

    def log_metrics(self, metrics, step=None):
        if "comm/savings" in metrics and step == 1:
            raise RuntimeError("not that one")
        super().log_metrics(metrics, step)


def test_a_loggers_own_way_to_log_is_used(make_logger, tmp_path):
    logger = make_logger(kind=PickyMLFlow)
    _, told = train(tmp_path, logger)
    assert steps(logger) == [0, 2, 3]
    kept = pd.read_csv(kept_folder(tmp_path, logger) / "metrics.csv", float_precision="round_trip")
    assert kept["step"].unique().tolist() == [1]
    assert len(told) == 1


def test_what_the_thread_cannot_send_is_kept(make_logger, tmp_path):
    """Names of more than 250 characters are refused; with this prefix Lightning's own are shorter, ours are not."""
    logger = make_logger(prefix="p" * 230)
    trainer, told = train(tmp_path, logger)
    assert len(steps(logger, f"{'p' * 230}-train/loss")) == trainer.global_step == 4
    kept = pd.read_csv(kept_folder(tmp_path, logger) / "metrics.csv", float_precision="round_trip")
    assert kept[kept["metric"] == "comm/savings"]["step"].tolist() == [0, 1, 2, 3]
    assert len(told) == 1


# Disks and figures


def test_where_the_root_folder_cannot_be_written_a_temporary_one_is_taken(make_logger, tmp_path):
    root = tmp_path / "file"
    root.write_text("")
    logger = make_logger()
    _, told = train(root, logger)
    assert told == []
    table = logger.experiment.load_table(logger.experiment_id, "federated/clients.json", [logger.run_id])
    assert len(table) == 12
    _, (told,) = train(root, make_logger(broken=True))
    folder = Path(told.rsplit(" is in ", 1)[1].rstrip("."))
    assert files(folder) == FIGURES | {"federated/clients.json"}
    _, (told,) = train(root)
    assert files(Path(told.rsplit(" is in ", 1)[1].rstrip("."))) == FIGURES
    callback = GradientSpaceCallback()
    with pytest.warns(UserWarning, match=r"`GradientSpaceCallback` measures nothing: .*`folder=` for the gradients"):
        trainer, _ = fit_tiny(root, "auto", callbacks=[callback])
    assert trainer.global_step == 3
    trainer, _ = train(root, strategy="auto", callbacks=[GradientSpaceCallback(folder=root / "below")])
    assert trainer.global_step == 4


def test_a_figure_that_cannot_be_drawn_does_not_stop_the_others(make_logger, tmp_path, monkeypatch):
    def draw(self, path, *args, **kwargs):
        if "uplink" in str(path):
            raise RuntimeError("no such font")
        save(self, path, *args, **kwargs)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", draw)
    trainer, told = train(tmp_path, CSVLogger(tmp_path, name="a", version=0))
    assert trainer.global_step == 4
    assert len(told) == 1
    assert "metric_vs_uplink.png could not be drawn: RuntimeError: no such font" in told[0]
    assert (tmp_path / "a" / "version_0" / "figures" / "lbp_error.png").exists()


# Every kind of Trainer


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}, {}], ids=str)
def test_metrics_are_there_without_a_logger(tmp_path, settings):
    if "barebones" in settings:
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
        settings = {**settings, **dict.fromkeys(off)}
    callbacks = [ConvergenceMonitor()]
    trainer, told = train(tmp_path, **{"logger": False, **settings}, callbacks=callbacks)
    assert told == []
    assert ("comm/savings" in trainer.callback_metrics) == ("barebones" not in settings)
    assert files(tmp_path) == (set() if settings else FIGURES | {"figures/convergence.png"})


def test_several_loggers_get_the_same(make_logger, tmp_path):
    first, second = make_logger(prefix="p"), make_logger()
    csv = CSVLogger(tmp_path, name="a", version=0)
    stop = EarlyStopping("comm/downlink_bytes_total", mode="max", stopping_threshold=700, patience=99)
    trainer, told = train(tmp_path, [first, csv, second], callbacks=[stop, ConvergenceMonitor()])
    assert told == []
    rounds = trainer.global_step
    assert rounds == 3  # 21 parameters of 4 bytes to 3 clients are 252 bytes a round
    assert steps(first, "p-comm/savings") == steps(second) == list(range(rounds))
    table = pd.read_csv(tmp_path / "a" / "version_0" / "metrics.csv")
    assert table["comm/savings"].notna().sum() == rounds
    assert len(pd.read_csv(tmp_path / "a" / "version_0" / "clients.csv")) == 3 * rounds
    for logger in (first, second):
        assert len(logger.experiment.load_table(logger.experiment_id, "federated/clients.json", [logger.run_id])) == 9


def test_rounds_share_a_batch_of_metrics(make_logger, tmp_path, monkeypatch):
    monkeypatch.setattr(_sender, "_INTERVAL", 1000.0)  # sent when the fit ends, or when there are a thousand values
    logger, batches = make_logger(), []
    log_batch = MlflowClient.log_batch

    def noted(self, run_id, metrics=(), **kwargs):
        if any(metric.key.startswith(OURS) for metric in metrics):
            batches.append([metric.step for metric in metrics])
        return log_batch(self, run_id, metrics=metrics, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", noted)
    callbacks = [ConvergenceMonitor(figure=False), LBGMCallback(figures=False)]
    train(tmp_path, logger, callbacks=callbacks, max_epochs=40)
    assert batches == [[step for step in range(40) for _ in range(8 + 14)]]
    assert steps(logger) == steps(logger, "convergence/gap_norm") == list(range(40))


def test_twins_of_lightnings_classes_are_found():
    twin = pytest.importorskip("pytorch_lightning")

    class Mine(twin.loggers.MLFlowLogger):
        pass

    assert is_mlflow_logger(Mine("a", tracking_uri="sqlite://"))
    assert is_mlflow_logger(MLFlowLogger("a", tracking_uri="sqlite://"))
    assert not is_mlflow_logger(twin.loggers.CSVLogger("a"))
    trainer = twin.Trainer(
        callbacks=[twin.callbacks.EarlyStopping("x")], logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.callback_metrics.update({"val/loss": torch.tensor(1.0), "x": torch.tensor(2.0)})
    assert metric_to_draw(trainer, None) == "x"


# MLflow's tables and progress bars


def test_a_table_is_stored_in_between(make_logger, tmp_path, monkeypatch):
    monkeypatch.setattr(_mlflow_table, "_SECONDS", 0.0)
    monkeypatch.setattr(_mlflow_table, "_SHARE", 1e9)
    logger, last = make_logger(), []

    def stored_rounds():
        client = logger.experiment
        return client.load_table(logger.experiment_id, "federated/clients.json", [logger.run_id])["round"].tolist()

    class Look(TinyModule):
        def on_train_epoch_end(self):
            for table in outputs_of(self.trainer)._tables.values():
                if table._thread is not None:
                    table._thread.join()
                    last.append(stored_rounds()[-1])

    train(tmp_path, logger, Look())
    assert last == [0, 1, 2, 3]
    assert stored_rounds() == [t for t in range(4) for _ in range(3)]


def test_a_database_in_memory_which_only_one_thread_sees_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(_mlflow_table, "_SECONDS", 0.0)
    before = mlflow.get_tracking_uri()
    try:
        logger = MLFlowLogger("a", tracking_uri="sqlite://", artifact_location=(tmp_path / "artifacts").as_uri())
        _, told = train(tmp_path / "root", logger)
        assert told == []
        assert steps(logger) == [0, 1, 2, 3]
        table = logger.experiment.load_table(logger.experiment_id, "federated/clients.json", [logger.run_id])
        assert len(table) == 12
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("setting", [None, "true"])
def test_mlflows_progress_bars_are_off_for_ours_alone(make_logger, tmp_path, monkeypatch, capfd, setting):
    monkeypatch.delenv(_BARS, raising=False)
    if setting is not None:
        monkeypatch.setenv(_BARS, setting)
    logger = make_logger()
    trainer, _ = train(tmp_path, logger, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    train(tmp_path, make_logger(run_id=logger.run_id), ckpt_path=tmp_path / "a.ckpt")
    assert "artifacts" not in capfd.readouterr().err
    assert os.environ.get(_BARS) == setting


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from conftest import TinyModule, fit_tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning_lbgm import LBGMFederated
root = sys.argv[2]
class Killed(TinyModule):
    def on_train_epoch_start(self):
        if self.current_epoch == 5:
            time.sleep(100)
logger = MLFlowLogger("fl", tracking_uri=f"sqlite:///{root}/mlflow.db", artifact_location=f"file://{root}/a")
print(logger.run_id, flush=True)
every = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
settings = {"callbacks": [every], "enable_checkpointing": True, "max_epochs": 9}
fit_tiny(root, LBGMFederated(num_clients=3, seed=0), Killed(), logger=logger, **settings)
"""


def test_a_killed_run_has_its_metrics_and_a_resumed_one_its_whole_table(tmp_path):
    """Killed in the pause after the fifth round, in which nothing is logged, as soon as its metrics are there."""
    uri, before = f"sqlite:///{lay_store(tmp_path)}", mlflow.get_tracking_uri()
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(tmp_path)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            run_id = process.stdout.readline().strip()
            logger = MLFlowLogger("fl", tracking_uri=uri, run_id=run_id)
            while process.poll() is None and steps(logger) != [0, 1, 2, 3, 4]:
                time.sleep(0.2)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert steps(logger) == [0, 1, 2, 3, 4]
        local = kept_folder(tmp_path, logger) / "federated" / "clients.json"
        assert pd.read_json(local, orient="split")["round"].tolist() == [t for t in range(5) for _ in range(3)]
        train(tmp_path, logger, ckpt_path=tmp_path / "epoch=4.ckpt", max_epochs=7)
        assert steps(logger) == [0, 1, 2, 3, 4, 5, 6]
        table = logger.experiment.load_table(logger.experiment_id, "federated/clients.json", [run_id])
        assert table["round"].tolist() == [t for t in range(7) for _ in range(3)]
        assert not local.exists()
    finally:
        mlflow.set_tracking_uri(before)
