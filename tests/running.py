"""Recipes run within the test's own process, which has imported what they import, and MLflow's empty database."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import runpy
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from unittest import mock

import mlflow
import torch
from mlflow.tracking import MlflowClient

RECIPES = Path(__file__).parent.parent / "recipes"


def run_here(name: str, *args: str, **env: str) -> str:
    """Run ``recipes/<name>.py`` as a script of this process and return what it prints.

    A relative path of SQLite's must not be among the arguments: MLflow keeps a store by its address for as long as the
    process lasts.
    """
    with mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", [name, *args]), settings_kept():
        out = StringIO()
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return out.getvalue()


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Put back what a script may set for its whole process."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "alembic", "mlflow")
    levels = {name: logging.getLogger(name).level for name in names}
    threads, address = torch.get_num_threads(), mlflow.get_tracking_uri()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads(threads)
        mlflow.set_tracking_uri(address)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def lay_store(folder: Path) -> Path:
    """Put MLflow's database without experiments into a folder, and return its path.

    MLflow makes one by all the migrations of its history, in seconds. The copy is as if somebody had run MLflow there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(empty_store(), folder / "mlflow.db"))


@functools.cache
def empty_store() -> Path:
    # ignore_cleanup_errors: the process may hold the file until its end.
    keep = tempfile.TemporaryDirectory(prefix="mlflow-", ignore_cleanup_errors=True)
    path = Path(keep.name) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    empty_store.keep = keep  # is removed when the process ends
    return path
