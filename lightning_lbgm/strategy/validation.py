"""Validation of one client: the module's own ``validation_step`` on its examples, with ``self.log`` captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_lbgm._compat.lightning import LOG_ARGUMENTS
from lightning_lbgm.clients.log import LogEntry
from lightning_lbgm.data.feed import LocalBatch
from lightning_lbgm.strategy.log_capture import LogCapture, captured_log

__all__ = ["validate"]


def validate(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: Iterable[LocalBatch],
    transfer: Callable[[Any], Any] | None,
) -> tuple[int, dict[str, float]]:
    """Run a module's validation as Lightning does within a fit: in eval mode, without gradients.

    Called are the module's own hooks, not those of callbacks. Its metrics must be reset already.

    Args:
        trainer: The trainer.
        module: The module, as it is.
        batches: The examples.
        transfer: Applied to each batch, if given.

    Returns:
        The number of examples, and what was logged, by name: numbers averaged by batch size (or reduced as
        ``reduce_fx`` says), a ``torchmetrics.Metric`` computed over the examples.

    Raises:
        ValueError: If something was logged that is no number.
    """
    extra = _arguments_after_batch(module)
    capture = LogCapture(LOG_ARGUMENTS)
    num_examples = 0
    trainer.validating = True
    with captured_log(module, capture), torch.no_grad():  # what Lightning has in a fit, whatever its `inference_mode`
        module.on_validation_model_eval()
        module.on_validation_epoch_start()
        for index, (data, size) in enumerate(batches):
            capture.batch_size = size
            num_examples += size
            batch = data if transfer is None else transfer(data)
            module.on_validation_batch_start(batch, index)
            output: Any = trainer.strategy.validation_step(batch, *extra(index))
            module.on_validation_batch_end(output, batch, index)
        capture.batch_size = 1
        module.on_validation_epoch_end()
        return num_examples, {name: _number(name, entry) for name, entry in capture.take().items()}


def _arguments_after_batch(module: pl.LightningModule) -> Callable[[int], tuple[int, ...]]:
    """Return what gives the arguments of ``validation_step`` after the batch, for a batch's index."""
    step = module.validation_step
    if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return lambda index: ()
    loader = inspect.signature(step).parameters.get("dataloader_idx")
    if loader is not None and loader.default is inspect.Parameter.empty:
        return lambda index: (index, 0)
    return lambda index: (index,)


def _number(name: str, entry: LogEntry) -> float:
    value = entry.last.compute() if isinstance(entry.last, Metric) else entry.reduced()
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    raise ValueError(
        f"`self.log({name!r}, ...)` in the validation of a client got {value if value is not None else entry.last!r},"
        " which is no single number. Log numbers, tensors with one element or metrics whose value is one."
    )
