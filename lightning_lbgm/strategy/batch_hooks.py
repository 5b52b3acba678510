"""Batch hooks that change the model: called once a round here, after each step elsewhere, with one warning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lbgm._compat.lightning import is_overridden_by
from lightning_lbgm.clients.state import same_values

__all__ = ["watch_batch_hooks"]

_HOOKS = ("on_train_batch_start", "on_train_batch_end")


def watch_batch_hooks(trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[], None]:
    """Warn if a batch hook of the module, or of a callback, changes a parameter or buffer the first time that it runs.

    Returns:
        A function that leaves the hooks as they were.
    """
    owners: list[Any] = [module, *trainer.callbacks]  # type: ignore[attr-defined]
    watched = [
        (owner, hook)
        for owner in owners
        for hook in _HOOKS
        if is_overridden_by(hook, owner) and not type(owner).__module__.startswith("lightning_lbgm.")
    ]
    undos = [_watch(owner, hook, module) for owner, hook in watched]

    def undo() -> None:
        for leave in undos:
            leave()

    return undo


def _watch(owner: Any, hook: str, module: pl.LightningModule) -> Callable[[], None]:
    original = getattr(owner, hook)
    own = {hook: original} if hook in vars(owner) else {}  # as a `LambdaCallback` has it

    def leave() -> None:
        if vars(owner).get(hook) is watched:
            del vars(owner)[hook]
            vars(owner).update(own)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        leave()  # the first call alone is looked at
        before = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}
        result = original(*args, **kwargs)
        now = _tensors(module)
        changed = next((name for name, old in before.items() if name in now and not same_values(now[name], old)), None)
        if changed is not None:
            rank_zero_warn(
                f"`{type(owner).__name__}.{hook}` changes {changed!r}. It is called once a round, on the global model,"
                " not at each local step as in centralized training: what it does is done that much more rarely. What"
                " belongs to each local step, such as moving a momentum encoder, goes into `training_step` or"
                " `on_before_zero_grad`."
            )
        return result

    vars(owner)[hook] = watched
    return leave


def _tensors(module: pl.LightningModule) -> dict[str, Any]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
