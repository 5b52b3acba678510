"""Output folders of callbacks, and the metric that their figures draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_lbgm.reports.history import Curves

__all__ = [
    "MetricCurve",
    "is_mlflow_logger",
    "logger_folder",
    "metric_to_draw",
    "mlflow_loggers",
    "root_folder",
    "run_folder",
    "writes_files",
]

_PLAIN_NAMES = ("val/acc", "val_acc", "val/accuracy", "val_accuracy", "val/loss", "val_loss")
_OUR_PREFIXES = ("comm/", "lbgm/", "fl/", "convergence/", "gradient_space/", "partition/", "time/")


def writes_files(trainer: pl.Trainer) -> bool:
    """Whether this process writes files of this fit."""
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones  # type: ignore[attr-defined]


def is_mlflow_logger(logger: object) -> bool:
    """Whether a logger is Lightning's for MLflow, of either of its packages, or made from it."""
    return _has_base(logger, "MLFlowLogger")


def mlflow_loggers(trainer: pl.Trainer) -> list[Any]:
    """Return the loggers that take artifacts."""
    return [logger for logger in trainer.loggers if is_mlflow_logger(logger)]


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return where files of the run go that MLflow does not take; None if it takes all."""
    others = [logger for logger in trainer.loggers if not is_mlflow_logger(logger)]
    if trainer.loggers and not others:
        return None
    return logger_folder(trainer, others[0]) if others else root_folder(trainer)


def root_folder(trainer: pl.Trainer) -> Path:
    """Return ``default_root_dir``, or the working directory if that is on no disk of this machine."""
    return _local(trainer.default_root_dir) or Path.cwd()


def logger_folder(trainer: pl.Trainer, logger: Any) -> Path:
    """Return a logger's own folder, else the root folder."""
    return _local(logger.log_dir) or _local(logger.save_dir) or root_folder(trainer)


def _local(folder: Any) -> Path | None:
    return Path(folder) if folder and "://" not in str(folder) else None


class MetricCurve:
    """The metric that a figure shows, over what it is drawn against.

    Args:
        monitor: The metric. None: the best among those that are logged.

    Attributes:
        metric: Its name; None before it was logged.
    """

    def __init__(self, monitor: str | None) -> None:
        self.metric: str | None = None
        self._monitor = monitor
        self._curve = Curves(("last", "last"))

    def add(self, trainer: pl.Trainer, x: float) -> None:
        """Add the metric's value, if it was logged by now; it replaces an earlier one at the same ``x``."""
        if self.metric is None:
            self.metric = metric_to_draw(trainer, self._monitor)
        if self.metric is not None and self.metric in trainer.callback_metrics:
            self._curve.append((x, float(trainer.callback_metrics[self.metric])))

    def points(self) -> list[tuple[float, float]]:
        """Return pairs of ``x`` and value."""
        return [(x, y) for x, y in self._curve.points()]

    def state_dict(self) -> dict[str, Any]:
        """Return the curve as built-ins and tensors."""
        return {"metric": self.metric, "curve": self._curve.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.metric = state["metric"]
        self._curve.load_state_dict(state["curve"])


def metric_to_draw(trainer: pl.Trainer, monitor: str | None) -> str | None:
    """Return the best metric among those logged by now; only ``monitor`` counts if it is given."""
    return next((name for name in _candidates(trainer, monitor) if name in trainer.callback_metrics), None)


def _candidates(trainer: pl.Trainer, monitor: str | None) -> Iterator[str]:
    if monitor is not None:
        yield monitor
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _has_base(callback, "ModelCheckpoint", "EarlyStopping") and callback.monitor:
            yield callback.monitor
    yield from _PLAIN_NAMES
    names = [name for name in trainer.callback_metrics if not name.startswith(_OUR_PREFIXES)]
    for words in (("val", "acc"), ("acc",), ("val", "loss"), ("loss",)):
        yield from (name for name in names if all(word in name.lower() for word in words))


def _has_base(thing: object, *names: str) -> bool:
    """Whether an object's class or a base of it has one of these names, in either of Lightning's packages."""
    return any(base.__name__ in names for base in type(thing).__mro__)
