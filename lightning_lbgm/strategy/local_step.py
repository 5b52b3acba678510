"""Local step: one optimizer step of a client as in Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm._compat.lightning import call_callback_hooks, has_plain_precision, overridden_step_hooks
from lightning_lbgm.clients.direct_step import direct_backward, direct_step
from lightning_lbgm.clients.objective_turn import ObjectiveTurn
from lightning_lbgm.clients.personal import Alternation, gradient_correction
from lightning_lbgm.strategy.local_outputs import note_extra_outputs

__all__ = ["local_step", "loss_of"]


def local_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    optimizer: Optimizer,
    takes_index: bool,
    transfer: Callable[[Any], Any] | None,
    backward: Callable[[Tensor, Optimizer], Tensor],
    objective: ObjectiveTurn | None = None,
    alternation: Alternation | None = None,
) -> Callable[[Any, int], Tensor | None]:
    """Return a function that makes one local optimizer step as Lightning's automatic optimization would, for a round.

    Args:
        trainer: The trainer.
        module: The module.
        optimizer: The client optimizer.
        takes_index: Whether ``training_step`` takes a ``batch_idx``; it gets the index of the local step.
        transfer: Applied to each batch, if given.
        backward: The strategy's own backward, with the precision plugin's scaling and the hooks around it.
        objective: Corrects the gradients after each backward pass, before ``on_before_optimizer_step`` and clipping.
        alternation: Which parameters a step changes; applied before ``objective``. None: all.

    Raises:
        MisconfigurationException: If the optimizer compares losses, which do not have the objective's term, or the
            objective cannot go with it.
    """
    if objective is not None:
        _refuse_line_search(optimizer)
        obstacle = objective.objective.obstacle(optimizer)
        if obstacle is not None:
            raise MisconfigurationException(obstacle)
    correct = gradient_correction(objective, alternation)
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
                if correct is not None:
                    correct(index, None)
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
            call_callback_hooks(trainer, "on_before_zero_grad", optimizer)
            module.on_before_zero_grad(optimizer)
            module.optimizer_zero_grad(trainer.current_epoch, index, optimizer)
            if loss is not None:
                backward(loss, optimizer)
                if correct is not None:
                    correct(index, _loss_scale(precision))
            return loss

        precision.optimizer_step(optimizer, model=module, closure=closure)
        return losses[0]

    return plain_step if not hooked and has_plain_precision(trainer) else full_step


def _loss_scale(precision: Precision) -> float | None:
    """Return what a precision plugin has multiplied the gradients by until the optimizer's step, or None."""
    scaler = getattr(precision, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _refuse_line_search(optimizer: Optimizer) -> None:
    searches = [group["line_search_fn"] for group in optimizer.param_groups if group.get("line_search_fn")]
    if searches:
        raise MisconfigurationException(
            f"`{type(optimizer).__name__}(line_search_fn={searches[0]!r})` compares losses, and those of"
            " `training_step` do not have the term that `LBGMFederated(objective=...)` adds to the gradients. Use"
            " `line_search_fn=None`, or another optimizer."
        )


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
