"""Whether clients are trained one after the other or in chunks, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from lightning_lbgm import _lightning
from lightning_lbgm.clients import (
    ELEMENTWISE_OPTIMIZERS,
    ChunkStep,
    ChunkTrainer,
    ClientTrainer,
    LocalTrainer,
    SequentialTrainer,
    VectorizedTrainer,
)
from lightning_lbgm.federation import Federation
from lightning_lbgm.flat import FlatParameters

__all__ = ["Execution", "ExecutionMode"]

ExecutionMode = Literal["sequential", "vectorized", "auto"]

_CPU_CHUNK = 20
_CPU_MAX_PARAMETERS = 1_000_000
_ACCELERATOR_BYTES = 4 * 2**30
_ACCELERATOR_MAX_CHUNK = 256
_COPIES = 4  # of the parameters that a client needs: themselves, the gradient, two of an optimizer such as Adam
_SLOW_ON_CPU = (_ConvNd, nn.RNNBase, nn.MultiheadAttention)


class Execution:
    """Choose what trains a round's clients.

    What is allocated for it is kept from round to round, as long as the federation is the same.

    Args:
        mode: ``"sequential"``, ``"vectorized"`` or ``"auto"``.
        chunk_size: Most clients in a chunk. None: by the device.
    """

    def __init__(self, mode: ExecutionMode, chunk_size: int | None = None) -> None:
        self.mode = mode
        self.chunk_size = chunk_size
        self._chunks: ChunkTrainer | None = None
        self._flat: FlatParameters | None = None  # what all below belongs to
        self._update = torch.empty(0)  # of one client at a time, whichever way it is trained
        self._obstacle: str | None = None  # found by trying

    def client_trainer(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        federation: Federation,
        local_trainer: LocalTrainer,
        takes_index: bool,
        transfer: Callable[[Any], Any] | None,
    ) -> ClientTrainer:
        """Return what trains the clients of the round at hand.

        Args:
            trainer: The trainer.
            module: The module.
            federation: The federation.
            local_trainer: Makes local steps one after the other, with the round's optimizer.
            takes_index: Whether ``training_step`` takes a ``batch_idx``.
            transfer: Applied to each batch, where given.

        Raises:
            MisconfigurationException: If ``mode="vectorized"`` is not possible.
        """
        flat, optimizer = federation.flat, local_trainer.optimizer
        if self._flat is not flat:
            self._flat, self._update, self._chunks, self._obstacle = flat, flat.empty(), None, None
        sequential = SequentialTrainer(local_trainer, flat, federation.buffers, self._update)
        if self.mode == "sequential" or self._obstacle is not None:
            return sequential
        if self.mode == "auto" and not _pays(module, flat):
            return sequential
        obstacle = find_obstacle(trainer, module, optimizer, flat)
        if obstacle is not None:
            self._give_up(obstacle)
            return sequential
        if self._chunks is None:
            self._chunks = ChunkTrainer(module, flat, federation.buffers, self._update)
        # A learning rate schedule wants to see its optimizer step, and this one would not; it has no gradients.
        optimizer.zero_grad()
        optimizer.step()

        def loss(batch: Any, index: int) -> Tensor | None:
            output = module.training_step(batch, index) if takes_index else module.training_step(batch)
            return _lightning.loss_of(output)

        step = ChunkStep(
            loss,
            optimizer,
            transfer,
            trainer.gradient_clip_val,
            "value" if trainer.gradient_clip_algorithm == "value" else "norm",
        )
        chunk_size = self.chunk_size or _default_chunk_size(flat)
        return VectorizedTrainer(sequential, self._chunks, step, chunk_size, self._on_error)

    def _on_error(self, error: Exception) -> None:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        self._give_up(reason, error)

    def _give_up(self, reason: str, cause: Exception | None = None) -> None:
        if self.mode == "vectorized":
            raise MisconfigurationException(
                f"`LBGMFederated(execution='vectorized')` is not possible: {reason}. Use `execution='auto'`, which"
                " falls back where it must, or `execution='sequential'`."
            ) from cause
        self._obstacle = reason
        rank_zero_info(f"Clients are trained one after the other, not vectorized: {reason}.")


def find_obstacle(
    trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, flat: FlatParameters
) -> str | None:
    """Return why clients cannot be vectorised, as far as that is known without trying; None where nothing is known."""
    if flat.device.type not in ("cpu", "cuda"):
        return f"the device {flat.device.type!r} is neither a CPU nor a CUDA GPU"
    if not _lightning.has_plain_precision(trainer):
        return f"precision {trainer.precision!r} needs a {type(trainer.precision_plugin).__name__} plugin"
    if _lightning.is_compiled(module):
        return "the module is compiled"
    hooks = _lightning.overridden_step_hooks(trainer, module) + _lightning.overridden_batch_hooks(trainer, module)
    if hooks:
        return f"the hook `{hooks[0]}` is overridden by the module or a callback and wants to see each local step"
    if type(optimizer) not in ELEMENTWISE_OPTIMIZERS:
        names = ", ".join(cls.__name__ for cls in ELEMENTWISE_OPTIMIZERS)
        return f"the optimizer {type(optimizer).__name__} is none of torch's elementwise ones ({names})"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has step hooks"
    known = {id(parameter) for parameter in flat.parameters}
    if any(p.requires_grad and id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        return "the optimizer has parameters that are not the module's"
    return None


def _pays(module: nn.Module, flat: FlatParameters) -> bool:
    """Tell whether vectorised clients are likely to be faster.

    On a CPU they save the overhead of small operations. Where the operations themselves take the time, they save
    nothing, and grouped convolutions, which convolutions become, are slower than plain ones. Dropout draws other
    numbers in chunks; there the gain is not worth results that change with what a process trains.
    """
    if flat.device.type != "cpu":
        return True
    refused = (*_SLOW_ON_CPU, _DropoutNd)
    return flat.num_parameters < _CPU_MAX_PARAMETERS and not any(isinstance(m, refused) for m in module.modules())


def _default_chunk_size(flat: FlatParameters) -> int:
    if flat.device.type == "cpu":
        return _CPU_CHUNK
    itemsize = torch.empty((), dtype=flat.dtype).element_size()
    fitting = _ACCELERATOR_BYTES // (_COPIES * flat.num_parameters * itemsize)
    return max(1, min(_ACCELERATOR_MAX_CHUNK, fitting))
