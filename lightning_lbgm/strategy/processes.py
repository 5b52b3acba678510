"""Processes of the strategy: the device of this one, and the others of a ``Trainer`` with several devices."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_lbgm._compat.processes import (
    gather_tensor,
    init_process_group,
    make_launcher,
    num_in_foreign_group,
    reduce_tensor,
    shard_loader,
    take_over_distributed_sampler,
)
from lightning_lbgm._compat.twin import adopt_callbacks, adopt_strategy
from lightning_lbgm.simulation.world import ProcessGroupWorld, World
from lightning_lbgm.strategy.checks import check_environment
from lightning_lbgm.strategy.cluster import (
    check_alone,
    check_local_rank,
    check_process_group,
    check_rank,
    size_of_cluster,
)

__all__ = ["ProcessesStrategy"]


class ProcessesStrategy(SingleDeviceStrategy):
    """One device in this process, and as many processes as the cluster has made or the ``Trainer`` has devices.

    If the cluster environment says that something else has made the processes (``torchrun``, SLURM, MPI, Ray Train),
    the world is the environment's, whatever the number of devices in a process. Otherwise it is the devices on all
    nodes. In a world of one it is a ``SingleDeviceStrategy``: no launcher, no process group. The base stays that class
    with several too, because ``torch.compile`` and MPS restrict others.
    """

    # Filled by the Trainer because they exist.
    parallel_devices: list[torch.device] | None = None
    cluster_environment: ClusterEnvironment | None = None
    num_nodes = 1
    _layer_sync: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.node_rank = 0
        self.world = World()
        self._shards_evaluation = False
        self._sets_threads = False

    @property
    @override
    def root_device(self) -> torch.device:
        devices = self.parallel_devices or [self._root_device]
        if len(devices) == 1:  # also of a process with a higher local rank, which sees its own device alone
            return devices[0]
        check_local_rank(self.local_rank, devices)
        return devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or [self._root_device])

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes: without it Lightning ignores ``self.log(sync_dist=True)``."""
        return self.world_size > 1

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def set_world_ranks(self) -> None:
        """Read the ranks off the cluster environment; the Trainer calls it when it is made."""
        environment = self.cluster_environment
        if environment is None or (self.num_nodes * self.num_processes == 1 and size_of_cluster(environment) == 1):
            return
        self.local_rank, self.node_rank = environment.local_rank(), environment.node_rank()
        # Environments that are told by their launcher ignore both.
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        environment.set_world_size(self.num_nodes * self.num_processes)
        self.global_rank, self.world_size = environment.global_rank(), environment.world_size()
        check_rank(environment, self.global_rank, self.world_size)
        for decorator in (rank_zero_only, utilities_rank_zero_only):
            decorator.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def _configure_launcher(self) -> None:
        adopt_strategy(self)
        environment = self.cluster_environment
        if environment is not None and self.num_nodes * self.num_processes * size_of_cluster(environment) > 1:
            # What torchrun and SLURM refuse. Lightning asks only when it launches, and for one process not at all.
            environment.validate_settings(self.num_processes, self.num_nodes)
        if self.world_size > 1:
            # Before the launcher, which sets the variable itself.
            self._sets_threads = "OMP_NUM_THREADS" not in os.environ
            self._launcher = make_launcher(self)

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        check_environment(self._layer_sync is not None)
        adopt_callbacks(self.lightning_module.trainer)
        self.set_world_ranks()  # again, for forked processes
        super().setup_environment()
        if self.world_size == 1:
            if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
                check_alone(self.cluster_environment, num_in_foreign_group())
            return
        if self._sets_threads and self.root_device.type == "cpu":
            torch.set_num_threads(1)  # threads inside small operations cost more than they give
        assert self.cluster_environment is not None
        if not self.world.is_open or self.world.size == 1:
            init_process_group(self.cluster_environment, self.root_device)
            check_process_group(self.global_rank, self.world_size)
            self.world = ProcessGroupWorld(is_ours=num_in_foreign_group() == 0)
        # Lightning shards loaders only for its own parallel strategies, so `process_dataloader` does it.
        self._shards_evaluation |= take_over_distributed_sampler(self.lightning_module.trainer)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if self.world_size > 1:
            assert self.lightning_module is not None
            self._share_module(self.lightning_module)

    @torch.no_grad()
    def _share_module(self, module: nn.Module) -> None:
        """Give every process rank 0's parameters and buffers: they may have been initialised by different seeds."""
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        # Lazy ones are initialised in each process from the same batch and seed.
        tensors = {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor)}
        values = self.world.broadcast({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.copy_(values[name])

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Give each process its share of a validation, test or prediction DataLoader."""
        if not self._shards_evaluation:
            return dataloader
        assert self.lightning_module is not None
        return shard_loader(
            self.lightning_module.trainer, dataloader, num_replicas=self.world_size, rank=self.global_rank
        )

    # What Lightning asks of the processes

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean", **kwargs: Any) -> Any:
        if self.world_size == 1 or not isinstance(tensor, Tensor):
            return tensor
        return reduce_tensor(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self.world_size == 1:
            return tensor
        return gather_tensor(tensor, group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.world_size == 1:
            return decision
        agreeing = int(self.reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum"))
        return agreeing == self.world_size if all else agreeing > 0

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._in_step() and torch.distributed.is_initialized():
            device = self.root_device
            torch.distributed.barrier(device_ids=[device.index] if device.type == "cuda" else None)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return obj
        box = [obj]
        torch.distributed.broadcast_object_list(box, src)
        return box[0]

    def _in_step(self) -> bool:
        """Whether the processes are at the same place: within a round each trains its own clients."""
        return self.world_size > 1 and self.world.is_open

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.world.close()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self.world_size > 1 and self.cluster_environment is not None:
            self.cluster_environment.teardown()
        super().teardown()
