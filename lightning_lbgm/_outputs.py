"""Where callbacks write files and figures, and which metric they draw."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.imports import RequirementCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "can_draw",
    "log_round",
    "metric_to_draw",
    "mlflow_loggers",
    "run_folder",
    "write_figures",
    "write_table",
    "writes_files",
]

_MATPLOTLIB = RequirementCache("matplotlib")
_PLAIN_NAMES = ("val/acc", "val_acc", "val/accuracy", "val_accuracy", "val/loss", "val_loss")
_OUR_PREFIXES = ("comm/", "lbgm/", "fl/", "convergence/", "gradient_space/")


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
    if not trainer.barebones:
        for name, value in metrics.items():
            exact = torch.tensor(value, dtype=torch.float64)  # float32 would round the byte counts
            module.log(name, exact, logger=False, prog_bar=name in in_bar, batch_size=1)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=round_index)


def writes_files(trainer: pl.Trainer) -> bool:
    """Tell whether this process writes files of this fit."""
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones  # type: ignore[attr-defined]


def mlflow_loggers(trainer: pl.Trainer) -> list[MLFlowLogger]:
    """Return the loggers that take artifacts."""
    return [logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)]


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return where files of the run go that MLflow does not take; None where it takes all."""
    if trainer.loggers and all(isinstance(logger, MLFlowLogger) for logger in trainer.loggers):
        return None
    others = [logger for logger in trainer.loggers if not isinstance(logger, MLFlowLogger)]
    folder = (others[0].log_dir or others[0].save_dir) if others else None
    return Path(folder or trainer.default_root_dir)


def can_draw() -> bool:
    """Tell whether matplotlib is there, and warn where it is not."""
    if not _MATPLOTLIB:
        rank_zero_warn(f"No figures are drawn: {_MATPLOTLIB}")
    return bool(_MATPLOTLIB)


def write_figures(trainer: pl.Trainer, figures: dict[str, Figure]) -> None:
    """Write figures, by file name, to ``figures/`` in MLflow or the run's folder."""
    for name, figure in figures.items():
        for logger in mlflow_loggers(trainer):
            logger.experiment.log_figure(logger.run_id, figure, f"figures/{name}")
        folder = run_folder(trainer)
        if folder is not None:
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / "figures" / name)


def write_table(
    trainer: pl.Trainer, rows: Sequence[dict[str, Any]], artifact: str, file_name: str, *, starts: bool
) -> None:
    """Add rows to a table in MLflow, or to a CSV file in the run's folder.

    Args:
        trainer: The trainer.
        rows: The rows, with the same keys.
        artifact: Path of the table in MLflow.
        file_name: Name of the file.
        starts: Whether these are a run's first rows, which replace what an earlier run left in the same folder.
    """
    if not rows:
        return
    for logger in mlflow_loggers(trainer):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        logger.experiment.log_table(logger.run_id, columns, artifact)
    folder = run_folder(trainer)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name
        fresh = starts or not path.exists()
        with path.open("w" if fresh else "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if fresh:
                writer.writeheader()
            writer.writerows(rows)


def metric_to_draw(trainer: pl.Trainer, monitor: str | None) -> str | None:
    """Return the best metric among those logged by now; only ``monitor`` counts where it is given."""
    return next((name for name in _candidates(trainer, monitor) if name in trainer.callback_metrics), None)


def _candidates(trainer: pl.Trainer, monitor: str | None) -> Iterator[str]:
    if monitor is not None:
        yield monitor
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor:
            yield callback.monitor
    yield from _PLAIN_NAMES
    names = [name for name in trainer.callback_metrics if not name.startswith(_OUR_PREFIXES)]
    for words in (("val", "acc"), ("acc",), ("val", "loss"), ("loss",)):
        yield from (name for name in names if all(word in name.lower() for word in words))
