"""Checks of the federation's settings that need neither data nor a Trainer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_lbgm.data import Partitioner

__all__ = ["check_settings"]


def check_settings(
    *,
    num_clients: Any,
    partitioner: Any,
    local_epochs: Any,
    local_steps: Any,
    server_optimizer: Any,
    weighting: Any,
    buffers: Any,
    rounds_per_epoch: Any,
    seed: Any,
    execution: Any,
    vectorized_chunk: Any,
) -> None:
    """Check the arguments of ``LBGMFederated`` that do not check themselves.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range, or both ``local_epochs`` and ``local_steps`` are given.
    """
    if num_clients is not None:
        _check_positive("num_clients", num_clients)
    elif partitioner is not None:
        raise ValueError(
            f"`num_clients=None` takes each training loader as one client, so that nothing is dealt, but"
            f" `partitioner={partitioner!r}` deals the examples of one loader. Pass one of them: `num_clients=...` with"
            " the partitioner, or no partitioner."
        )
    _check_positive("rounds_per_epoch", rounds_per_epoch)
    for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
        if value is not None:
            _check_positive(name, value)
    if local_epochs is not None and local_steps is not None:
        raise ValueError(
            f"`local_epochs={local_epochs}` and `local_steps={local_steps}` both say how long a client trains in a"
            " round: pass one of them."
        )
    if partitioner is not None and not isinstance(partitioner, Partitioner):
        raise TypeError(
            f"`partitioner` must be a `Partitioner` such as `PathologicalPartitioner(3)`; got {partitioner!r}."
        )
    if server_optimizer is not None and (isinstance(server_optimizer, Optimizer) or not callable(server_optimizer)):
        raise TypeError(
            "`server_optimizer` must be a callable that takes parameters and returns a `torch.optim.Optimizer`,"
            f" such as `lambda params: torch.optim.Adam(params, lr=0.01)`; got {server_optimizer!r}."
        )
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"`weighting` must be 'examples' or 'uniform'; got {weighting!r}.")
    if buffers not in ("average", "server", "client"):
        raise ValueError(f"`buffers` must be 'average', 'server' or 'client'; got {buffers!r}.")
    if execution not in ("sequential", "vectorized", "auto"):
        raise ValueError(f"`execution` must be 'sequential', 'vectorized' or 'auto'; got {execution!r}.")
    if vectorized_chunk is not None:
        _check_positive("vectorized_chunk", vectorized_chunk)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"`seed` must be an int or None; got {seed!r}.")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
