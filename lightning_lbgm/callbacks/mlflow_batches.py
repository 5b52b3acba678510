"""MLflow logging in batches of several steps, and artifacts without progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_lbgm.callbacks.sender import Entry

__all__ = ["batch_sender", "download", "mark_as_table", "takes_batches", "without_progress_bars", "works_in_threads"]

_BARS = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
_TABLES = "mlflow.loggedArtifacts"  # the tag by which `mlflow.load_table` finds runs


def takes_batches(logger: Any) -> bool:
    """Whether ``batch_sender`` can log an MLflow logger's metrics: it stands in for Lightning's own code."""
    return works_in_threads(logger) and getattr(logger.log_metrics, "__module__", "").endswith(".loggers.mlflow")


def works_in_threads(logger: Any) -> bool:
    """Whether other threads see the same store: a database in memory is another one in each."""
    uri = str(getattr(logger.experiment, "tracking_uri", ""))
    return not (uri.startswith("sqlite") and (":memory:" in uri or uri.rstrip("/") == "sqlite:"))


def batch_sender(logger: Any) -> Callable[[Sequence[Entry]], None]:
    """Return a function that sends the metrics of several steps to MLflow at once, named as the logger would."""
    from mlflow.entities import Metric

    prefix = getattr(logger, "_prefix", "")
    if prefix:
        prefix = f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '-')}"

    def name_of(name: str) -> str:
        return re.sub("[^a-zA-Z0-9_/. -]+", "", prefix + name)

    def send(entries: Sequence[Entry]) -> None:
        metrics = [
            Metric(name_of(name), value, entry.time_ms, entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
        ]
        logger.experiment.log_batch(logger.run_id, metrics=metrics, synchronous=True)

    return send


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch off MLflow's progress bars of artifacts, which tear Lightning's apart.

    Only for the training's own thread: the environment is the whole process's.
    """
    before = os.environ.get(_BARS)
    os.environ[_BARS] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_BARS, None)
        else:
            os.environ[_BARS] = before


def download(logger: Any, artifact: str, folder: str) -> Path | None:
    """Copy an artifact into a folder; None if the run has none of that name."""
    with without_progress_bars():
        found = logger.experiment.list_artifacts(logger.run_id, os.path.dirname(artifact) or None)
        if artifact not in [file.path for file in found]:
            return None
        return Path(logger.experiment.download_artifacts(logger.run_id, artifact, folder))


def mark_as_table(logger: Any, artifact: str) -> None:
    """Let ``mlflow.load_table`` find an artifact, as ``log_table`` would."""
    client, entry = logger.experiment, {"path": artifact, "type": "table"}
    marked = json.loads(client.get_run(logger.run_id).data.tags.get(_TABLES, "[]"))
    if entry not in marked:
        client.set_tag(logger.run_id, _TABLES, json.dumps([*marked, entry]))
