"""Launchers, process groups and sharded loaders, as in Lightning's own DDP strategy."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.data import has_iterable_dataset
from lightning.fabric.utilities.distributed import (
    _all_gather_ddp_if_available,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _set_num_threads_if_needed,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.data_connector import _get_distributed_sampler
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lbgm._compat.twin import is_a, native

__all__ = [
    "gather_tensor",
    "init_process_group",
    "make_launcher",
    "num_in_foreign_group",
    "reduce_tensor",
    "shard_loader",
    "take_over_distributed_sampler",
]


reduce_tensor = _sync_ddp_if_available


gather_tensor = _all_gather_ddp_if_available


def make_launcher(strategy: Any) -> Any:
    """Return what starts the other processes of this node, if the cluster does not, and runs the trainer in each.

    A script is started again; a notebook, which cannot be, is forked.
    """
    environment = strategy.cluster_environment
    if _IS_INTERACTIVE and not environment.creates_processes_externally:
        return native(strategy, _MultiProcessingLauncher)(strategy, start_method="fork")
    launcher = _patient(native(strategy, _SubprocessScriptLauncher))
    return launcher(environment, strategy.num_processes, strategy.num_nodes)


@functools.cache
def _patient(base: Any) -> Any:
    """Return Lightning's launcher, but that rank 0 has time to end by itself when another process has failed.

    Lightning looks for failed processes every five seconds and then kills this one. Here it has noticed the broken
    connection and is saving what is left, which takes longer than that on a busy machine.
    """

    class PatientLauncher(base):
        def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
            """Start the other processes, then call the function."""
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            if not self.cluster_environment.creates_processes_externally:
                self._call_children_scripts()
                _PatientObserver(child_processes=self.procs, main_pid=os.getpid()).start()
            _set_num_threads_if_needed(num_processes=self.num_processes)
            return function(*args, **kwargs)

    return PatientLauncher


class _PatientObserver(_ChildProcessObserver):
    """Ends all processes a minute after one has failed, for those that hang."""

    def _terminate_all(self) -> None:
        time.sleep(60)  # the thread ends with its process
        super()._terminate_all()


_own_group: int | None = None  # its `id`: a reference would keep the connection open when the group is destroyed


def init_process_group(environment: ClusterEnvironment, device: torch.device) -> None:
    """Connect the processes, unless they are connected already."""
    global _own_group
    if torch.distributed.is_initialized():
        return
    _init_dist_connection(
        environment,
        _get_default_process_group_backend_for_device(device),
        timeout=default_pg_timeout,
        device_id=None if device.type == "cpu" else device,
    )
    _own_group = id(torch.distributed.group.WORLD)


def num_in_foreign_group() -> int:
    """Return the size of torch's process group if `init_process_group` has not made it; 0 if there is none such."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0
    return 0 if id(torch.distributed.group.WORLD) == _own_group else torch.distributed.get_world_size()


def take_over_distributed_sampler(trainer: pl.Trainer) -> bool:
    """Return ``Trainer(use_distributed_sampler=...)`` and switch it off: Lightning refuses it to this strategy."""
    connector = trainer._accelerator_connector
    wanted, connector.use_distributed_sampler = connector.use_distributed_sampler, False
    return wanted


def shard_loader(trainer: pl.Trainer, loader: object, num_replicas: int, rank: int) -> object:
    """Return a loader of this process's share of an evaluation DataLoader, as Lightning would shard it."""
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.sampler, DistributedSampler)
        or has_iterable_dataset(loader)
    ):
        return loader
    mode = RunningStage.PREDICTING if trainer.predicting else RunningStage.VALIDATING
    sampler = _get_distributed_sampler(
        loader,
        shuffle=False,
        overfit_batches=trainer.overfit_batches,  # type: ignore[attr-defined]
        mode=mode,
        num_replicas=num_replicas,
        rank=rank,
    )
    if is_a(loader.batch_sampler, _IndexBatchSamplerWrapper):
        # For predictions Lightning has made a loader of its own already, which cannot be made over again.
        loader.batch_sampler._batch_sampler.sampler = sampler  # type: ignore[union-attr]
        return loader
    return native(trainer, _update_dataloader)(loader, sampler, mode=mode)
