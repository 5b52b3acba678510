"""MLflow table that grows in a file of the run's folder and is stored once a minute and at the end."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_lbgm.callbacks.mlflow_batches import download, mark_as_table, works_in_threads
from lightning_lbgm.callbacks.table import JsonTable
from lightning_lbgm.callbacks.unsent import Folder

__all__ = ["MlflowTable"]

_SECONDS = 60.0
_SHARE = 0.02  # of the time, at most, is spent on storing a table that has become large
_PATIENCE = 30.0  # seconds that the end waits for a thread


class MlflowTable:
    """A table artifact of an MLflow run.

    Rows are added to a file in constant time. The file is stored as the artifact by a thread; what an earlier fit of
    the same run has stored comes before.

    Args:
        logger: The logger.
        artifact: Path of the table in the run.
        columns: Its columns.
        folders: Where the file may lie; the first that can be written to is taken.

    Attributes:
        folder: Where the file is; None before there is one.
        error: Why it could not be stored the last time; None if it was.
    """

    def __init__(self, logger: Any, artifact: str, columns: Sequence[str], folders: Iterable[Folder]) -> None:
        self.artifact = artifact
        self.folder: Folder | None = None
        self.error: Exception | None = None
        self._logger, self._columns, self._folders = logger, columns, folders
        self._file: JsonTable | None = None
        self._is_joined = False  # to what is stored already
        self._is_marked = False
        self._thread: threading.Thread | None = None
        self._next_at = time.monotonic() + _SECONDS

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows.

        Raises:
            OSError: If they cannot be written to any folder.
        """
        if self._file is None:
            self._file = self._open(rows)
            self.error = self._try(self._join)
        else:
            self._file.append(rows)
        busy = self._thread is not None and self._thread.is_alive()
        is_due = self._is_joined and not busy and time.monotonic() > self._next_at
        if is_due and works_in_threads(self._logger):
            self._thread = threading.Thread(target=self._store_copy, name="lightning_lbgm-table", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Store the table and delete the file, which stays if that fails: see ``error``."""
        if self._file is None:
            return
        if self._thread is not None:
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                self.error = TimeoutError(f"no answer within {_PATIENCE:g} seconds")
                return
        self.error = self._try(self._join) or self._try(self._store_file)
        if self.error is None:
            assert self.folder is not None
            self.folder.remove(self._file.path)

    def _open(self, rows: Sequence[dict[str, Any]]) -> JsonTable:
        error: OSError | None = None
        for folder in self._folders:
            try:
                file = JsonTable(folder.path / self.artifact, self._columns)
                file.append(rows)
                self.folder = folder
                return file
            except OSError as reason:
                error = error or reason
        assert error is not None
        raise error

    def _join(self) -> None:
        """Put what is stored already before the rows."""
        if self._is_joined:
            return
        assert self._file is not None
        with tempfile.TemporaryDirectory() as folder:
            stored = download(self._logger, self.artifact, folder)
            if stored is not None:
                self._file.put_before(stored)
        self._is_joined = True

    def _store_copy(self) -> None:
        """Store the table as it is now; more rows may come meanwhile."""
        begin = time.monotonic()
        self.error = self._try(self._copy_and_store)
        end = time.monotonic()
        self._next_at = end + max(_SECONDS, (end - begin) / _SHARE)

    def _store_file(self) -> None:
        assert self._file is not None
        self._store(self._file.path)

    def _copy_and_store(self) -> None:
        assert self._file is not None
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, os.path.basename(self.artifact))
            self._file.copy_to(copy)
            self._store(copy)

    def _store(self, path: Path) -> None:
        client, run_id = self._logger.experiment, self._logger.run_id
        client.log_artifact(run_id, str(path), os.path.dirname(self.artifact) or None)
        if not self._is_marked:
            mark_as_table(self._logger, self.artifact)
            self._is_marked = True

    def _try(self, action: Callable[[], None]) -> Exception | None:
        try:
            action()
        except Exception as error:
            return error
        return None
