"""Where callbacks write files and figures, and which metric they draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.imports import RequirementCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["can_draw", "metric_to_draw", "mlflow_loggers", "run_folder", "write_figures", "writes_files"]

_MATPLOTLIB = RequirementCache("matplotlib")
_PLAIN_NAMES = ("val/acc", "val_acc", "val/accuracy", "val_accuracy", "val/loss", "val_loss")
_OUR_PREFIXES = ("comm/", "lbgm/", "fl/", "gradient_space/")


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
