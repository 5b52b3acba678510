"""Fallback folder for metrics and files that a logger did not take, with one warning."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lbgm.callbacks.outputs import is_mlflow_logger, logger_folder, root_folder

__all__ = ["Folder", "Unsent"]


class Folder:
    """A folder that is made when something is written to it.

    Args:
        root: A folder that stays.
        below: The path from there; None for a new name.
    """

    def __init__(self, root: Path, below: str | None) -> None:
        self._root, self._below = root, below
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The folder, which may not be there yet; ``OSError`` if a new name cannot be made."""
        if self._path is None:
            new = self._below is None
            self._path = Path(tempfile.mkdtemp(prefix="lightning_lbgm_", dir=self._root)) if new else self._root
            self._path = self._path / (self._below or "")
        return self._path

    def remove(self, path: Path) -> None:
        """Delete a file in it, and the folders below the root that are empty then."""
        path.unlink()
        with contextlib.suppress(OSError):
            for parent in path.parents:
                if parent == self._root:
                    return
                parent.rmdir()


class Unsent:
    """Keep what could not be sent, and warn once a run and folder.

    Files go to ``unsent`` in the run's folder, else to a new folder for temporary files.
    """

    def __init__(self) -> None:
        self._spare = Folder(Path(tempfile.gettempdir()), None)
        self._told: set[str] = set()  # folders, and kinds of what is kept nowhere
        self._messages: list[str] = []
        self._lock = threading.Lock()  # the sender's thread keeps things, too

    def folders(self, trainer: pl.Trainer, logger: Any = None) -> list[Folder]:
        """Return where things are kept, the best first: beside the run's checkpoints or in the logger's own folder."""
        root, below = root_folder(trainer), "unsent"
        with contextlib.suppress(Exception):  # of a logger that does not know its folder
            if is_mlflow_logger(logger):
                below = f"{logger.experiment_id}/{logger.run_id}/unsent"
            elif logger is not None:
                root = logger_folder(trainer, logger)
        return [Folder(root, below), self._spare]

    def keep(
        self,
        kind: str,
        what: str,
        error: Exception,
        folders: Sequence[Folder],
        name: str,
        write: Callable[[Path], object],
    ) -> None:
        """Write a file to the first folder that can be written to, and note what to warn of.

        Args:
            kind: What is warned of once, if it can be kept nowhere.
            what: What failed.
            error: Why.
            folders: The folders; with none nothing is kept.
            name: Path of the file in the folder.
            write: Writes to a path whose folder is there.
        """
        with self._lock:
            kept = None
            for folder in folders:
                with contextlib.suppress(Exception):  # the next folder may do
                    path = folder.path / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write(path)
                    kept = folder.path
                    break
        self.note(kind, what, error, kept)

    def note(self, kind: str, what: str, error: Exception, kept: Path | None = None) -> None:
        """Note what to warn of, if it is the first in the folder ``kept``, or of its kind if that is None."""
        key = kind if kept is None else str(kept)
        if key not in self._told:
            self._told.add(key)
            where = "" if kept is None else f": what could not be sent, this and other things, is in {kept}"
            self._messages.append(f"{what}: {_brief(error)}. Training goes on, and this is warned of once{where}.")

    def tell(self) -> None:
        """Warn of what was noted; only the training's own thread does, because a filter may make errors of warnings."""
        while self._messages:
            rank_zero_warn(self._messages.pop(0))


def _brief(error: Exception) -> str:
    """Return an error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
