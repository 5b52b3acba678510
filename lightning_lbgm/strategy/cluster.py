"""Cluster environment: the world that it defines, and errors for settings that do not fit it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lbgm._compat.twin import is_a

__all__ = ["check_alone", "check_local_rank", "check_process_group", "check_rank", "size_of_cluster"]

_UNSET = (KeyError, ValueError)  # what environments raise outside their cluster, if its variables are not set


def size_of_cluster(environment: ClusterEnvironment) -> int:
    """Return how many processes something else than Lightning has made; 1 if none.

    Lightning's default environment says 1 until the Trainer has told it the number, also if the user has started the
    processes: then devices times nodes count.
    """
    if not environment.creates_processes_externally or _is_slurm_shell(environment):
        return 1
    try:
        return environment.world_size()
    except _UNSET:  # for instance `plugins=[SLURMEnvironment(auto_requeue=False)]` on a laptop
        return 1


def _is_slurm_shell(environment: ClusterEnvironment) -> bool:
    """Whether the script was started by hand in an interactive SLURM job, whose number of tasks says nothing."""
    return is_a(environment, SLURMEnvironment) and not environment.detect()


def check_rank(environment: ClusterEnvironment, rank: int, size: int) -> None:
    """Refuse a rank outside the world."""
    if not 0 <= rank < size:
        raise MisconfigurationException(
            f"{type(environment).__name__} gives this process the rank {rank} in a world of {size}. Set"
            " `Trainer(devices=..., num_nodes=...)` to the processes on a node and the number of nodes, or pass the"
            " `ClusterEnvironment` of what has started them: `Trainer(plugins=[...])`."
        )


def check_local_rank(local_rank: int, devices: Sequence[torch.device]) -> None:
    """Refuse a process that would have no device."""
    if local_rank >= len(devices):
        raise MisconfigurationException(
            f"The process with local rank {local_rank} has no device: `Trainer(devices=...)` gives its node"
            f" {len(devices)}. Use as many devices as there are processes on a node, or 1 if each process sees its own."
        )


def check_process_group(rank: int, size: int) -> None:
    """Refuse a process group that somebody has made for another world."""
    group = dist.get_rank(), dist.get_world_size()
    if group != (rank, size):
        raise MisconfigurationException(
            f"The Trainer has rank {rank} in a world of {size}, but torch's process group, which was there before, has"
            f" rank {group[0]} in a world of {group[1]}. Pass the `ClusterEnvironment` of what has made it:"
            " `Trainer(plugins=[...])`."
        )


def check_alone(environment: ClusterEnvironment | None, num_in_group: int) -> None:
    """Refuse to fit a federation of one process's own in one of several that were started together.

    Args:
        environment: The Trainer's environment.
        num_in_group: Processes in a process group that somebody else has made; 0 if there is none.
    """
    remedy = (
        "Each of the processes would train the whole federation and write the same files. Set"
        " `Trainer(devices=..., num_nodes=...)` to the processes on a node and the number of nodes, or pass the"
        " `ClusterEnvironment` of what has started them (in Ray Train `Trainer(plugins=[RayLightningEnvironment()])`)."
    )
    if num_in_group > 1:
        raise MisconfigurationException(
            f"The Trainer's world is this process alone, but torch's process group has {num_in_group}. {remedy}"
        )
    if environment is None or not environment.creates_processes_externally or _is_slurm_shell(environment):
        return
    try:
        rank = max(environment.local_rank(), environment.node_rank())
    except _UNSET:
        return
    if rank > 0:
        raise MisconfigurationException(
            f"The Trainer's world is this process alone, but {type(environment).__name__} says that it is number"
            f" {rank} of several. {remedy}"
        )
