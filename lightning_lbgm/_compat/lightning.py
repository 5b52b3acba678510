"""Private names of Lightning, each with the reason why it is needed. Seen in Lightning 2.6.6."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer import call
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.overrides import is_overridden

from lightning_lbgm._compat.twin import is_a, is_exactly, namesakes
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.rounds import Round

__all__ = [
    "LOG_ARGUMENTS",
    "batch_transfer",
    "call_callback_hooks",
    "collect_train_loaders",
    "completed_batches",
    "extend_learning_rate_trial",
    "handles_unscaling",
    "has_plain_precision",
    "is_compiled",
    "is_overridden_by",
    "know_round_sizes",
    "overridden_batch_hooks",
    "overridden_step_hooks",
    "pass_rounds_through",
    "resume_within_epoch",
    "round_counters",
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
    """Whether the module or its step was compiled."""
    return module._compiler_ctx is not None or hasattr(module.training_step, "_torchdynamo_orig_callable")


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
    """Return what Lightning does to a batch before ``training_step``; None if that is nothing.

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


# Several processes, as Lightning's own DDP strategy has them.


handles_unscaling = _optimizer_handles_unscaling
call_callback_hooks = call._call_callback_hooks
