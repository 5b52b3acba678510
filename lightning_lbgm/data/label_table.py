"""Table of labels: how many examples of each label each client has, read without loading examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset, SubsetRandomSampler

from lightning_lbgm.data.columns import class_names
from lightning_lbgm.data.feed import ClientFeed, Feed
from lightning_lbgm.data.heterogeneity import count_labels
from lightning_lbgm.data.hold_out import obstacle_to_indexing
from lightning_lbgm.data.labels import label_values
from lightning_lbgm.data.partitioners import Partitioner

__all__ = ["LabelTable", "label_table"]

_MOST_CELLS = 2**23  # of which some arrays of 64 bits are needed at a time


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The labels that clients train with.

    Attributes:
        counts: Examples of each label at each client, shape ``(K, C)``; None if the labels are not known.
        labels: The labels, sorted, shape ``(C,)``, or what they are called if the dataset has names for its classes.
        problem: Why the labels are not known, if they are not.
    """

    counts: Any = None
    labels: Any = None
    problem: str = ""


def label_table(feed: Feed, partitioner: Partitioner | str, labels: Any = None) -> LabelTable:
    """Return the labels of the clients' training examples; what is held out is not counted.

    Args:
        feed: The clients' training data.
        partitioner: What dealt it. If it was given labels, they are used.
        labels: One label for each example of the DataLoader's dataset instead.

    Raises:
        ValueError: If ``labels`` are given, and are not one class for each example.
    """
    try:
        if isinstance(feed, ClientFeed):
            known = getattr(partitioner, "labels", None) if labels is None else labels
            return _table(feed.partitions, label_values(feed.dataset, known), feed.dataset if known is None else known)
        if labels is None:
            return _table_of_loaders(getattr(feed, "loaders", []), feed.client_names or ())
    except Exception as error:  # whatever the user's dataset raises: it was not asked for its labels
        if labels is not None:
            raise
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        also = " The report takes them too: `PartitionReport(labels=...)`." if isinstance(feed, ClientFeed) else ""
        return LabelTable(problem=problem + also)
    raise ValueError(
        "`PartitionReport(labels=...)` are the labels of one dataset that is dealt to the clients, but each client has"
        " a loader of its own: leave them out."
    )


def _table(partitions: Sequence[Any], labels: Any, source: Any) -> LabelTable:
    distinct = len(np.unique(labels))
    if distinct > max(2, len(labels) // 2):
        return LabelTable(
            problem=f"The {len(labels)} examples have {distinct} different labels, so these are no classes."
        )
    if len(partitions) * distinct > _MOST_CELLS:
        return LabelTable(problem=f"{len(partitions)} clients and {distinct} labels are too many to be counted.")
    counts, found = count_labels(partitions, labels)
    return LabelTable(counts, _named(found, source))


def _named(labels: Any, source: Any) -> Any:
    """Return the names of classes that are numbered, if their dataset or column has some."""
    while isinstance(source, (Subset, ConcatDataset)):
        source = source.dataset if isinstance(source, Subset) else source.datasets[0]
    names = class_names(source)
    if names is None or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < len(names):
        return labels
    return np.array(names)[labels]


def _table_of_loaders(loaders: Sequence[Any], names: Sequence[str]) -> LabelTable:
    parts, read = [], {}
    for name, loader in zip(names, loaders):
        obstacle = obstacle_to_indexing(loader)
        if obstacle is not None:
            return LabelTable(problem=f"The examples of client {name!r} are not known: {obstacle}.")
        dataset, sampler = loader.dataset, loader.batch_sampler.sampler
        index = np.asarray(sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(len(dataset)))
        while isinstance(dataset, Subset):
            index, dataset = np.asarray(dataset.indices)[index], dataset.dataset
        if id(dataset) not in read:  # clients may have parts of one
            read[id(dataset)] = label_values(dataset)
        parts.append(read[id(dataset)][index])
    ends = np.cumsum([len(part) for part in parts])
    return _table(np.split(np.arange(ends[-1]), ends[:-1]), np.concatenate(parts), loaders[0].dataset)
