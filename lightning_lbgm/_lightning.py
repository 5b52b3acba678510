"""Every name that Lightning does not document as public, each with its reason. Seen in Lightning 2.6.6."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients import LogCapture
from lightning_lbgm.data import Round

__all__ = [
    "LOG_ARGUMENTS",
    "ClientProgress",
    "batch_transfer",
    "captured_log",
    "devices_are_automatic",
    "is_compiled",
    "local_step",
    "loss_of",
    "overridden_batch_hooks",
    "overridden_step_hooks",
    "pass_rounds_through",
    "set_round_size",
]

_STEP_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_MODULE_STEP_HOOKS = ("optimizer_zero_grad", "backward", "configure_gradient_clipping")
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
LOG_ARGUMENTS = tuple(inspect.signature(pl.LightningModule.log).parameters)[3:]  # after self, name and value


def devices_are_automatic(trainer: pl.Trainer) -> bool:
    """Tell whether the user left the number of devices open: the strategy is told only what that resolved to."""
    return trainer._accelerator_connector._devices_flag in ("auto", None)


def set_round_size(trainer: pl.Trainer, num_examples: int) -> None:
    """Tell ``self.log`` the size of the batch: it could not be inferred from a round."""
    if trainer._results is not None:
        trainer._results.batch_size = num_examples


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
    return [hook for hook in _BATCH_HOOKS if any(is_overridden(hook, owner) for owner in owners)]


def overridden_step_hooks(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Return the hooks within an optimizer step that the module or a callback overrides."""
    # The parent is named because MLflow's autologging adds a callback of the twin package, pytorch_lightning.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = [hook for hook in (*_STEP_HOOKS, *_MODULE_STEP_HOOKS) if is_overridden(hook, module)]
    return hooks + [
        hook for hook in _STEP_HOOKS if any(is_overridden(hook, callback, parent=pl.Callback) for callback in callbacks)
    ]


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
    if trainer.strategy.root_device.type == "cpu" and not hooked and type(trainer.precision_plugin) is Precision:
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

    def plain_step(batch: Any, index: int) -> Tensor | None:
        # What the full step does, without the context managers, hooks and look-ups that would find nothing to do.
        if transfer is not None:
            batch = transfer(batch)

        def closure() -> Tensor | None:
            output = training_step(batch, index)
            loss = output if type(output) is Tensor else loss_of(output)
            for parameter in parameters:  # torch's zero_grad, whose profiler hook takes a tenth of a small step
                parameter.grad = None
            if loss is not None:
                loss.backward()
            if clip_value:
                module.configure_gradient_clipping(optimizer, clip_value, algorithm)
            return loss

        return optimizer.step(closure)  # type: ignore[arg-type, return-value]

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

    return full_step if hooked or type(precision) is not Precision else plain_step


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
    return loss


class ClientProgress:
    """Show in the training bar how many clients of a long round are done.

    Lightning's bars count batches, here rounds, and have no public way to say more; so the bar's description is
    extended for as long as the round lasts.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._bar = trainer.progress_bar_callback
        self._description: str | None = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar to write to."""
        bar: ProgressBar | None = self._bar
        if isinstance(bar, TQDMProgressBar):
            return bar.is_enabled and bar._train_progress_bar is not None
        if isinstance(bar, RichProgressBar):
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
        if isinstance(self._bar, TQDMProgressBar):
            return self._bar.train_progress_bar.desc.removesuffix(": ")
        assert isinstance(self._bar, RichProgressBar)
        return self._bar.train_progress_bar.description

    def _write(self, description: str) -> None:
        if isinstance(self._bar, TQDMProgressBar):
            self._bar.train_progress_bar.set_description(description)
        elif isinstance(self._bar, RichProgressBar) and self._bar.progress is not None:
            assert self._bar.train_progress_bar_id is not None
            self._bar.progress.update(self._bar.train_progress_bar_id, description=description.replace(" [", " \\["))
            self._bar.refresh()
