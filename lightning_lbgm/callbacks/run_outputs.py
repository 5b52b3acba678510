"""Outputs of all callbacks of one fit: if writing fails, training goes on and one warning says so."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_lbgm.callbacks.mlflow_batches import batch_sender, takes_batches, without_progress_bars
from lightning_lbgm.callbacks.mlflow_table import MlflowTable
from lightning_lbgm.callbacks.outputs import is_mlflow_logger, mlflow_loggers, run_folder, writes_files
from lightning_lbgm.callbacks.sender import Entry, Sender
from lightning_lbgm.callbacks.table import append_csv
from lightning_lbgm.callbacks.unsent import Folder, Unsent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunOutputs", "after_an_error", "log_round", "outputs_of", "show_metrics", "start_outputs"]

_MATPLOTLIB = RequirementCache("matplotlib")
_log = logging.getLogger(__name__)


class RunOutputs:
    """Metrics, settings, tables and figures of a fit, for all callbacks that have some.

    Nothing here raises because of what it writes to. What a logger does not take is kept in the run's folder
    ``unsent``, and that is warned of once.
    """

    def __init__(self) -> None:
        self.unsent = Unsent()
        self._senders: dict[int, Sender] = {}  # by the logger's id
        self._tables: dict[tuple[int, str], MlflowTable] = {}

    def log_metrics(self, trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
        """Log metrics in every logger; those of MLflow are sent by a thread, in batches."""
        for logger in trainer.loggers:
            entry = Entry(step, metrics)
            try:
                if trainer.is_global_zero and is_mlflow_logger(logger) and takes_batches(logger):
                    self._sender(trainer, logger).put(entry)
                else:
                    logger.log_metrics(metrics, step=step)
            except Exception as error:
                self._keep_metrics(type(logger).__name__, self._folders(trainer, logger), [entry], error)
        self.unsent.tell()

    def log_settings(self, trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
        """Log a federation's settings as hyperparameters in every logger."""
        params = {"federated": dict(settings)}
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(params)
            except Exception as error:  # also MLflow's refusal to change a param of a run that is resumed
                write = partial(_write_json, params)
                what = f"{type(logger).__name__} did not take the federated settings"
                folders = self._folders(trainer, logger)
                self.unsent.keep("settings", what, error, folders, "settings.json", write)
        self.unsent.tell()

    def add_rows(
        self, trainer: pl.Trainer, rows: Sequence[dict[str, Any]], artifact: str, file_name: str, *, starts: bool
    ) -> None:
        """Add rows to a table in MLflow, and to a CSV file in another logger's folder, in constant time.

        Args:
            trainer: The trainer.
            rows: The rows, with the same keys.
            artifact: Path of the table in MLflow.
            file_name: Name of the CSV file.
            starts: Whether these are a run's first rows, which replace what an earlier run left in the same file.
        """
        if not rows:
            return
        for logger in mlflow_loggers(trainer):
            table = self._table(trainer, logger, artifact, list(rows[0]))
            with self._guard("table", f"Rows of {artifact} could not be written to any folder"):
                table.append(rows)
            self._note_error(table)
        if run_folder(trainer) is not None:
            write = partial(append_csv, rows=rows, starts=starts)
            self._write(trainer, "table", file_name, write, partial(append_csv, rows=rows))
        self.unsent.tell()

    def write_figures(self, trainer: pl.Trainer, figures: Mapping[str, Callable[[], Figure]]) -> None:
        """Draw figures, by file name, to ``figures/`` in MLflow, another logger's folder or the root folder."""
        if not _MATPLOTLIB:
            self.unsent.note("figures", "No figures are drawn", ModuleNotFoundError(str(_MATPLOTLIB)))
            figures = {}
        for name, draw in figures.items():
            with self._guard("figures", f"{name} could not be drawn"), tempfile.TemporaryDirectory() as folder:
                path = Path(folder, name)
                draw().savefig(path)
                self._send_figure(trainer, path)
        self.unsent.tell()

    def finish(self) -> None:
        """Send what is waiting, and store the tables."""
        for sender in self._senders.values():
            sender.close()
        tables, self._tables = self._tables, {}
        for table in tables.values():
            with self._guard("table", f"{table.artifact} could not be stored"), without_progress_bars():
                table.finish()
            self._note_error(table)
        self.unsent.tell()

    def _sender(self, trainer: pl.Trainer, logger: Any) -> Sender:
        if id(logger) not in self._senders:
            keep = partial(self._keep_metrics, type(logger).__name__, self._folders(trainer, logger))
            self._senders[id(logger)] = Sender(batch_sender(logger), keep)
        return self._senders[id(logger)]

    def _keep_metrics(self, name: str, folders: Sequence[Folder], entries: Sequence[Entry], error: Exception) -> None:
        rows = [
            {"logger": name, "step": entry.step, "time_ms": entry.time_ms, "metric": metric, "value": value}
            for entry in entries
            for metric, value in entry.metrics.items()
        ]
        if rows:
            what = f"{name} did not take metrics of round {entries[0].step}"
            self.unsent.keep("metrics", what, error, folders, "metrics.csv", partial(append_csv, rows=rows))

    def _table(self, trainer: pl.Trainer, logger: Any, artifact: str, columns: Sequence[str]) -> MlflowTable:
        key = (id(logger), artifact)
        if key not in self._tables:
            self._tables[key] = MlflowTable(logger, artifact, columns, self._folders(trainer, logger))
        return self._tables[key]

    def _note_error(self, table: MlflowTable) -> None:
        if table.error is not None:
            kept = table.folder.path if table.folder is not None else None
            self.unsent.note("table", f"MLflow did not take {table.artifact}", table.error, kept)

    def _send_figure(self, trainer: pl.Trainer, path: Path) -> None:
        for logger in mlflow_loggers(trainer):
            try:
                with without_progress_bars():
                    logger.experiment.log_artifact(logger.run_id, str(path), "figures")
            except Exception as error:
                what, name = f"MLflow did not take {path.name}", f"figures/{path.name}"
                copy = partial(shutil.copyfile, path)
                self.unsent.keep("figures", what, error, self._folders(trainer, logger), name, copy)
        if run_folder(trainer) is not None:
            copy = partial(shutil.copyfile, path)
            self._write(trainer, "figures", f"figures/{path.name}", copy, copy)

    def _write(
        self,
        trainer: pl.Trainer,
        kind: str,
        name: str,
        write: Callable[[Path], object],
        keep: Callable[[Path], object],
    ) -> None:
        """Write a file to the run's folder, else ``keep`` it elsewhere."""
        try:
            folder = run_folder(trainer)
            assert folder is not None
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(folder / name)
        except Exception as error:
            self.unsent.keep(kind, f"{name} could not be written", error, self._folders(trainer), name, keep)

    def _folders(self, trainer: pl.Trainer, logger: Any = None) -> list[Folder]:
        return self.unsent.folders(trainer, logger) if writes_files(trainer) else []

    @contextlib.contextmanager
    def _guard(self, kind: str, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.unsent.note(kind, what, error)


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, default=str, indent=1))


_outputs: weakref.WeakKeyDictionary[Any, RunOutputs] = weakref.WeakKeyDictionary()


def start_outputs(trainer: pl.Trainer) -> None:
    """Begin anew; each callback's ``setup`` of a fit does."""
    earlier = _outputs.pop(trainer, None)
    if earlier is not None:
        earlier.finish()


def outputs_of(trainer: pl.Trainer) -> RunOutputs:
    """Return what the callbacks of a trainer's fit share."""
    if trainer not in _outputs:
        _outputs[trainer] = RunOutputs()
    return _outputs[trainer]


@contextlib.contextmanager
def after_an_error() -> Iterator[None]:
    """Let nothing that is raised here hide an error that is on its way to the user."""
    try:
        yield
    except Exception:
        _log.exception("While another error was handled, this one came up and is only shown:")


def log_round(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    metrics: dict[str, float],
    round_index: int,
    in_bar: Sequence[str] = (),
) -> None:
    """Log a round's metrics in every logger, with the round as the step, and in ``trainer.callback_metrics``.

    Args:
        trainer: The trainer.
        module: Its module.
        metrics: The metrics by name.
        round_index: The round.
        in_bar: Names of those that stand in the progress bar.
    """
    show_metrics(trainer, module, metrics, in_bar)
    outputs_of(trainer).log_metrics(trainer, metrics, round_index)


def show_metrics(
    trainer: pl.Trainer, module: pl.LightningModule, metrics: Mapping[str, float], in_bar: Sequence[str] = ()
) -> None:
    """Put metrics into ``trainer.callback_metrics`` and the progress bar, and into no logger."""
    if not trainer.barebones:
        for name, value in metrics.items():
            exact = torch.tensor(value, dtype=torch.float64)  # float32 would round the byte counts
            module.log(name, exact, logger=False, prog_bar=name in in_bar, batch_size=1)
