"""Checks of Trainer, module and callbacks: what a federation cannot do, each with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lbgm._compat.twin import is_a, namesakes

__all__ = [
    "check_environment",
    "check_finders",
    "check_fit",
    "check_limits",
    "check_personal_steps",
    "takes_batch_index",
    "warn_of_changed_parameters",
    "warn_of_own_buffers",
    "warn_of_unaveraged",
    "warn_of_untrained_personal",
]


def check_environment(sync_batchnorm: bool) -> None:
    """Refuse synchronised BatchNorm."""
    if sync_batchnorm:
        raise MisconfigurationException(
            "`Trainer(sync_batchnorm=True)` has no meaning for federated clients, which train apart. Remove it, and"
            " choose what becomes of BatchNorm's statistics with `LBGMFederated(buffers=...)`."
        )


def check_fit(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse manual optimization, gradient accumulation and steps that fetch their own batches."""
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"`{type(module).__name__}.training_step(dataloader_iter)` cannot be federated: the clients' batches"
            " are drawn for it. Use `training_step(batch, batch_idx)`."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"`{type(module).__name__}.automatic_optimization = False` cannot be federated: LBGMFederated runs the"
            " clients' optimizer steps itself. Use automatic optimization."
        )
    scheduled = any(
        is_a(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    if trainer.accumulate_grad_batches != 1 or scheduled:
        setting = (
            "`GradientAccumulationScheduler`"
            if scheduled
            else f"`Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})`"
        )
        raise MisconfigurationException(
            f"{setting} would skip rounds, because a batch is a round here. Use 1 (or drop the callback), and a larger"
            " batch size in the DataLoader for larger local steps."
        )
    _check_weight_averaging(trainer, module)
    _check_validation_interval(trainer)


def _check_weight_averaging(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse an epoch that only goes forward: a round trains."""
    batch_norm = any(isinstance(part, _BatchNorm) for part in module.modules())
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if batch_norm and any(is_a(callback, StochasticWeightAveraging) for callback in callbacks):
        raise MisconfigurationException(
            f"`StochasticWeightAveraging` recomputes BatchNorm's statistics of `{type(module).__name__}` in one more"
            " epoch without training, which a federation cannot do. Use the callback"
            " `WeightAveraging(use_buffers=True)` or `EMAWeightAveraging(use_buffers=True)`, which average them with"
            " the weights."
        )


def _check_validation_interval(trainer: pl.Trainer) -> None:
    """Refuse, in rounds, what Lightning would refuse in batches."""
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    rounds_per_epoch: int = trainer.strategy.rounds_per_epoch  # type: ignore[attr-defined]
    rounds = min(rounds_per_epoch, limit) if isinstance(limit, int) else int(rounds_per_epoch * limit)
    by_round = isinstance(interval, int) and trainer.check_val_every_n_epoch is not None
    if by_round and interval > rounds > 0 and trainer.limit_val_batches > 0:
        raise MisconfigurationException(
            f"`Trainer(val_check_interval={interval})` counts rounds, and an epoch has {rounds}"
            f" (`LBGMFederated(rounds_per_epoch={rounds_per_epoch})`). Add `check_val_every_n_epoch=None` to validate"
            f" every {interval} rounds of the run, use `Trainer(check_val_every_n_epoch=...)`, or make the epochs"
            " longer."
        )


def takes_batch_index(module: pl.LightningModule) -> bool:
    """Whether ``training_step`` takes a second argument, by Lightning's rule."""
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


def check_limits(trainer: pl.Trainer, rounds_per_epoch: int) -> None:
    """Refuse settings that count batches but mean a part of the data, because a batch is a round here."""
    overfit, limit = trainer.overfit_batches, trainer.limit_train_batches  # type: ignore[attr-defined]
    if overfit:
        raise MisconfigurationException(
            f"`Trainer(overfit_batches={overfit})` would limit the rounds of an epoch, because a batch is a round here,"
            " and each round would still train on all of the data. Remove it, and pass a small training set:"
            " `DataLoader(Subset(dataset, range(100)), ...)`."
        )
    if isinstance(limit, float) and limit > 0 and int(limit * rounds_per_epoch) == 0:
        raise MisconfigurationException(
            f"`Trainer(limit_train_batches={limit})` is a share of the rounds of an epoch, because a batch is a round"
            f" here, and of `LBGMFederated(rounds_per_epoch={rounds_per_epoch})` it leaves none. For a part of the data"
            " pass `DataLoader(Subset(dataset, indices), ...)`, for fewer local steps `LBGMFederated(local_steps=...)`."
        )


def check_finders(trainer: pl.Trainer) -> None:
    """Refuse a finder at the start of a resumed run: Lightning then counts steps from 0, the federation does not."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        finders: tuple[Any, ...] = (*namesakes(BatchSizeFinder), *namesakes(LearningRateFinder))
        for finder in finders:
            at_start = isinstance(callback, finder) and type(callback).on_fit_start is finder.on_fit_start
            if at_start and trainer.ckpt_path is not None:
                raise MisconfigurationException(
                    f"`{type(callback).__name__}` in a run that is resumed with `ckpt_path={trainer.ckpt_path!r}`:"
                    " Lightning then forgets at which round the checkpoint was made. Run it without a checkpoint first,"
                    " and resume without it."
                )


def check_personal_steps(personal_steps: int, num_steps: Sequence[int]) -> None:
    """Refuse ``personal_steps`` that leaves no client a step for the shared parameters; warn if it is some clients.

    Args:
        personal_steps: The first local steps, which change personal parameters alone.
        num_steps: Local steps of each client in a round.
    """
    short = sum(steps <= personal_steps for steps in num_steps)
    if short == len(num_steps):
        raise MisconfigurationException(
            f"`LBGMFederated(personal_steps={personal_steps})`: every client makes at most {max(num_steps)} local steps"
            " in a round, so that none is left for the shared parameters. Make it smaller, or the clients' local work"
            " larger (`local_steps`, `local_epochs`)."
        )
    if short:
        rank_zero_warn(
            f"`LBGMFederated(personal_steps={personal_steps})`: {short} of {len(num_steps)} clients make no more local"
            " steps than that in a round, so their updates of the shared parameters are zero."
        )


def warn_of_own_buffers(names: list[str]) -> None:
    """Warn that the clients' own buffers leave the global model's untrained."""
    if names:
        rank_zero_warn(
            f"`LBGMFederated(buffers='client')`: each client keeps its own buffers (such as {names[0]!r}) and the"
            " global model's are never trained, so its validation in eval mode says little."
        )


def warn_of_untrained_personal(names: list[str]) -> None:
    """Warn that the clients' personal parameters leave the global model's untrained."""
    if names:
        rank_zero_warn(
            f"`LBGMFederated(personal=...)`: each client keeps its own of {len(names)} parameters (such as"
            f" {names[0]!r}), and those of the global model stay as they are, so its validation says little. Judge the"
            " clients instead, each with its own: the callback `ClientEvaluation` does."
        )


def warn_of_unaveraged(notes: dict[str, str]) -> None:
    """Warn of buffers that clients change and that cannot be averaged: name and why."""
    listed = ", ".join(f"{name!r} ({why})" for name, why in list(notes.items())[:3])
    more = f" and {len(notes) - 3} more" if len(notes) > 3 else ""
    rank_zero_warn(
        f"Training changes {listed}{more}, which cannot be averaged over clients, so the global model's stay as they"
        " are. If others belong with them, such as the queue of a pointer, let each client keep its own with"
        " `LBGMFederated(buffers='client')`, or leave all as they are with `buffers='server'`."
    )


def warn_of_changed_parameters(round_index: int, before: int, after: int) -> None:
    """Warn that the clients' state was dropped with the set of trainable parameters."""
    rank_zero_warn(
        f"The trainable parameters changed before round {round_index}, from {before} to {after}: look-back gradients"
        " and residuals are dropped, and the server optimizer starts afresh."
    )
