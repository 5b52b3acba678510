"""Finding the labels of a dataset without loading its examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

__all__ = ["find_labels"]


def find_labels(dataset: Any, labels: Any = None) -> Tensor:
    """Return the class of every example as an index.

    Labels are looked for on the dataset: ``targets`` or ``labels`` (torchvision's names), the last tensor of a
    ``TensorDataset``, and through ``Subset`` and ``ConcatDataset``.

    Args:
        dataset: A map-style dataset of n examples.
        labels: One label for each example, where the dataset does not show them: a tensor, array or sequence of
            integers or strings.

    Returns:
        Shape ``(n,)``, ``int64``: indices into the sorted distinct labels.

    Raises:
        ValueError: If the labels cannot be found, or are not one class for each example.

    Examples:
        >>> find_labels(TensorDataset(torch.zeros(3, 2), torch.tensor([7, 3, 7]))).tolist()
        [1, 0, 1]
    """
    found = _as_array(_search(dataset) if labels is None else labels)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if len(found) != len(dataset) or found.ndim != 1:
        raise ValueError(
            f"`labels` must hold one class for each of the {len(dataset)} examples; got the shape {found.shape}."
            " Pass `labels=...` to the partitioner with one integer or string for each example."
        )
    if found.dtype.kind == "f" and not np.array_equal(found, np.round(found)):
        raise ValueError(
            "The dataset's labels are real numbers, not classes. Pass classes as `labels=...` to the partitioner, or"
            " use `IIDPartitioner()` or `NaturalPartitioner(client_ids)`, which need no labels."
        )
    return torch.from_numpy(np.unique(found, return_inverse=True)[1].astype(np.int64))


def _search(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        return _as_array(_search(dataset.dataset))[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_as_array(_search(part)) for part in dataset.datasets])
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            return found
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[-1]
    raise ValueError(
        f"The labels of the training dataset cannot be found: {type(dataset).__name__} has no `targets` or `labels` and"
        " is no `TensorDataset` with labels. Pass them to the partitioner, such as"
        " `PathologicalPartitioner(3, labels=my_labels)`, or use `IIDPartitioner()`, which needs none."
    )


def _as_array(labels: Any) -> Any:
    if isinstance(labels, Tensor):
        return labels.detach().cpu().numpy()
    return np.asarray(labels)
