"""Every name that Lightning does not document as public, each with its reason. Seen in Lightning 2.6.6."""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
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
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _get_distributed_sampler
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.overrides import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lbgm._local_outputs import note_extra_outputs
from lightning_lbgm._twin import is_a, is_exactly, namesakes, native
from lightning_lbgm.clients import LogCapture, direct_backward, direct_step
from lightning_lbgm.data import Round, TrainLoaders

__all__ = [
    "LOG_ARGUMENTS",
    "ClientProgress",
    "batch_transfer",
    "captured_log",
    "collect_train_loaders",
    "completed_batches",
    "extend_learning_rate_trial",
    "gather_tensor",
    "handles_unscaling",
    "has_plain_precision",
    "init_process_group",
    "is_compiled",
    "is_overridden_by",
    "know_round_sizes",
    "local_step",
    "loss_of",
    "make_launcher",
    "num_in_foreign_group",
    "overridden_batch_hooks",
    "overridden_step_hooks",
    "pass_rounds_through",
    "reduce_tensor",
    "resume_within_epoch",
    "round_counters",
    "shard_loader",
    "take_over_distributed_sampler",
    "watch_optimizer_step",
]

_STEP_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_MODULE_STEP_HOOKS = ("optimizer_zero_grad", "backward", "configure_gradient_clipping")
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
LOG_ARGUMENTS = tuple(inspect.signature(pl.LightningModule.log).parameters)[3:]  # after self, name and value


def know_round_sizes(trainer: pl.Trainer) -> None:
    """Tell ``self.log`` the number of examples of a round, in any hook: it could not be inferred."""
    results: Any = trainer.fit_loop.epoch_loop._results
    if "_extract_batch_size" in vars(results):
        return
    extract = results._extract_batch_size

    def extract_batch_size(value: Any, batch_size: int | None, meta: Any) -> int:
        if batch_size is None and isinstance(results.batch, Round):
            batch_size = sum(results.batch.num_examples)
        return extract(value, batch_size, meta)

    results._extract_batch_size = extract_batch_size


def watch_optimizer_step(module: pl.LightningModule, check: Callable[[], None]) -> Callable[[], None]:
    """Call ``check`` after the module's own ``optimizer_step``, if it has one. Returns a function that undoes it."""
    if not is_overridden_by("optimizer_step", module):
        return lambda: None
    original = module.optimizer_step

    @functools.wraps(original)
    def optimizer_step(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        check()

    module.__dict__["optimizer_step"] = optimizer_step
    return lambda: module.__dict__.pop("optimizer_step", None)


def round_counters(trainer: pl.Trainer) -> list[Any]:
    """Return the objects whose attributes count what happens in a round, some of which ``global_step`` is read off."""
    loop: Any = trainer.fit_loop.epoch_loop
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    progresses = [loop.batch_progress, loop.scheduler_progress, optimizer.step, optimizer.zero_grad]
    return [*progresses, *(part for progress in progresses for part in (progress.total, progress.current))]


def resume_within_epoch(trainer: pl.Trainer) -> None:
    """Let the next ``fit`` go on within an epoch that broke off, as from a checkpoint; else it starts it over."""
    if trainer.fit_loop.epoch_loop.batch_progress.current.completed:
        trainer.fit_loop.restarting = True


def completed_batches(trainer: pl.Trainer) -> int:
    """Return the number of batches, here rounds, whose last hook is through."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def collect_train_loaders(trainer: pl.Trainer) -> Callable[[], None]:
    """Hand what the user gave as training data to the strategy's ``process_dataloader`` as one ``TrainLoaders``.

    Lightning would hand over the members of a collection one by one, to combine a batch of each to one batch; and it
    calls ``process_dataloader`` for validation loaders in the training stage too. What is patched is where it asks for
    the loaders: a module, a datamodule or the argument of ``fit``. Returns a function that undoes it.
    """
    source = trainer.fit_loop._data_source

    def dataloader() -> TrainLoaders:
        loaders = type(source).dataloader(source)
        if is_a(loaders, CombinedLoader):
            return TrainLoaders(loaders.iterables, loaders._mode)
        return TrainLoaders(loaders)

    source.__dict__["dataloader"] = dataloader
    return lambda: source.__dict__.pop("dataloader", None)


def extend_learning_rate_trial(trainer: pl.Trainer) -> Callable[[], None] | None:
    """Let a learning rate finder's trial have all its rounds, which ``max_epochs`` is often too short for here.

    Returns a function that undoes it, or None if there is no trial.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    loop = trainer.fit_loop
    if not callbacks or not is_a(callbacks[0], _LRCallback) or loop.max_epochs is None or loop.max_epochs < 0:
        return None
    before = loop.max_epochs
    loop.max_epochs = max(before, trainer.current_epoch + callbacks[0].num_training)
    return lambda: setattr(loop, "max_epochs", before)


def pass_rounds_through(module: pl.LightningModule) -> Callable[[], None]:
    """Keep a round from the module's ``on_before_batch_transfer``, which Lightning calls before the strategy's turn.

    The hook sees the local batches instead. Returns a function that undoes it.
    """
    original = module._on_before_batch_transfer

    def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, Round) else original(batch, dataloader_idx)

    module.__dict__["_on_before_batch_transfer"] = on_before_batch_transfer
    return lambda: module.__dict__.pop("_on_before_batch_transfer", None)


def is_compiled(module: pl.LightningModule) -> bool:
    """Tell whether the module or its step was compiled."""
    return module._compiler_ctx is not None or hasattr(module.training_step, "_torchdynamo_orig_callable")


@contextmanager
def captured_log(module: pl.LightningModule, capture: LogCapture) -> Iterator[None]:
    """Send the module's ``self.log`` and ``self.log_dict`` to ``capture``."""
    # A compiled step breaks its graph here. Elsewhere the wrapper would cost more than the recording.
    module.__dict__["log"] = torch.compiler.disable(capture.record) if is_compiled(module) else capture.record
    try:
        yield
    finally:
        module.__dict__.pop("log", None)


def overridden_batch_hooks(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Return the hooks around a batch's transfer that the module or the datamodule overrides."""
    owners = [owner for owner in (module, trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
    return [hook for hook in _BATCH_HOOKS if any(is_overridden_by(hook, owner) for owner in owners)]


def overridden_step_hooks(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Return the hooks within an optimizer step that the module or a callback overrides."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = [hook for hook in (*_STEP_HOOKS, *_MODULE_STEP_HOOKS) if is_overridden_by(hook, module)]
    return hooks + [hook for hook in _STEP_HOOKS if any(is_overridden_by(hook, callback) for callback in callbacks)]


def is_overridden_by(hook: str, owner: object) -> bool:
    """Whether a module, datamodule or callback of either package has a hook of its own."""
    bases = (pl.LightningModule, pl.LightningDataModule, pl.Callback)
    parents = [cls for base in bases for cls in namesakes(base) if isinstance(owner, cls)]
    return all(is_overridden(hook, owner, parent) for parent in parents or [pl.Callback])


def has_plain_precision(trainer: pl.Trainer) -> bool:
    """Whether the precision plugin has nothing to do."""
    return is_exactly(trainer.precision_plugin, Precision)


def batch_transfer(
    trainer: pl.Trainer, module: pl.LightningModule, to_device: Callable[[Any], Any]
) -> Callable[[Any], Any] | None:
    """Return what Lightning does to a batch before ``training_step``; None where that is nothing.

    Args:
        trainer: The trainer.
        module: The module.
        to_device: The strategy's own ``batch_to_device``, which calls the other two batch hooks.
    """
    hooked = overridden_batch_hooks(trainer, module)
    if trainer.strategy.root_device.type == "cpu" and not hooked and has_plain_precision(trainer):
        return None

    def transfer(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        return to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))

    return transfer


def local_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    optimizer: Optimizer,
    takes_index: bool,
    transfer: Callable[[Any], Any] | None,
    backward: Callable[[Tensor, Optimizer], Tensor],
) -> Callable[[Any, int], Tensor | None]:
    """Return a function that makes one local optimizer step as Lightning's automatic optimization would, for a round.

    Args:
        trainer: The trainer.
        module: The module.
        optimizer: The client optimizer.
        takes_index: Whether ``training_step`` takes a ``batch_idx``; it gets the index of the local step.
        transfer: Applied to each batch, where given.
        backward: The strategy's own backward, with the precision plugin's scaling and the hooks around it.
    """
    precision = trainer.precision_plugin
    hooked = bool(overridden_step_hooks(trainer, module))
    training_step = module.training_step if takes_index else lambda batch, index: module.training_step(batch)
    clip_value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hooked |= type(optimizer).zero_grad is not Optimizer.zero_grad

    step_directly = direct_step(optimizer)
    stepped = False

    def plain_step(batch: Any, index: int) -> Tensor | None:
        # What the full step does, without the context managers, hooks and look-ups that would find nothing to do.
        nonlocal stepped
        if transfer is not None:
            batch = transfer(batch)

        def closure() -> Tensor | None:
            output = training_step(batch, index)
            loss = output if type(output) is Tensor else loss_of(output)
            for parameter in parameters:  # torch's zero_grad, whose profiler hook takes a tenth of a small step
                parameter.grad = None
            if loss is not None:
                direct_backward(loss)
            if clip_value:
                module.configure_gradient_clipping(optimizer, clip_value, algorithm)
            return loss

        if step_directly is None or not stepped:  # a learning rate schedule looks for one call of `step`
            stepped = True
            return optimizer.step(closure)  # type: ignore[arg-type, return-value]
        loss = closure()
        step_directly()
        return loss

    def full_step(batch: Any, index: int) -> Tensor | None:
        if transfer is not None:
            batch = transfer(batch)
        losses: list[Tensor | None] = []

        def closure() -> Tensor | None:
            with precision.train_step_context():
                loss = loss_of(training_step(batch, index))
            losses.append(loss)
            call._call_callback_hooks(trainer, "on_before_zero_grad", optimizer)
            module.on_before_zero_grad(optimizer)
            module.optimizer_zero_grad(trainer.current_epoch, index, optimizer)
            if loss is not None:
                backward(loss, optimizer)
            return loss

        precision.optimizer_step(optimizer, model=module, closure=closure)
        return losses[0]

    return plain_step if not hooked and has_plain_precision(trainer) else full_step


def loss_of(output: Any) -> Tensor | None:
    """Read the loss off what ``training_step`` returned, by Lightning's rules for automatic optimization."""
    if isinstance(output, Tensor) or output is None:
        return output
    loss = output.get("loss") if isinstance(output, dict) else None
    if loss is None:
        raise MisconfigurationException(
            "`training_step` must return a tensor, a dict with the key 'loss', or None to skip the step; it returned"
            f" {type(output).__name__}."
        )
    note_extra_outputs(output)
    return loss


# Several processes, as Lightning's own DDP strategy has them.

reduce_tensor = _sync_ddp_if_available
gather_tensor = _all_gather_ddp_if_available


def make_launcher(strategy: Any) -> Any:
    """Return what starts the other processes of this node, where the cluster does not, and runs the trainer in each.

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


handles_unscaling = _optimizer_handles_unscaling


class ClientProgress:
    """Show in the training bar how many clients of a long round are done.

    Lightning's bars count batches, here rounds, and have no public way to say more; so the bar's description is
    extended for as long as the round lasts.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._bar: Any = trainer.progress_bar_callback
        self._description: str | None = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar to write to."""
        bar = self._bar
        if is_a(bar, TQDMProgressBar):
            return bar.is_enabled and bar._train_progress_bar is not None
        if is_a(bar, RichProgressBar):
            return bar.is_enabled and bar.progress is not None and bar.train_progress_bar_id is not None
        return False

    def show(self, done: int, total: int) -> None:
        """Write ``done/total clients`` behind the bar's own description."""
        if self._description is None:
            self._description = self._read()
        self._write(f"{self._description} [{done}/{total} clients]")

    def restore(self) -> None:
        """Write the bar's own description again."""
        if self._description is not None:
            self._write(self._description)
            self._description = None

    def _read(self) -> str:
        if is_a(self._bar, TQDMProgressBar):
            return str(self._bar.train_progress_bar.desc).removesuffix(": ")
        return str(self._bar.train_progress_bar.description)

    def _write(self, description: str) -> None:
        if is_a(self._bar, TQDMProgressBar):
            self._bar.train_progress_bar.set_description(description)
        elif is_a(self._bar, RichProgressBar) and self._bar.progress is not None:
            self._bar.progress.update(self._bar.train_progress_bar_id, description=description.replace(" [", " \\["))
            self._bar.refresh()
