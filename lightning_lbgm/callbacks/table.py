"""Append-only tables in files, in constant time a row: CSV, and the JSON of MLflow's tables."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["JsonTable", "append_csv"]

Row = dict[str, Any]
_TAIL = b"]}"
_BLOCK = 1 << 20


def append_csv(path: Path, rows: Sequence[Row], *, starts: bool = False) -> None:
    """Add rows to a CSV file, with a header if it is new; ``starts`` empties it first.

    The columns are those of the first rows: other keys are left out, missing ones stay empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = starts or not path.exists()
    columns = list(rows[0])
    if not fresh:
        with path.open(newline="") as file:
            columns = next(csv.reader(file), columns)
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


class JsonTable:
    """A table in one JSON file, pandas' orient "split", which ``mlflow.load_table`` reads.

    The file is whole after each call: new rows take the place of the closing brackets. One that is there already, from
    a run that was killed or could not send it, goes on growing.

    Args:
        path: The file, made with the first rows.
        columns: Names of the columns; other keys of rows are left out, missing ones are null.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._columns = list(columns)
        self._head = _dump({"columns": self._columns, "data": []})[: -len(_TAIL)]
        if path.exists() and not _is_table(path, self._head):
            path.unlink()
        self._earlier = path.stat().st_size if path.exists() else 0  # bytes of rows that were there before
        if self._earlier == len(self._head + _TAIL):
            self._earlier = 0

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows. Where the disk is full the file is left as it was, and ``OSError`` raised."""
        text = b",".join(_dump([_plain(row.get(name)) for name in self._columns]) for row in rows)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self._head + _TAIL)
        with self.path.open("r+b", buffering=0) as file:
            end = file.seek(-len(_TAIL), os.SEEK_END)
            comma = b"" if end == len(self._head) else b","
            try:
                _write(file, comma + text + _TAIL)
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                    file.seek(end)
                    _write(file, _TAIL)
                raise

    def copy_to(self, path: Path) -> None:
        """Copy the table as it is now; rows may be added meanwhile."""
        size = self.path.stat().st_size - len(_TAIL)
        with self.path.open("rb") as source, path.open("wb") as target:
            _copy(source, target, size)
            target.write(_TAIL)

    def put_before(self, path: Path) -> None:
        """Put the rows of another table before those added by this object.

        Rows that this file had before are kept instead if they are more.
        """
        if not _is_table(path, self._head):
            _convert(path, self._columns, self._head)
        empty = len(self._head + _TAIL)
        if path.stat().st_size <= max(self._earlier, empty):
            return
        if self.path.stat().st_size == empty:
            shutil.move(path, self.path)
            return
        with path.open("r+b") as target, self.path.open("rb") as source:
            target.seek(-len(_TAIL), os.SEEK_END)
            if self._earlier:  # this object's rows begin at a comma
                source.seek(self._earlier - len(_TAIL))
            else:
                source.seek(len(self._head))
                target.write(b",")
            shutil.copyfileobj(source, target, _BLOCK)
        self._earlier = 0
        shutil.move(path, self.path)


def _is_table(path: Path, head: bytes) -> bool:
    """Whether a file is a whole table with these columns."""
    with path.open("rb") as file:
        begin = file.read(len(head))
        file.seek(-min(len(_TAIL), path.stat().st_size), os.SEEK_END)
        return begin == head and file.read() == _TAIL


def _convert(path: Path, columns: Sequence[str], head: bytes) -> None:
    """Write a table with other columns, or the same in another order or spelling, with these."""
    table = json.loads(path.read_bytes())
    places = [table["columns"].index(name) if name in table["columns"] else None for name in columns]
    rows = [_dump([None if place is None else _plain(row[place]) for place in places]) for row in table["data"]]
    path.write_bytes(head + b",".join(rows) + _TAIL)


def _copy(source: Any, target: Any, size: int) -> None:
    while size > 0:
        block = source.read(min(_BLOCK, size))
        if not block:
            return
        target.write(block)
        size -= len(block)


def _write(file: Any, data: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=float).encode()
