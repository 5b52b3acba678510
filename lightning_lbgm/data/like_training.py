"""Validation data for each client, dealt by the rule that the training data was dealt by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lbgm.core.rng import derive_seed
from lightning_lbgm.data.labels import as_array, as_keys, label_values
from lightning_lbgm.data.partitioners import (
    DirichletPartitioner,
    FeaturePartitioner,
    NaturalPartitioner,
    Partitioner,
    PathologicalPartitioner,
    QuantityPartitioner,
    ShardPartitioner,
)
from lightning_lbgm.data.subset import SampledSubset

__all__ = ["deal_by_labels", "deal_like_training"]


def deal_like_training(
    dataset: Dataset[Any],
    keys: Any,
    partitioner: Partitioner,
    training_set: Dataset[Any],
    partitions: Sequence[Tensor],
    seed: int,
) -> list[Tensor]:
    """Deal a validation set to the clients as the training set was dealt.

    - ``NaturalPartitioner(client_ids)``: a client gets the examples with its id; without ids, its part of a
      ``ConcatDataset``.
    - ``PathologicalPartitioner``, ``DirichletPartitioner``, ``ShardPartitioner``: of each label, a client gets the
      share that it has of the label's training examples.
    - ``QuantityPartitioner``: a client gets the share that it has of the training examples.
    - ``IIDPartitioner`` and other partitioners: they deal the validation set themselves.

    Args:
        dataset: The validation set, n examples.
        keys: The id or label of each of them, if the partitioner needs it and the dataset does not show it.
        partitioner: What dealt the training set.
        training_set: What it dealt.
        partitions: Training examples of each client.
        seed: The run's seed.

    Returns:
        One ``int64`` tensor of increasing indices for each client, which may be empty.

    Raises:
        ValueError: If ``keys`` are missing, too many, not needed, or of no client, or the partitioner's rule says
            nothing of other examples.
    """
    rng = np.random.default_rng(derive_seed(seed, "evaluation partition"))
    num_clients = len(partitions)
    if isinstance(partitioner, (PathologicalPartitioner, DirichletPartitioner, ShardPartitioner)):
        known, labels = label_values(training_set, partitioner.labels), _labels(dataset, keys)
        _check_kinds(known, labels, "label")
        return deal_by_labels(labels, known, partitions, rng)
    if isinstance(partitioner, NaturalPartitioner) and partitioner.client_ids is not None:
        return _deal_by_ids(dataset, keys, np.unique(partitioner.ids_of(training_set)))
    if keys is not None:
        raise ValueError(
            f"`ClientEvaluation(keys=...)` are the client ids or labels of the validation examples, but {partitioner!r}"
            " needs none: leave them out."
        )
    if isinstance(partitioner, FeaturePartitioner):
        raise ValueError(
            f"{partitioner!r} has dealt the training set by a feature, and the validation set of"
            " `ClientEvaluation(data=...)` would be dealt by shares drawn anew. Hold out a part of each client's"
            " training examples instead, `ClientEvaluation(split=0.2)`, or pass a dataset for each client, as"
            " `data=[dataset_0, dataset_1, ...]`."
        )
    if isinstance(partitioner, QuantityPartitioner):
        same = np.zeros(len(training_set), dtype=np.int64)  # type: ignore[arg-type]
        return deal_by_labels(np.zeros(len(dataset), dtype=np.int64), same, partitions, rng)  # type: ignore[arg-type]
    try:
        parts = partitioner.partition(dataset, num_clients, rng)
    except ValueError as error:
        raise ValueError(
            f"{partitioner!r} cannot deal the validation set of `ClientEvaluation(data=...)` to the clients as it dealt"
            f" the training set: {error} Or pass a dataset for each client, as `data=[dataset_0, dataset_1, ...]`."
        ) from error
    if len(parts) != num_clients:
        raise ValueError(
            f"{partitioner!r} made {len(parts)} parts of the validation set for {num_clients} clients. Pass a dataset"
            " for each client instead, as `ClientEvaluation(data=[dataset_0, dataset_1, ...])`."
        )
    return [torch.as_tensor(np.sort(np.asarray(part, dtype=np.int64))) for part in parts]


def deal_by_labels(labels: Any, known: Any, partitions: Sequence[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Deal examples so that of each label a client gets the share that it has of the label's training examples.

    Shares are rounded so that every example is dealt once.

    Args:
        labels: Of the examples to deal, shape ``(n,)``.
        known: Labels of the training set, shape ``(N,)``.
        partitions: Training examples of each client.
        rng: Orders the examples of a label.

    Raises:
        ValueError: If a label is none of the training set's.
    """
    classes, index = np.unique(known, return_inverse=True)
    counts = np.stack([np.bincount(index[part.numpy()], minlength=len(classes)) for part in partitions])  # (K, C)
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels).tolist():
        place = int(np.searchsorted(classes, label))
        if place == len(classes) or classes[place] != label or not counts[:, place].any():
            raise ValueError(
                f"The validation set of `ClientEvaluation(data=...)` has the label {label!r}, which no client has in"
                " training, so it is of no client: leave its examples out."
            )
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(counts[:, place]) / counts[:, place].sum()
        for client_id, part in enumerate(np.split(members, np.round(ends[:-1] * len(members)).astype(np.int64))):
            owner[part] = client_id
    return [torch.from_numpy(np.flatnonzero(owner == client_id)) for client_id in range(len(partitions))]


def _labels(dataset: Dataset[Any], keys: Any) -> Any:
    try:
        return label_values(dataset, keys)
    except ValueError as error:
        raise ValueError(
            "The labels of the validation set are needed to give each client the mix that it trains with. Pass one for"
            f" each example as `ClientEvaluation(data=..., keys=...)`. What was found: {error}"
        ) from error


def _deal_by_ids(dataset: Dataset[Any], keys: Any, known: Any) -> list[Tensor]:
    size, argument = len(dataset), "`ClientEvaluation(keys=...)`"  # type: ignore[arg-type]
    if keys is None:
        raise ValueError(
            "`NaturalPartitioner(client_ids)` deals by client ids, and those of the validation set are not known: pass"
            " one for each of its examples as `ClientEvaluation(data=..., keys=...)`."
        )
    ids = as_array(keys)
    if isinstance(dataset, SampledSubset):
        ids = dataset.select(ids, argument)
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if ids.shape != (size,):
        raise ValueError(f"{argument} has the shape {ids.shape} for {size} validation examples: give one id for each.")
    ids = as_keys(ids, argument, "id")
    _check_kinds(known, ids, "id")
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    strange = np.flatnonzero(known[places] != ids)
    if len(strange):
        raise ValueError(
            f"{argument}: {len(strange)} of {size} ids are of no client, {ids[strange].tolist()[0]!r} at position"
            f" {strange[0]} first. Leave out the examples of clients that do not train."
        )
    return [torch.from_numpy(np.flatnonzero(places == client_id)) for client_id in range(len(known))]


def _check_kinds(known: Any, given: Any, noun: str) -> None:
    """Refuse strings for numbers, and numbers for strings: they would match nothing."""
    if (known.dtype.kind in "US") != (given.dtype.kind in "US"):
        raise ValueError(
            f"The {noun}s of the validation set are of another type than those of the training set:"
            f" {given.tolist()[0]!r} and {known.tolist()[0]!r}. Use the same type for both."
        )
