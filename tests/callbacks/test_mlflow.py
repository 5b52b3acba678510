"""What a real sqlite MLflow store holds after a run."""

from __future__ import annotations

import itertools

import mlflow
import numpy as np
import pytest
from conftest import Recorder, TinyModule, fit_tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from mlflow.tracking import MlflowClient

from lightning_lbgm import (
    ClientEvaluation,
    ConvergenceMonitor,
    GradientSpaceCallback,
    LBGMCallback,
    LBGMFederated,
    LookBack,
    NetworkClock,
    PartitionReport,
    PathologicalPartitioner,
)
from recipes.compare.report import draw, read_result
from recipes.compare.times import Network, make_networks

NAMES = [
    "comm/uplink_bytes",
    "comm/uplink_bytes_total",
    "comm/uplink_floats_total",
    "comm/downlink_bytes_total",
    "comm/savings",
    "lbgm/recycled_fraction",
    "lbgm/lbp_error_mean",
    "lbgm/threshold",
    "fl/cohort_size",
    "fl/update_norm",
    "fl/rejected_clients",
]


@pytest.fixture(scope="module")
def make_logger(tmp_path_factory):
    """Return a function that makes a logger; all share one store, whose tables take seconds to create."""
    root = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()

    def make(**kwargs):
        return MLFlowLogger(
            "fl", tracking_uri=f"sqlite:///{root}/mlflow.db", artifact_location=(root / "artifacts").as_uri(), **kwargs
        )

    yield make
    mlflow.set_tracking_uri(before)  # the logger sets it for the whole process


def clients_table(logger):
    client = logger.experiment
    return client.load_table(logger.experiment_id, "federated/clients.json", run_ids=[logger.run_id])


def artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    found = client.list_artifacts(run_id, path)
    return {a.path for a in found if not a.is_dir}.union(
        *(artifacts(client, run_id, a.path) for a in found if a.is_dir)
    )


@pytest.fixture(scope="module")
def run(make_logger, tmp_path_factory):
    """Train for six rounds and return (logger, stored run, reports, run folder)."""
    logger, recorder, root = make_logger(), Recorder(), tmp_path_factory.mktemp("run")
    strategy = LBGMFederated(
        num_clients=4, clients_per_round=3, partitioner=PathologicalPartitioner(2), uplink=[LookBack(0.5)], seed=5
    )
    fit_tiny(root, strategy, logger=logger, callbacks=[recorder], max_epochs=6, val=True)
    return logger, logger.experiment.get_run(logger.run_id), recorder.reports, root


def test_every_metric_is_stored_every_round_with_the_round_as_step(run):
    logger, stored, reports, _ = run
    client = logger.experiment
    series = {name: client.get_metric_history(stored.info.run_id, name) for name in NAMES}
    assert all([m.step for m in history] == [0, 1, 2, 3, 4, 5] for history in series.values())
    sent = [report.uplink_bits / 8 for report in reports]
    assert [m.value for m in series["comm/uplink_bytes"]] == sent
    assert [m.value for m in series["comm/uplink_bytes_total"]] == list(np.cumsum(sent))
    dense = 3 * 84 * np.arange(1, 7)
    np.testing.assert_allclose([m.value for m in series["comm/savings"]], 1 - np.cumsum(sent) / dense)
    assert [m.value for m in series["comm/downlink_bytes_total"]] == list(dense)
    assert [m.value for m in series["lbgm/lbp_error_mean"]] == [report.lbp_error_mean for report in reports]
    for name in ("val/acc", "train/loss"):  # the user's own stand beside them
        assert [m.step for m in client.get_metric_history(stored.info.run_id, name)] == [0, 1, 2, 3, 4, 5]
    assert stored.info.status == "FINISHED"


def test_the_resolved_settings_are_params(run):
    params = {
        name.removeprefix("federated/"): v for name, v in run[1].data.params.items() if name.startswith("federated")
    }
    assert params == {
        "num_clients": "4",
        "partitioner": "PathologicalPartitioner(classes_per_client=2)",
        "uplink": "[LookBack(threshold=0.5, granularity='model')]",
        "clients_per_round": "3",
        "local_epochs": "1",
        "local_steps": "None",
        "server_optimizer": "SGD(lr=1.0)",
        "weighting": "examples",
        "buffers": "average",
        "rounds_per_epoch": "1",
        "seed": "5",
        "execution": "auto",
        "vectorized_chunk": "None",
        "num_parameters": "21",
    }


def test_the_clients_table_is_an_artifact(run):
    logger, _, reports, _ = run
    table = clients_table(logger)
    clients = [client for report in reports for client in report.clients]
    assert table["round"].tolist() == [r for r in range(6) for _ in range(3)]
    assert table["client"].tolist() == [client.client_id for client in clients]
    assert table["decision"].tolist() == [client.outcome for client in clients]
    assert {"recycled", "refreshed"} == set(table["decision"])
    assert table["uplink_bytes"].tolist() == [4 if d == "recycled" else 84 for d in table["decision"]]
    np.testing.assert_allclose(table["lbp_error"], [client.lbp_error for client in clients])


def test_the_figures_are_artifacts(run):
    logger = run[0]
    assert artifacts(logger.experiment, logger.run_id) == {
        "federated/clients.json",
        "figures/metric_vs_uplink.png",
        "figures/metric_vs_total.png",
        "figures/lbp_error.png",
    }


def test_the_convergence_monitor_logs_to_the_store(fit, make_logger):
    logger, recorder = make_logger(), Recorder()
    monitor = ConvergenceMonitor(bound=1e9)
    fit(LBGMFederated(num_clients=3, seed=0), logger=logger, callbacks=[monitor, recorder], max_epochs=3)
    for name in ("sent_error_max", "over_bound_fraction", "gap_cosine"):
        history = logger.experiment.get_metric_history(logger.run_id, f"convergence/{name}")
        assert [m.step for m in history] == [0, 1, 2]
        assert [m.value for m in history] == [metrics[f"convergence/{name}"] for metrics in recorder.callback_metrics]
    assert "figures/convergence.png" in artifacts(logger.experiment, logger.run_id)


def test_an_mlflow_run_leaves_no_files_in_the_run_folder(run):
    assert not list(run[3].iterdir())


def test_a_resumed_run_continues_in_the_same_mlflow_run(fit, make_logger, tmp_path):
    first = make_logger()
    trainer, _ = fit(LBGMFederated(num_clients=3, seed=0), logger=first, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = make_logger(run_id=first.run_id)
    fit(LBGMFederated(num_clients=3, seed=0), logger=again, max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert [m.step for m in first.experiment.get_metric_history(first.run_id, "comm/savings")] == [0, 1, 2, 3]
    table = clients_table(first)
    assert table["round"].tolist() == [r for r in range(4) for _ in range(3)]


def test_a_failed_run_keeps_its_table(fit, make_logger):
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    logger = make_logger()
    with pytest.raises(RuntimeError, match="boom"):
        fit(LBGMFederated(num_clients=3), module=Failing(), logger=logger, max_epochs=4)
    table = clients_table(logger)
    assert table["round"].tolist() == [0] * 3 + [1] * 3
    assert logger.experiment.get_run(logger.run_id).info.status == "FAILED"


def test_without_mlflow_the_files_go_to_the_loggers_folder(fit, tmp_path):
    fit(LBGMFederated(num_clients=3), logger=CSVLogger(tmp_path, name="run", version=0), val=True)
    files = {path.name for path in (tmp_path / "run" / "version_0").rglob("*") if path.is_file()}
    assert {"clients.csv", "metric_vs_uplink.png", "metric_vs_total.png", "lbp_error.png"} <= files
    lines = (tmp_path / "run" / "version_0" / "clients.csv").read_text().splitlines()
    assert lines[0].startswith("round,client,decision,lbp_error,lbc,uplink_bytes,downlink_bytes")
    assert len(lines) == 1 + 3 * 3


def test_without_a_logger_the_figures_go_to_the_root_folder(fit, tmp_path):
    fit(LBGMFederated(num_clients=3), val=True)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"metric_vs_uplink.png", "metric_vs_total.png", "lbp_error.png"}


def test_outputs_can_be_switched_off(fit, tmp_path):
    callback = LBGMCallback(client_table=False, figures=False)
    fit(LBGMFederated(num_clients=3), logger=CSVLogger(tmp_path, version=0), callbacks=[callback], val=True)
    assert not list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.rglob("clients.csv"))


def test_a_gradient_space_has_metrics_table_and_figures_also_where_it_is_resumed(fit, make_logger, tmp_path):
    logger, first = make_logger(), GradientSpaceCallback(keep_gradients=True)
    trainer, module = fit("auto", logger=logger, callbacks=[first], batch_size=20)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    client = logger.experiment
    names = [f"figures/gradient_space_{name}.png" for name in ("components", "cosines", "principal")]
    assert artifacts(client, logger.run_id) == {"gradient_space/layers.json", *names}
    second, again = GradientSpaceCallback(), make_logger(run_id=logger.run_id)
    settings = {"max_epochs": 5, "ckpt_path": tmp_path / "a.ckpt", "batch_size": 20}
    fit("auto", logger=again, callbacks=[second], **settings)
    history = client.get_metric_history(logger.run_id, "gradient_space/n95")
    assert [point.step for point in history] == [2, 5, 8, 11, 14]
    table = client.load_table(logger.experiment_id, "gradient_space/layers.json", run_ids=[logger.run_id])
    assert table["epoch"].tolist() == [t for t in range(5) for _ in range(3)]
    assert table["layer"].tolist() == ["(model)", *(name for name, _ in module.named_parameters())] * 5
    assert [point.value for point in history] == table["n95"][::3].tolist()
    assert [path.name for path in tmp_path.rglob("*")] == ["a.ckpt"]  # the gradients are gone


def test_mlflows_autologging_does_not_stop_a_fit(fit, make_logger):
    mlflow.set_tracking_uri(make_logger()._tracking_uri)
    mlflow.pytorch.autolog(log_models=False, checkpoint=False)
    try:
        trainer, _ = fit(LBGMFederated(num_clients=3))
    finally:
        mlflow.pytorch.autolog(disable=True)
    assert trainer.strategy.round_index == 3


def test_the_evaluation_of_clients_is_stored(make_logger, tmp_path):
    logger, callback = make_logger(), ClientEvaluation(every_n_rounds=2, fine_tune_steps=1)
    fit_tiny(tmp_path, LBGMFederated(num_clients=4, seed=0), callbacks=[callback], max_epochs=4, logger=logger)
    client = logger.experiment
    history = client.get_metric_history(logger.run_id, "clients/val/acc_worst")
    assert [m.step for m in history] == [0, 1, 3]
    table = client.load_table(logger.experiment_id, "federated/client_evaluation.json", run_ids=[logger.run_id])
    assert table["round"].tolist() == [0] * 4 + [1] * 4 + [3] * 4
    assert list(table.columns[:3]) == ["round", "client", "num_examples"]
    assert {"val/acc", "own/val/acc", "tuned/val/acc", "uplink_bytes"} <= set(table.columns)
    last = table[table["round"] == 3].set_index("client")
    assert last["val/acc"].min() == pytest.approx(history[-1].value)
    sent = clients_table(logger).groupby("client")["uplink_bytes"].sum()
    assert last["uplink_bytes"].to_dict() == sent.to_dict()
    assert "figures/clients.png" in artifacts(client, logger.run_id)


def test_the_partition_is_logged_once_and_again_in_another_run(make_logger, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    def run(logger, rounds=2, **settings):
        callbacks = [checkpoint, PartitionReport(), LBGMCallback(figures=False, client_table=False)]
        strategy = LBGMFederated(num_clients=4, partitioner=PathologicalPartitioner(2), seed=0)
        settings = {"callbacks": callbacks, "enable_checkpointing": True, "max_epochs": rounds, **settings}
        trainer, _ = fit_tiny(tmp_path, strategy, logger=logger, **settings)
        stored = logger.experiment.get_metric_history(logger.run_id, "partition/label_distance_mean")
        assert float(trainer.callback_metrics["partition/label_distance_mean"]) == stored[-1].value > 0.2
        return artifacts(logger.experiment, logger.run_id, "figures"), [metric.step for metric in stored]

    figures = {"figures/partition_labels.png", "figures/partition_sizes.png"}
    logger = make_logger()
    assert run(logger) == (figures, [0])
    # Resumed in the same run, not again, although callbacks can monitor it; in another run, there too.
    assert run(make_logger(run_id=logger.run_id), 3, ckpt_path=tmp_path / "step=1.ckpt") == (figures, [0])
    assert run(make_logger(), 3, ckpt_path=tmp_path / "step=1.ckpt") == (figures, [1])


def test_the_time_on_a_network_is_stored_and_can_be_replayed_on_another(make_logger, tmp_path):
    logger, recorder = make_logger(), Recorder()
    clock = NetworkClock(preset="lte", compute=0.5, spread=1.0)
    strategy = LBGMFederated(num_clients=4, clients_per_round=2, uplink=[LookBack(0.9)], seed=3, network=clock)
    fit_tiny(tmp_path, strategy, callbacks=[recorder], max_epochs=4, logger=logger, val=True)
    client, rounds = logger.experiment, [report.time for report in recorder.reports]
    for name in ("round_seconds", "total_seconds", "download_share", "compute_share", "upload_share", "straggler"):
        history = client.get_metric_history(logger.run_id, f"time/{name}")
        expected = [m[f"time/{name}"] for m in recorder.callback_metrics]
        assert [(m.step, m.value) for m in history] == list(enumerate(expected)), name
    table = clients_table(logger)
    assert table["compute_seconds"].tolist() == pytest.approx([c.compute for time in rounds for c in time.clients])
    assert "figures/metric_vs_hours.png" in artifacts(client, logger.run_id)
    networks = [Network("same", "the same", clock), *make_networks(["data_centre"], "1 s", 0.0)]
    result = read_result(client, logger.run_id, "LBGM", "val/acc", networks=networks)
    assert result.seconds["same"] == result.seconds["own"] == list(itertools.accumulate(t.seconds for t in rounds))
    assert result.shares["same"] == pytest.approx(result.shares["own"])
    # A step a round of a second, a round trip of half a millisecond each way, 84 bytes: hardly more.
    assert result.seconds["data_centre"] == pytest.approx([1.001, 2.002, 3.003, 4.004], abs=1e-5)
    names = draw([result], {"own": "its own network", "data_centre": "data centre"}).keys()
    assert {"metric_vs_hours.png", "metric_vs_hours_data_centre.png"} <= names
