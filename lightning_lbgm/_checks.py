"""What a federation cannot do with a Trainer, a module or a DataLoader, each with the remedy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from lightning_lbgm.data import RoundLoader, has_plain_sampler
from lightning_lbgm.identity import is_same, show

__all__ = [
    "check_environment",
    "check_federated",
    "check_fit",
    "check_loader",
    "check_same_data",
    "check_same_federation",
    "check_single_loader",
    "takes_batch_index",
    "warn_of_changed_parameters",
    "warn_of_changed_rate",
    "warn_of_own_buffers",
]


def check_environment(sync_batchnorm: bool) -> None:
    """Refuse synchronised BatchNorm."""
    if sync_batchnorm:
        raise MisconfigurationException(
            "`Trainer(sync_batchnorm=True)` has no meaning for federated clients, which train apart. Remove it, and"
            " choose what becomes of BatchNorm's statistics with `LBGMFederated(buffers=...)`."
        )


def check_federated(callback: Callback, trainer: pl.Trainer) -> None:
    """Refuse a callback of a federation in a Trainer that has none."""
    from lightning_lbgm.strategy import LBGMFederated

    if not isinstance(trainer.strategy, LBGMFederated):
        raise MisconfigurationException(
            f"`{type(callback).__name__}` reports on a federation, but the Trainer's strategy is"
            f" {type(trainer.strategy).__name__}. Use `Trainer(strategy=LBGMFederated(...))`, or drop the callback."
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
        isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    if trainer.accumulate_grad_batches != 1 or scheduled:
        setting = (
            "`GradientAccumulationScheduler`"
            if scheduled
            else f"`Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})`"
        )
        raise MisconfigurationException(
            f"{setting} would skip rounds, for a batch is a round here. Use 1 (or drop the callback), and a larger"
            " batch size in the DataLoader for larger local steps."
        )
    _check_weight_averaging(trainer, module)
    _check_validation_interval(trainer)


def _check_weight_averaging(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse an epoch that only goes forward: a round trains."""
    batch_norm = any(isinstance(part, _BatchNorm) for part in module.modules())
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if batch_norm and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
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


def check_loader(loader: object) -> DataLoader[Any]:
    """Return the training DataLoader if its dataset can be dealt to clients."""
    if not isinstance(loader, DataLoader):
        raise _needs_one_loader(f"an object of type {type(loader).__name__}")
    if isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            f"The training dataset {type(loader.dataset).__name__} is an `IterableDataset`: its examples cannot be"
            " dealt to clients. Use a map-style dataset, or one for each client in a `ConcatDataset` with"
            " `partitioner=NaturalPartitioner()`."
        )
    if not has_plain_sampler(loader):
        rank_zero_warn(
            f"The training DataLoader's {type(loader.sampler).__name__} is replaced: each client shuffles its own"
            " examples."
        )
    return loader


def check_same_data(fingerprints: list[str]) -> None:
    """Refuse processes that have dealt different data to the clients."""
    if len(set(fingerprints)) > 1:
        raise MisconfigurationException(
            "The processes have dealt the training examples to the clients differently: the dataset, its labels or its"
            " split differ between them. Seed what is random in it, for instance with `seed_everything(...)` at the"
            " top of the script."
        )


def check_single_loader(loaders: object) -> RoundLoader:
    """Return the training loader; refuse a collection of them, whose members a strategy sees one by one."""
    if not isinstance(loaders, RoundLoader):
        raise _needs_one_loader(f"a {type(loaders).__name__} of loaders")
    return loaders


def check_same_federation(restored: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a checkpoint whose clients' state does not fit the current settings.

    Args:
        restored: The checkpoint's identity.
        current: This federation's.
    """
    remedy = "or start anew from its weights with `load_from_checkpoint`."
    for name, value in current.items():
        if name in ("partition", "server_lr") or name not in restored or is_same(restored[name], value):
            continue
        before, now = (each if isinstance(each, str) else show(each) for each in (restored[name], value))
        but = " with other code or values" if before == now else ""
        raise MisconfigurationException(
            f"The checkpoint's federation has `{name}={before}`, this one `{name}={now}`{but}: what its clients keep"
            f" does not fit. Resume with the same settings, {remedy}"
        )
    if restored.get("partition", current["partition"]) != current["partition"]:
        raise MisconfigurationException(
            "The checkpoint's clients have other training examples than this federation's: the dataset, its length, its"
            " labels or their order has changed, or the partitioner draws from something else than its `rng`. Resume"
            f" with the same data, {remedy}"
        )


def warn_of_changed_rate(before: list[Any], now: list[Any]) -> None:
    """Warn that the server optimizer goes on with another learning rate than the checkpoint's."""
    rank_zero_warn(
        f"The server optimizer goes on with the learning rate {_one(now)} of `LBGMFederated(server_optimizer=...)`; the"
        f" checkpoint's was {_one(before)}."
    )


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def warn_of_own_buffers(names: list[str]) -> None:
    """Warn where the clients' own buffers leave the global model's untrained."""
    if names:
        rank_zero_warn(
            f"`LBGMFederated(buffers='client')`: each client keeps its own buffers (such as {names[0]!r}) and the"
            " global model's are never trained, so its validation in eval mode says little."
        )


def warn_of_changed_parameters(round_index: int, before: int, after: int) -> None:
    """Warn that the clients' state was dropped with the set of trainable parameters."""
    rank_zero_warn(
        f"The trainable parameters changed before round {round_index}, from {before} to {after}: look-back gradients"
        " and residuals are dropped, and the server optimizer starts afresh."
    )


def _needs_one_loader(found: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"LBGMFederated needs one training `DataLoader`, whose dataset it deals to the clients; got {found}. If each"
        " client has a dataset of its own, use `DataLoader(ConcatDataset(datasets), ...)` with"
        " `partitioner=NaturalPartitioner()`."
    )
