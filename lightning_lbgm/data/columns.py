"""Hugging Face datasets: their columns as arrays, each read once, and what is a dataset without being torch's."""

from __future__ import annotations

import datetime
import numbers
import weakref
from typing import Any

from torch.utils.data import Dataset, IterableDataset

__all__ = ["class_names", "column_names", "is_column", "is_map_dataset", "label_column", "read_column"]

_LABEL_COLUMNS = ("label", "labels")
_PLAIN = (numbers.Number, str, bytes, datetime.date, datetime.timedelta, type(None))

# By dataset, then by column. Such datasets do not change: what would change one returns another.
_read: weakref.WeakKeyDictionary[Any, dict[tuple[str, ...], list[Any]]] = weakref.WeakKeyDictionary()


def column_names(dataset: Any) -> list[str] | None:
    """Return the columns of a Hugging Face dataset; None for others."""
    names = getattr(dataset, "column_names", None)
    return names if isinstance(names, list) and hasattr(dataset, "with_format") else None


def is_map_dataset(value: Any) -> bool:
    """Whether something is a dataset whose examples have an index: torch's, or one of Hugging Face."""
    if isinstance(value, Dataset):
        return not isinstance(value, IterableDataset)
    return column_names(value) is not None and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def is_column(values: Any) -> bool:
    """Whether these are a column of a Hugging Face dataset, which would be read value by value, slowly, as a list."""
    return all(hasattr(values, name) for name in ("source", "column_name", "features"))


def read_column(column: Any) -> list[Any]:
    """Return the values of a column as Python objects, whatever the dataset's format and without its transform.

    Raises:
        ValueError: If it holds no plain values, such as images, which would all be decoded.
    """
    names: list[str] = []
    while is_column(column):  # one within another, for a column of dicts
        names.append(column.column_name)
        column = column.source
    return _values(column, tuple(reversed(names)))


def label_column(dataset: Any) -> list[Any]:
    """Return the labels of a Hugging Face dataset.

    Raises:
        ValueError: If not exactly one of its columns is named ``label`` or ``labels``.
    """
    columns = column_names(dataset) or []
    found = [name for name in columns if name in _LABEL_COLUMNS]
    if len(found) == 1:
        return _values(dataset, (found[0],))
    shown = ", ".join(map(repr, columns[:10])) + (", ..." if len(columns) > 10 else "")
    problem = "two columns of labels" if found else "no column `label` or `labels`"
    raise ValueError(
        f"The labels of the training dataset cannot be found: it has {problem}, its columns are {shown}. Pass the one"
        f" that holds the classes to the partitioner, such as `PathologicalPartitioner(3, labels=dataset["
        f'"{found[0] if found else "its_name"}"])`, or use `IIDPartitioner()`, which needs none.'
    )


def class_names(source: Any) -> list[str] | None:
    """Return what the classes of a dataset, or of its column of labels, are called; None if that is not known.

    Args:
        source: A Hugging Face dataset or column, or a dataset with torchvision's attribute ``classes``.
    """
    if is_column(source):
        names = getattr(source.features, "names", None)
    elif column_names(source) is not None:
        features = source.features or {}
        names = next((getattr(features[name], "names", None) for name in _LABEL_COLUMNS if name in features), None)
    else:
        names = getattr(source, "classes", None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return list(names)


def _values(dataset: Any, path: tuple[str, ...]) -> list[Any]:
    known = _read.setdefault(dataset, {})
    if path not in known:
        values = dataset.with_format(None)[path[0]]
        for name in path[1:]:
            values = values[name]
        first = values[0] if len(values) else None
        while isinstance(first, list) and len(first) == 1:
            first = first[0]
        if not isinstance(first, _PLAIN):
            raise ValueError(
                f"The column {'.'.join(path)!r} of the dataset holds values of type {type(first).__name__}, and what is"
                " wanted is one integer or string for each example."
            )
        known[path] = values[:]
    return known[path]
