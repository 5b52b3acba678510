"""FederatedCallback: a client's report, and what callbacks and stages add to it."""

import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, fit_tiny, flat_params
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lbgm import FederatedCallback, LBGMFederated, LookBack
from lightning_lbgm.compression import NO_CONTEXT, Decision, Encoded, Stage


class Measure(FederatedCallback):
    """Note which clients ended, and add two numbers to their reports; the second to clients of even number alone."""

    def __init__(self):
        self.seen, self.done = [], []

    def on_client_end(self, trainer, pl_module, report):
        assert isinstance(pl_module, pl.LightningModule)
        self.seen.append((report.client_id, report.outcome))
        report.metrics["twice"] = 2.0 * report.client_id
        if report.client_id % 2 == 0:
            report.metrics["even"] = 1.0

    def on_client_progress(self, trainer, done, total):
        self.done.append((done, total))


def test_each_client_is_seen_once_with_its_report(fit):
    measure = Measure()
    fit(strategy=LBGMFederated(3, uplink=[LookBack(1.0)], seed=0), callbacks=[measure], max_epochs=2)
    refreshed, recycled = [(k, "refreshed") for k in range(3)], [(k, "recycled") for k in range(3)]
    assert measure.seen == refreshed + recycled
    assert measure.done == 2 * [(1, 3), (2, 3), (3, 3)]


def test_what_is_added_to_reports_reaches_metrics_and_table(tmp_path):
    recorder = Recorder()
    settings = {"callbacks": [Measure(), recorder], "max_epochs": 1, "logger": CSVLogger(tmp_path, "", "")}
    fit_tiny(tmp_path, LBGMFederated(3, seed=0), **settings)
    assert recorder.callback_metrics[0]["client/twice"] == 2.0  # of 0, 2 and 4
    assert recorder.callback_metrics[0]["client/even"] == 1.0  # of clients 0 and 2, which alone have it
    with open(next(tmp_path.rglob("clients.csv"))) as file:
        rows = list(csv.DictReader(file))
    assert [row["client/twice"] for row in rows] == ["0.0", "2.0", "4.0"]
    assert [row["client/even"] for row in rows] == ["1.0", "nan", "1.0"]


class Counting(Stage):
    """A stage that names its outcome and counts the entries above 1."""

    def encode(self, update, state, context=NO_CONTEXT):
        large = float((update.dense().abs() > 1).sum())
        return Encoded(update, Decision((), (), (), outcome="counted", metrics={"large": large}))


def test_a_stage_names_its_outcome_and_adds_numbers(fit):
    recorder = Recorder()
    fit(strategy=LBGMFederated(2, uplink=[Counting()], seed=0), callbacks=[recorder], max_epochs=1)
    for client in recorder.reports[0].clients:
        assert client.outcome == "counted"
        assert client.metrics == {"large": 0.0}


def test_an_error_of_a_callback_takes_the_round_back(tmp_path):
    class Failing(FederatedCallback):
        def on_client_end(self, trainer, pl_module, report):
            if trainer.strategy.round_index == 1 and report.client_id == 2:
                raise RuntimeError("boom")

    torch.manual_seed(0)
    module = TinyModule()
    with pytest.raises(RuntimeError, match="boom"):
        fit_tiny(tmp_path, LBGMFederated(3, seed=0), module, callbacks=[Failing()], max_epochs=3)
    _, expected = fit_tiny(tmp_path, LBGMFederated(3, seed=0), max_epochs=1)
    assert torch.equal(flat_params(module), flat_params(expected))


def test_without_a_federation_it_is_refused(tmp_path):
    settings = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[Measure()], max_epochs=1, **settings)
    with pytest.raises(MisconfigurationException, match="`Measure` reports on a federation"):
        trainer.fit(TinyModule(), [])


def test_other_columns_later_leave_the_table_whole(tmp_path):
    class Late(FederatedCallback):
        def on_client_end(self, trainer, pl_module, report):
            if trainer.strategy.round_index:
                report.metrics["late"] = math.pi

    settings = {"callbacks": [Late()], "max_epochs": 2, "logger": CSVLogger(tmp_path, "", "")}
    fit_tiny(tmp_path, LBGMFederated(2, seed=0), **settings)
    with open(next(tmp_path.rglob("clients.csv"))) as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "0", "1", "1"]
    assert all(None not in row and row["local_steps"] for row in rows)
