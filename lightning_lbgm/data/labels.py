"""Labels of a dataset, found without loading its examples; checks of labels and client ids."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_lbgm.data.columns import column_names, is_column, label_column, read_column
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["as_array", "as_keys", "find_labels", "label_values"]


def find_labels(dataset: Any, labels: Any = None) -> Tensor:
    """Return the class of every example as an index.

    Labels are looked for on the dataset: ``targets`` or ``labels`` (torchvision's names), the last tensor of a
    ``TensorDataset``, the column ``label`` or ``labels`` of a Hugging Face dataset, and through ``Subset`` and
    ``ConcatDataset``.

    Args:
        dataset: A map-style dataset of n examples.
        labels: One label for each example, if the dataset does not show them: a tensor, array, pandas Series, column
            of a Hugging Face dataset or sequence of integers or strings. If a sampler picks a part of the dataset, they
            are of the whole dataset.

    Returns:
        Shape ``(n,)``, ``int64``: indices into the sorted distinct labels.

    Raises:
        ValueError: If the labels cannot be found, are not one class for each example, or some are missing or of
            another type than the rest.

    Examples:
        >>> find_labels(TensorDataset(torch.zeros(3, 2), torch.tensor([7, 3, 7]))).tolist()
        [1, 0, 1]
    """
    return torch.from_numpy(np.unique(label_values(dataset, labels), return_inverse=True)[1].astype(np.int64))


def label_values(dataset: Any, labels: Any = None) -> Any:
    """Return the class of every example as the dataset has it: an array of shape ``(n,)``.

    Arguments and errors are those of ``find_labels``.
    """
    given = labels is not None
    argument = "`labels`" if given else "The training dataset's labels"
    found = as_array(labels if given else _search(dataset))
    if given and isinstance(dataset, SampledSubset):
        found = dataset.select(found, argument)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or len(found) != len(dataset):
        raise ValueError(
            f"`labels` must hold one class for each of the {len(dataset)} examples; got the shape {found.shape}."
            " Pass `labels=...` to the partitioner with one integer or string for each example."
        )
    found = as_keys(found, argument, "label", dataset.positions if isinstance(dataset, SampledSubset) else None)
    if found.dtype.kind == "f" and not np.array_equal(found, np.round(found)):
        raise ValueError(
            "The dataset's labels are real numbers, not classes. Pass classes as `labels=...` to the partitioner, or"
            " use `IIDPartitioner()` or `NaturalPartitioner(client_ids)`, which need no labels."
        )
    return found


def as_keys(values: Any, argument: str, noun: str, positions: Tensor | None = None) -> Any:
    """Return labels or ids as an array that can be sorted.

    Args:
        values: A tensor, array, pandas Series or sequence, with one entry for each example.
        argument: What they are, for errors.
        noun: What one of them is, for errors.
        positions: Where each stood among what the user gave, for errors; None: where it stands.

    Raises:
        ValueError: If some are missing (None or NaN), of different types, or of types that cannot be sorted.
    """
    array = as_array(values)
    missing = _missing(array)
    if missing.any():
        places = np.argwhere(missing)
        raise ValueError(
            f"{argument}: {len(places)} of {len(array)} are missing (None or NaN), the first at position"
            f" {_position(places[0][0], positions)}. Give each example its {noun}, or leave these examples out of the"
            " training set, for instance with `SubsetRandomSampler(indices)` as the DataLoader's sampler."
        )
    if array.dtype.kind != "O":
        return array
    kinds = [_kind(value) for value in array.flat]
    other = next((place for place, kind in enumerate(kinds) if kind is not kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"{argument}: they are of different types, {array.flat[0]!r} at position {_position(0, positions)} of type"
            f" {type(array.flat[0]).__name__} and {array.flat[other]!r} at position {_position(other, positions)} of"
            f" type {type(array.flat[other]).__name__}. Use one type, such as `str({noun})` for each."
        )
    plain = np.asarray(array.tolist()) if kinds and kinds[0] in (numbers.Number, str, bytes) else array
    if plain.dtype.kind == "O":
        try:
            np.unique(plain)
        except TypeError as error:
            raise ValueError(
                f"{argument}: they are of type {type(array.flat[0]).__name__}, which cannot be sorted. Use integers or"
                " strings."
            ) from error
    return plain


def _search(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        return as_array(_search(dataset.dataset))[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [as_array(_search(part)) for part in dataset.datasets]
        if any(part.dtype.kind not in "biuf" for part in parts):
            parts = [part.astype(object) for part in parts]  # NumPy would make strings of numbers
        return np.concatenate(parts)
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            return found
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[-1]
    if column_names(dataset) is not None:
        return label_column(dataset)
    raise ValueError(
        f"The labels of the training dataset cannot be found: {type(dataset).__name__} has no `targets` or `labels` and"
        " is no `TensorDataset` with labels. Pass them to the partitioner, such as"
        " `PathologicalPartitioner(3, labels=my_labels)`, or use `IIDPartitioner()`, which needs none."
    )


def as_array(labels: Any) -> Any:
    """Return an array; what is no array yet keeps its Python objects, so that NumPy turns None or 1 into no string."""
    if is_column(labels):
        labels = read_column(labels)
    if isinstance(labels, Tensor):
        values = labels.detach().cpu()
        return (values.float() if values.dtype is torch.bfloat16 else values).numpy()
    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        array = labels.data.astype(object)
        array[np.ma.getmaskarray(labels)] = None
        return array
    if isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)) and not hasattr(labels, "__array__"):
        labels = list(labels)
    if not isinstance(labels, list):
        return np.asarray(labels)
    types = set(map(type, labels))
    if types <= {int, bool} or types <= {str}:
        return np.asarray(labels)
    if any(issubclass(kind, (Tensor, np.ndarray)) for kind in types):
        labels = [value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value for value in labels]
    try:
        return np.asarray(labels, dtype=object)
    except ValueError:  # rows of different lengths
        array = np.empty(len(labels), dtype=object)
        array[:] = labels
        return array


def _position(place: int, positions: Tensor | None) -> int:
    return int(place) if positions is None else int(positions[place])


def _missing(array: Any) -> Any:
    """Return where an array has no value."""
    if array.dtype.kind in "fc":
        return np.isnan(array)
    if array.dtype.kind in "mM":
        return np.isnat(array)
    if array.dtype.kind != "O":
        return np.zeros(array.shape, dtype=bool)
    return np.asarray([_is_missing(value) for value in array.flat], dtype=bool).reshape(array.shape)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas'
        return True
    return isinstance(value, (float, np.floating, np.datetime64, np.timedelta64)) and bool(value != value)


def _kind(value: Any) -> type:
    """Return the type, numbers of any type as one."""
    for kind in (numbers.Number, str, bytes):
        if isinstance(value, kind) or (kind is numbers.Number and isinstance(value, np.bool_)):
            return kind
    return type(value)
