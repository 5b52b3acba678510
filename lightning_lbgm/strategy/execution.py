"""Execution mode: whether clients are trained one after the other or vectorised in chunks, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from lightning_lbgm._compat.lightning import (
    has_plain_precision,
    is_compiled,
    overridden_batch_hooks,
    overridden_step_hooks,
)
from lightning_lbgm.clients.base import ClientTrainer
from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.clients.sequential import SequentialTrainer
from lightning_lbgm.clients.vectorized import VectorizedTrainer, Wary
from lightning_lbgm.clients.vmap.chunk import ELEMENTWISE_OPTIMIZERS, ChunkTrainer
from lightning_lbgm.clients.vmap.chunk_parts import ChunkStep
from lightning_lbgm.clients.vmap.guards import CannotVectorize, has_backward_hooks
from lightning_lbgm.clients.vmap.proof import ComesOutDifferent
from lightning_lbgm.clients.vmap.structure import structure_of
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.local_step import loss_of

__all__ = ["Execution", "ExecutionMode"]

ExecutionMode = Literal["sequential", "vectorized", "auto"]

_CPU_CHUNK = 20
_COMPARED_FIRST = 8  # clients, spread over the chunk: what is wrong may show in the data of some alone
_CPU_MAX_PARAMETERS = 1_000_000
_ACCELERATOR_BYTES = 4 * 2**30
_ACCELERATOR_MAX_CHUNK = 256
_COPIES = 4  # of the parameters that a client needs: themselves, the gradient, two of an optimizer such as Adam.
# Of frozen ones it needs none, but activations, which grow with them and are not known.
_SLOW_ON_CPU = (_ConvNd, nn.RNNBase, nn.MultiheadAttention)


class Execution:
    """Choose what trains a round's clients.

    Clients are trained at once only if some that were trained alone too came to the same: in a fit's first chunk, again
    when the module, its hooks or its optimizer change, and then after 1, 2, 4, 8, ... rounds. What is allocated is kept
    from round to round, as long as the federation is the same.

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
        self._structure: tuple[Any, ...] | None = None  # what was compared last
        self._proved_at: int | None = None  # the round of the last comparison
        self._interval = 1  # rounds to the next one
        self._announced = False
        self._said_no_chunk = False

    def client_trainer(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        federation: Federation,
        local_loop: LocalLoop,
        takes_index: bool,
        transfer: Callable[[Any], Any] | None,
    ) -> ClientTrainer:
        """Return what trains the clients of the round at hand.

        Args:
            trainer: The trainer.
            module: The module.
            federation: The federation.
            local_loop: Makes local steps one after the other, with the round's optimizer.
            takes_index: Whether ``training_step`` takes a ``batch_idx``.
            transfer: Applied to each batch, if given.

        Raises:
            MisconfigurationException: If ``mode="vectorized"`` is not possible.
        """
        flat, optimizer = federation.flat, local_loop.optimizer
        personal = list(federation.buffers.personal().values())
        if self._flat is not flat:
            self._flat, self._update, self._chunks, self._obstacle = flat, flat.empty(), None, None
            self._announced = False
        sequential = SequentialTrainer(local_loop, flat, federation.buffers, self._update)
        if self.mode == "sequential" or self._obstacle is not None:
            return sequential
        if self.mode == "auto" and not _pays(module, flat.device):
            return sequential
        obstacle = find_obstacle(trainer, module, optimizer, flat, personal)
        if obstacle is not None:
            self._give_up(obstacle)
            return sequential
        objective = None if local_loop.objective is None else local_loop.objective.objective
        structure = (*structure_of(module, optimizer), id(objective))
        if self._chunks is None or structure != self._structure:
            self._chunks = ChunkTrainer(module, flat, federation.buffers, self._update)
            self._structure, self._proved_at, self._interval = structure, None, 1
        # A learning rate schedule wants to see its optimizer step, and this one would not; it has no gradients.
        optimizer.zero_grad()
        optimizer.step()

        def loss(batch: Any, index: int) -> Tensor | None:
            output = module.training_step(batch, index) if takes_index else module.training_step(batch)
            return loss_of(output)

        step = ChunkStep(
            loss,
            optimizer,
            local_loop.start,
            transfer,
            trainer.gradient_clip_val,
            "value" if trainer.gradient_clip_algorithm == "value" else "norm",
            objective,
            None if local_loop.alternation is None else local_loop.alternation.steps,
        )
        chunk_size = self.chunk_size or _default_chunk_size(module, flat)
        wary = Wary(
            compare=self._num_to_compare(federation.round_index),
            may_draw=self.mode == "vectorized",
            on_proved=lambda: self._on_proved(federation.round_index, chunk_size),
            on_error=self._on_error,
            on_no_chunk=self._on_no_chunk,
        )
        return VectorizedTrainer(sequential, self._chunks, step, chunk_size, wary)

    def _num_to_compare(self, round_index: int) -> int:
        if self._proved_at is None:
            return _COMPARED_FIRST
        return 1 if round_index >= self._proved_at + self._interval else 0

    def _on_proved(self, round_index: int, chunk_size: int) -> None:
        if self._proved_at is not None:
            self._interval *= 2
        elif not self._announced:
            self._announced = True
            rank_zero_info(f"Clients are vectorized: up to {chunk_size} are trained at once.")
        self._proved_at = round_index

    def _on_error(self, error: Exception) -> None:
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, CannotVectorize):
            reason = f"`training_step` fails for several clients at once ({type(error).__name__}: {reason})"
        if isinstance(error, ComesOutDifferent) and self._proved_at is not None and self.mode == "auto":
            rank_zero_warn(
                f"Vectorized clients were right in round {self._proved_at} and are not any more: {reason}. Rounds since"
                " then may have other numbers than clients trained one after the other; from now on they are. Train"
                " again with `LBGMFederated(execution='sequential')` to be sure."
            )
        self._give_up(reason, error)

    def _on_no_chunk(self) -> None:
        if not self._said_no_chunk:
            self._said_no_chunk = True
            tell = rank_zero_warn if self.mode == "vectorized" else rank_zero_info
            tell(
                "Clients are trained one after the other, not vectorized: no two in a row have batches that agree in"
                " number, shapes and plain values such as ids."
            )

    def _give_up(self, reason: str, cause: Exception | None = None) -> None:
        if self.mode == "vectorized":
            raise MisconfigurationException(
                f"`LBGMFederated(execution='vectorized')` is not possible: {reason}. Use `execution='auto'`, which"
                " falls back where it must, or `execution='sequential'`."
            ) from cause
        self._obstacle = reason
        rank_zero_info(f"Clients are trained one after the other, not vectorized: {reason}.")


def find_obstacle(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    optimizer: Optimizer,
    flat: FlatParameters,
    personal: Sequence[Tensor] = (),
) -> str | None:
    """Return why clients cannot be vectorised, as far as that is known without trying; None if nothing is known."""
    if flat.device.type not in ("cpu", "cuda"):
        return f"the device {flat.device.type!r} is neither a CPU nor a CUDA GPU"
    if not has_plain_precision(trainer):
        return f"precision {trainer.precision!r} needs a {type(trainer.precision_plugin).__name__} plugin"
    if is_compiled(module):
        return "the module is compiled"
    hooks = overridden_step_hooks(trainer, module) + overridden_batch_hooks(trainer, module)
    if hooks:
        return f"the hook `{hooks[0]}` is overridden by the module or a callback and wants to see each local step"
    if type(optimizer) not in ELEMENTWISE_OPTIMIZERS:
        names = ", ".join(cls.__name__ for cls in ELEMENTWISE_OPTIMIZERS)
        return f"the optimizer {type(optimizer).__name__} is none of torch's elementwise ones ({names})"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has step hooks"
    if has_backward_hooks(module):
        return "the module has backward hooks, which would not be called"
    known = set(map(id, (*flat.parameters, *personal)))
    if any(p.requires_grad and id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        return "the optimizer has parameters that are not the module's"
    return None


def _pays(module: nn.Module, device: torch.device) -> bool:
    """Whether vectorised clients are likely to be faster.

    On a CPU they save the overhead of small operations. Where the operations themselves take the time, they save
    nothing, and grouped convolutions, which convolutions become, are slower than plain ones. Dropout draws other
    numbers in chunks; there the gain is not worth results that change with what a process trains.
    """
    if device.type != "cpu":
        return True
    refused = (*_SLOW_ON_CPU, _DropoutNd)
    return _num_parameters(module) < _CPU_MAX_PARAMETERS and not any(isinstance(m, refused) for m in module.modules())


def _num_parameters(module: nn.Module) -> int:
    """Return the size of the model: frozen parameters, as below adapters, make operations and activations large too."""
    return sum(parameter.numel() for parameter in module.parameters())


def _default_chunk_size(module: nn.Module, flat: FlatParameters) -> int:
    if flat.device.type == "cpu":
        return _CPU_CHUNK
    itemsize = torch.empty((), dtype=flat.dtype).element_size()
    fitting = _ACCELERATOR_BYTES // (_COPIES * _num_parameters(module) * itemsize)
    return max(1, min(_ACCELERATOR_MAX_CHUNK, fitting))
