"""Heterogeneity of a partition as numbers: how much the clients differ in their labels and in their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

__all__ = ["count_labels", "heterogeneity"]


def count_labels(partitions: Sequence[Any], labels: ArrayLike) -> tuple[Any, Any]:
    """Count the examples of each label at each client.

    Args:
        partitions: Indices of each client's examples, K arrays or tensors.
        labels: The label of each example, shape ``(n,)``, numbers or strings. Those that nobody has are left out.

    Returns:
        Counts of shape ``(K, C)``, ``int64``, and the C labels, sorted.

    Examples:
        >>> counts, labels = count_labels([[0, 1], [2, 3, 4]], ["cat", "dog", "dog", "dog", "cat"])
        >>> counts.tolist(), labels.tolist()
        ([[1, 1], [1, 2]], ['cat', 'dog'])
    """
    parts = [np.asarray(part, dtype=np.int64) for part in partitions]
    dealt = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    names, index = np.unique(np.asarray(labels)[dealt], return_inverse=True)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cells = np.bincount(owner * len(names) + index, minlength=len(parts) * len(names))
    return cells.reshape(len(parts), len(names)), names


def heterogeneity(sizes: ArrayLike, counts: ArrayLike | None = None) -> dict[str, float]:
    """Return how much the clients of a partition differ.

    With n_k examples of client k, n of all, its label distribution p_k and that of all clients' examples p:

    - ``clients``, ``size_min``, ``size_max``: K, the smallest and the largest n_k,
    - ``size_cv``: the coefficient of variation of the n_k, their standard deviation over their mean. 0: all the same,
    - ``labels``: C, the labels that there are,
    - ``label_distance_mean``, ``label_distance_max``: mean and maximum over the clients of the total-variation distance
      ``sum_c |p_k(c) - p(c)| / 2``, in [0, 1]. It is the share of a client's examples that would need another label for
      it to have the mix of all; Zhao et al. (arXiv 1806.00582) have twice this,
    - ``label_distance_chance``: what the mean would be on average if clients of the same sizes had drawn their examples
      at random. Small clients differ by chance alone: only what is above it is skew,
    - ``labels_effective_mean``: mean over the clients of ``exp(-sum_c p_k(c) log p_k(c))``, the effective number of
      labels (the Hill number of order 1). m if a client has m labels equally often,
    - ``labels_effective``: the same of p.

    Means over clients count each client once. Clients without examples are left out of what is about labels.

    Args:
        sizes: n_k of each client, shape ``(K,)``.
        counts: Examples of each label at each client, shape ``(K, C)``. None: not known; then there is nothing about
            labels.

    Raises:
        ValueError: If the shapes do not go together, a number is negative, or there is no example.

    Examples:
        >>> one_label_each = heterogeneity([4, 4], [[4, 0], [0, 4]])
        >>> one_label_each["label_distance_mean"], one_label_each["labels_effective_mean"]
        (0.5, 1.0)
        >>> heterogeneity([1, 3])["size_cv"]
        0.5
    """
    n = np.asarray(sizes, dtype=np.float64)
    if n.ndim != 1 or not n.size or n.min() < 0 or n.sum() == 0:
        raise ValueError(
            f"`sizes` must hold the number of examples of each client, shape (K,), with one example at least; got"
            f" {sizes!r}."
        )
    found = {
        "clients": float(n.size),
        "size_min": float(n.min()),
        "size_max": float(n.max()),
        "size_cv": float(n.std() / n.mean()),
    }
    return found if counts is None else {**found, **_of_labels(np.asarray(counts), n.size)}


def _of_labels(counts: Any, num_clients: int) -> dict[str, float]:
    if counts.ndim != 2 or len(counts) != num_clients or not counts.size or counts.min() < 0 or counts.sum() == 0:
        raise ValueError(
            f"`counts` must hold the examples of each label at each of the {num_clients} clients, shape (K, C), with"
            f" one example at least; got the shape {counts.shape}."
        )
    counts = counts[counts.sum(1) > 0].astype(np.float64)
    counts = counts[:, counts.sum(0) > 0]
    sizes, totals = counts.sum(1), counts.sum(0)
    shares, overall = counts / sizes[:, None], totals / totals.sum()
    distances = np.abs(shares - overall).sum(1) / 2
    return {
        "labels": float(len(totals)),
        "label_distance_mean": float(distances.mean()),
        "label_distance_max": float(distances.max()),
        "label_distance_chance": _distance_by_chance(sizes, totals),
        "labels_effective_mean": float(_effective(shares).mean()),
        "labels_effective": float(_effective(overall[None])[0]),
    }


def _effective(shares: Any) -> Any:
    """Return exp of the entropy of each row."""
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return np.exp(-(shares * logs).sum(1))


def _distance_by_chance(sizes: Any, totals: Any) -> float:
    """Return the expected mean distance if each client drew its examples at random, without replacement.

    A client's count X of a label is then hypergeometric: m of n examples are drawn, of which a have the label. With h
    its distribution and v the first whole number above its mean, E|X - m a / n| = 2 v (n - a - m + v) h(v) / n, because
    (x - m a / n) h(x) = g(x) - g(x + 1) with g(x) = x (n - a - m + x) h(x) / n.
    """
    n = totals.sum()
    drawn, clients = np.unique(sizes, return_counts=True)
    m, a = drawn[:, None], totals[None, :]
    v = np.floor(m * a / n) + 1
    rest = n - a - m + v  # of the other labels, those that are not drawn
    possible = (v <= np.minimum(m, a)) & (rest > 0)
    v, rest = np.where(possible, v, 0), np.where(possible, rest, 0)
    logs = _log_choose(a, v) + _log_choose(n - a, np.where(possible, m - v, 0)) - _log_choose(n, m)
    deviations = np.where(possible, 2 * v * rest * np.exp(logs) / n, 0.0)  # (sizes, C)
    return float((deviations / m / 2).sum(1) @ clients / clients.sum())


def _log_choose(n: Any, k: Any) -> Any:
    n, k = np.broadcast_arrays(n, k)
    tensors = (torch.from_numpy(np.array(value, dtype=np.float64)) for value in (n + 1, k + 1, n - k + 1))
    whole, one, other = map(torch.lgamma, tensors)
    return (whole - one - other).numpy()
