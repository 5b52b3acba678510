"""History of a run for figures: curves and an error map of bounded memory."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Curves", "ErrorMap", "Merge"]

Merge = Literal["mean", "max", "last"]


class Curves:
    """Points of one or several curves over the same x, in bins that double when there are too many.

    Args:
        merge: What becomes of each column if points share a bin; the first column is x. NaN does not count beside a
            number.
        capacity: Most bins.

    Examples:
        >>> curves = Curves(("last", "mean"), capacity=4)
        >>> for x in range(6):
        ...     curves.append((x, 10.0 * x))
        >>> curves.points()
        [(1.0, 5.0), (3.0, 25.0), (5.0, 45.0)]
    """

    def __init__(self, merge: Sequence[Merge], capacity: int = 1024) -> None:
        self._merge = tuple(merge)
        self._capacity = capacity
        self._values = array("d")  # the bins' points, one after the other
        self._stride = 1  # points of a bin
        self._filled = 1  # points in the last bin

    def __len__(self) -> int:
        return len(self._values) // len(self._merge)

    def append(self, point: Sequence[float]) -> None:
        """Add a point, or put it in the place of the last one if x is the same."""
        width = len(self._merge)
        last = self._values[-width:]
        if last and last[0] == point[0]:
            self._values[-width:] = array("d", point)
        elif last and self._filled < self._stride:
            self._values[-width:] = self._merged(last, self._filled, point, 1)
            self._filled += 1
        else:
            self._values.extend(point)
            self._filled = 1
        if len(self) > self._capacity:
            self._halve()

    def points(self) -> list[tuple[float, ...]]:
        """Return the points, one a bin."""
        return list(zip(*(self._values[column :: len(self._merge)] for column in range(len(self._merge)))))

    def state_dict(self) -> dict[str, Any]:
        """Return the bins as built-ins and a tensor ``(bins, columns)`` in float64."""
        points = torch.tensor(self._values.tolist(), dtype=torch.float64).reshape(-1, len(self._merge))
        return {"points": points, "stride": self._stride, "filled": self._filled}

    def load_state_dict(self, state: dict[str, Any] | Tensor) -> None:
        """Continue from ``state_dict``, or from all points, ``(points, columns)``, of a checkpoint of version 0.1."""
        self._values, self._stride, self._filled = array("d"), 1, 1
        if isinstance(state, Tensor):
            for point in state.tolist():
                self.append(point)
        else:
            self._values.extend(state["points"].flatten().tolist())
            self._stride, self._filled = state["stride"], state["filled"]

    def _merged(self, a: Sequence[float], a_count: int, b: Sequence[float], b_count: int) -> array[float]:
        merged = array("d")
        for how, x, y in zip(self._merge, a, b):
            if math.isnan(x) or math.isnan(y):
                merged.append(x if math.isnan(y) else y)
            elif how == "mean":
                merged.append((a_count * x + b_count * y) / (a_count + b_count))
            else:
                merged.append(max(x, y) if how == "max" else y)
        return merged

    def _halve(self) -> None:
        """Merge the bins in pairs."""
        points = self.points()
        counts = [self._stride] * (len(points) - 1) + [self._filled]
        self._values = array("d")
        for i in range(0, len(points) - 1, 2):
            self._values.extend(self._merged(points[i], counts[i], points[i + 1], counts[i + 1]))
        self._filled += self._stride
        if len(points) % 2:
            self._values.extend(points[-1])
            self._filled = counts[-1]
        self._stride *= 2


class ErrorMap:
    """Mean error by round and client, in cells that grow with the run: 16 bytes for each that has a value.

    Args:
        max_rounds: Most columns; if there are more rounds, a column has 2, 4, ... of them.
        max_clients: Most rows; if there are more clients, a row has 2, 4, ... of them.
    """

    def __init__(self, max_rounds: int = 400, max_clients: int = 200) -> None:
        self._limits = (max_rounds, max_clients)
        self._clear()

    def _clear(self) -> None:
        self.round_stride = self.client_stride = 1
        self._columns, self._rows = array("i"), array("i")  # each cell's place
        self._means, self._counts = array("f"), array("i")
        self._first = self._last = self._highest = 0  # column and row
        self._open: dict[int, int] = {}  # row -> cell in the last column

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, round_index: int, errors: Iterable[tuple[int, float]]) -> None:
        """Add a round's pairs of client and error. NaN does not count."""
        column = round_index // self.round_stride
        if not self._counts:
            self._first = column
        elif column != self._last:
            self._open = {}
        self._first, self._last = min(self._first, column), column
        for client, error in errors:
            if math.isnan(error):
                continue
            row = client // self.client_stride
            self._highest = max(self._highest, row)
            cell = self._open.get(row)
            if cell is None:
                self._open[row] = len(self._counts)
                self._columns.append(column)
                self._rows.append(row)
                self._means.append(error)
                self._counts.append(1)
            else:
                self._counts[cell] += 1
                self._means[cell] += (error - self._means[cell]) / self._counts[cell]
        while self._last - self._first >= self._limits[0]:
            self._coarsen(2, 1)
        while self._highest >= self._limits[1]:
            self._coarsen(1, 2)

    def cells(self) -> tuple[list[int], list[int], list[float]]:
        """Return each cell's first round, first client and mean error."""
        rounds = [column * self.round_stride for column in self._columns]
        clients = [row * self.client_stride for row in self._rows]
        return rounds, clients, self._means.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the cells as built-ins and tensors."""
        return {
            "round_stride": self.round_stride,
            "client_stride": self.client_stride,
            "columns": torch.tensor(self._columns.tolist(), dtype=torch.int32),
            "rows": torch.tensor(self._rows.tolist(), dtype=torch.int32),
            "means": torch.tensor(self._means.tolist(), dtype=torch.float32),
            "counts": torch.tensor(self._counts.tolist(), dtype=torch.int32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._clear()
        self.round_stride, self.client_stride = state["round_stride"], state["client_stride"]
        self._set(*(state[name].numpy() for name in ("columns", "rows", "means", "counts")))

    def load_tests(self, rounds: Tensor, clients: Tensor, errors: Tensor) -> None:
        """Continue from all tests of a run, as checkpoints of version 0.1 have them."""
        self._clear()
        tests: dict[int, list[tuple[int, float]]] = {}
        for round_index, client, error in zip(rounds.tolist(), clients.tolist(), errors.tolist()):
            tests.setdefault(round_index, []).append((client, error))
        for round_index, pairs in tests.items():
            self.add(round_index, pairs)

    def _coarsen(self, columns: int, rows: int) -> None:
        """Merge cells, ``columns`` by ``rows`` of them to one."""
        self.round_stride, self.client_stride = self.round_stride * columns, self.client_stride * rows
        keys = np.stack([np.asarray(self._columns) // columns, np.asarray(self._rows) // rows])
        (column, row), inverse = np.unique(keys, axis=1, return_inverse=True)
        weights = np.asarray(self._counts)
        counts = np.bincount(inverse.ravel(), weights)
        means = np.bincount(inverse.ravel(), weights * np.asarray(self._means, np.float64)) / counts
        self._set(column, row, means, counts, last=self._last // columns)

    def _set(self, column: Any, row: Any, means: Any, counts: Any, last: int | None = None) -> None:
        self._columns, self._rows = (array("i", values.astype(np.int32).tobytes()) for values in (column, row))
        self._means = array("f", means.astype(np.float32).tobytes())
        self._counts = array("i", counts.astype(np.int32).tobytes())
        if len(column):
            self._first, self._highest = int(column.min()), int(row.max())
            self._last = int(column.max()) if last is None else last
            self._open = {int(row[cell]): int(cell) for cell in np.flatnonzero(column == self._last)}
