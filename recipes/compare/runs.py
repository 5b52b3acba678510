"""Child runs: MLflow runs under one parent, each trained by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from recipes.compare.variants import Variant

__all__ = ["ChildRun", "finished_children", "open_parent", "train"]

_FINGERPRINT = "compare.fingerprint"
_POLL_SECONDS = 0.2


class ChildRun:
    """The training of one variant.

    Its MLflow run is made here and handed over by its id, so that it stands under the parent and ends with the right
    status even where the process does not get as far as to open it.

    Args:
        client: The store.
        parent: The parent run.
        variant: What to train.
        entry: Module that is a LightningCLI when run.
        options: Further arguments of the command line.
        tracking_uri: The store's address.
        output: Folder of the config and of the log.

    Attributes:
        run_id: Its MLflow run.
        log: File of what it prints.
        arguments: What the entry is called with.
    """

    def __init__(
        self,
        client: MlflowClient,
        parent: Run,
        variant: Variant,
        entry: str,
        options: Sequence[str],
        tracking_uri: str,
        output: Path,
    ) -> None:
        self.client, self.variant = client, variant
        tags = {MLFLOW_PARENT_RUN_ID: parent.info.run_id, _FINGERPRINT: variant.fingerprint(entry, options)}
        run = client.create_run(parent.info.experiment_id, tags=tags, run_name=variant.run_name)
        self.run_id: str = run.info.run_id
        self.log = output / "logs" / f"{variant.file_name}.log"
        self.begin = time.perf_counter()
        configs = [*variant.configs, *self._write_config(output / "configs", tracking_uri)]
        self.arguments = [
            "fit",
            *(f"--config={path}" for path in configs),
            "--trainer.enable_progress_bar=false",
            *options,
            *variant.options,
        ]
        self._command = [sys.executable, "-m", entry, *self.arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None

    def _write_config(self, folder: Path, tracking_uri: str) -> list[Path]:
        """Write the variant's changes, and the logger that goes to its run."""
        folder.mkdir(parents=True, exist_ok=True)
        init_args = {"run_id": self.run_id, "tracking_uri": tracking_uri, "prefix": ""}
        logger = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": init_args}
        paths = []
        for ending, content in (("", self.variant.changes), (".logger", {"trainer": {"logger": logger}})):
            if content:
                paths.append(folder / f"{self.variant.file_name}{ending}.yaml")
                paths[-1].write_text(yaml.safe_dump(content, sort_keys=False))
        return paths

    def start(self) -> None:
        """Start the process, with one thread; what it prints goes to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.log.open("wb")
        self.begin = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended yet."""
        return self._process is not None and self._process.poll() is None

    @property
    def rounds(self) -> int:
        """Rounds that the store knows of."""
        history = self.client.get_metric_history(self.run_id, "comm/uplink_bytes_total")
        return history[-1].step + 1 if history else 0

    def finish(self) -> bool:
        """Close the run after its process has ended, and return whether it trained to the end."""
        assert self._process is not None
        assert self._file is not None
        self._file.close()
        status = self.client.get_run(self.run_id).info.status
        succeeded = self._process.returncode == 0 and status == "FINISHED"
        if not succeeded and status != "FAILED":
            self.client.set_terminated(self.run_id, "FAILED")
        return succeeded

    def cancel(self) -> None:
        """End the process and close the run as killed."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._file is not None:
            self._file.close()
        self.client.set_terminated(self.run_id, "KILLED")


def open_parent(
    client: MlflowClient, experiment: str, name: str, artifacts: Path | None = None, resume: str | None = None
) -> Run:
    """Make a parent run, or open the one to go on with; here the store's tables are made, before all others.

    Args:
        client: The store.
        experiment: Name of the experiment, which is made if it is not there.
        name: The run's name.
        artifacts: Folder of a new experiment's artifacts, for a database of ours; None: a server has its own place.
        resume: Id of the run to go on with.
    """
    if resume is not None:
        client.update_run(resume, status="RUNNING")
        return client.get_run(resume)
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        experiment_id = found.experiment_id
    else:
        place = None if artifacts is None else artifacts.resolve().as_uri()
        experiment_id = client.create_experiment(experiment, artifact_location=place)
    return client.create_run(experiment_id, run_name=name)


def finished_children(
    client: MlflowClient, parent: Run, entry: str, options: Sequence[str]
) -> Callable[[Variant], str | None]:
    """Return a function that finds a variant's finished run under a parent, made with the same settings."""
    runs = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}' and attributes.status = 'FINISHED'",
    )
    known = {run.data.tags.get(_FINGERPRINT): run.info.run_id for run in reversed(runs)}
    return lambda variant: known.get(variant.fingerprint(entry, options))


def train(
    waiting: Sequence[Callable[[], ChildRun]],
    jobs: int,
    on_end: Callable[[ChildRun, bool], None],
    on_poll: Callable[[list[ChildRun]], None],
) -> None:
    """Train child runs, ``jobs`` at a time.

    Args:
        waiting: Make the child runs, each called when its turn has come.
        jobs: Processes at a time.
        on_end: Called with each that has ended, and whether it succeeded.
        on_poll: Called again and again with those that are running.
    """
    queue, running = list(waiting), list[ChildRun]()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                child = queue.pop(0)()
                running.append(child)  # before it starts, so that it is cancelled where that fails
                child.start()
            for child in [child for child in running if not child.is_running]:
                running.remove(child)
                on_end(child, child.finish())
            on_poll(running)
            time.sleep(_POLL_SECONDS)
    except BaseException:
        for child in running:
            child.cancel()
        raise
