"""What a federation cannot do with a Trainer, a module or a DataLoader, each with the remedy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from lightning_lbgm._twin import is_a, namesakes
from lightning_lbgm.data import iterates_by_itself
from lightning_lbgm.identity import is_same, show

__all__ = [
    "check_centralized",
    "check_client_loaders",
    "check_environment",
    "check_federated",
    "check_finders",
    "check_fit",
    "check_limits",
    "check_loader",
    "check_same_data",
    "check_same_federation",
    "needs_client_loaders",
    "takes_batch_index",
    "warn_of_changed_parameters",
    "warn_of_changed_rate",
    "warn_of_own_buffers",
    "warn_of_unaveraged",
]

_A_LOADER_EACH = (
    "Or give each client a loader of its own, whose batches are taken as they come: `fit(model, [loader_a, loader_b])`"
    " with `LBGMFederated(num_clients=None)`."
)


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


def check_centralized(trainer: pl.Trainer) -> None:
    """Refuse a federation, and strategies that shard gradients, to ``GradientSpaceCallback``."""
    from lightning_lbgm.strategy import LBGMFederated

    if isinstance(trainer.strategy, LBGMFederated):
        raise MisconfigurationException(
            "`GradientSpaceCallback` analyses the gradients of centralized training, and in a federation there are"
            " only the clients' own. Use it without `strategy=LBGMFederated(...)`; there `LBGMCallback` draws the"
            " LBP errors of each client."
        )
    if is_a(trainer.strategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"`GradientSpaceCallback` needs whole gradients, but {type(trainer.strategy).__name__} shards them. Use"
            " `Trainer(strategy='ddp')` or one device, or drop the callback."
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
            f"{setting} would skip rounds, for a batch is a round here. Use 1 (or drop the callback), and a larger"
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


def check_loader(loader: object) -> DataLoader[Any]:
    """Return the training DataLoader if its dataset can be dealt to clients."""
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            "LBGMFederated deals the dataset of one training `DataLoader` to the clients; got an object of type"
            f" {type(loader).__name__}. Pass the `DataLoader` itself, with what is done to its batches in its"
            f" `collate_fn` or its dataset. {_A_LOADER_EACH}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            f"The training dataset {type(loader.dataset).__name__} is an `IterableDataset`: its examples cannot be"
            f" dealt to clients. Use a map-style dataset. {_A_LOADER_EACH}"
        )
    method = iterates_by_itself(loader)
    if method is not None:
        raise MisconfigurationException(
            f"The training loader's class {type(loader).__name__} has a `{method}` of its own, but clients' batches are"
            " drawn from its dataset, so what it does would be left out. Do it in the dataset, in `collate_fn` or in"
            f" the module's `on_after_batch_transfer`, and use torch's `DataLoader`. {_A_LOADER_EACH}"
        )
    return loader


def check_client_loaders(
    num_loaders: int, num_clients: int | None, partitioner: object | None, in_use: int | None, mode: str | None
) -> None:
    """Refuse several training loaders if they are not to be the clients.

    Args:
        num_loaders: Number of loaders in the collection.
        num_clients: The setting.
        partitioner: The setting.
        in_use: Number of clients of the federation that goes on; None: it has not begun.
        mode: That of the ``CombinedLoader``, if the user made one.
    """
    if num_loaders == 0:
        raise MisconfigurationException("The collection of training loaders is empty: pass a loader for each client.")
    if mode is not None:
        raise MisconfigurationException(
            f"`CombinedLoader(..., mode={mode!r})` combines the batches of {num_loaders} loaders, which a federation"
            f" cannot. {_A_LOADER_EACH}"
        )
    if num_clients is not None and (num_clients != num_loaders or partitioner is not None):
        clash = (
            f"`num_clients={num_clients}`" if num_clients != num_loaders else f"`partitioner={partitioner!r}` beside"
        )
        raise MisconfigurationException(
            f"LBGMFederated got {clash} and {num_loaders} training loaders. With `LBGMFederated(num_clients=None)` and"
            " no partitioner each loader is a client. To deal the examples of all of them, pass one"
            " `DataLoader(ConcatDataset(datasets), ...)`; with `partitioner=NaturalPartitioner()` each of the datasets"
            " is then a client."
        )
    if in_use is not None and in_use != num_loaders:
        raise MisconfigurationException(
            f"There are {num_loaders} training loaders now, but the federation has {in_use} clients, one for each"
            " loader it began with: pass as many loaders, or use a new Trainer for other clients."
        )


def needs_client_loaders(found: str) -> MisconfigurationException:
    """Return the error for ``num_clients=None`` without loaders for the clients."""
    return MisconfigurationException(
        f"`LBGMFederated(num_clients=None)` takes a training loader for each client, as `fit(model, [loader_a,"
        f" loader_b])` or a dict of them; got {found}. Pass a list or a dict, or say how many clients the data is dealt"
        " to: `LBGMFederated(num_clients=10)`."
    )


def check_same_data(fingerprints: list[str]) -> None:
    """Refuse processes that have dealt different data to the clients."""
    if len(set(fingerprints)) > 1:
        raise MisconfigurationException(
            "The processes have dealt the training examples to the clients differently: the dataset, its labels, its"
            " sampler or its split differ between them. Seed what is random in it, for instance with"
            " `seed_everything(...)` at the top of the script."
        )


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
