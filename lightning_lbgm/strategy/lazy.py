"""Lazy modules (``nn.LazyLinear`` and others), initialised before the first round from the shapes of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_lbgm.core.rng import derive_seed, isolated_rng, seed_global_rng
from lightning_lbgm.data.feed import Feed
from lightning_lbgm.strategy.checks import takes_batch_index

__all__ = ["has_lazy_parameters", "initialize_lazy"]


class _Initialized(BaseException):
    """Ends the dry pass; no ``except Exception`` of the module's may catch it."""


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether a parameter or buffer of the module has no shape yet."""
    return any(map(is_lazy, (*module.parameters(), *module.buffers())))


def initialize_lazy(
    module: pl.LightningModule,
    feed: Feed,
    seed: int,
    device: torch.device,
    transfer: Callable[[Any], Any] | None = None,
) -> None:
    """Initialise the module's lazy parts by a pass of ``training_step`` on the first client's first batch.

    The pass ends at the last lazy part, so that neither a loss nor a metric is computed. The global generators stay as
    they are; the initial values are a pure function of the seed, the same in each process.

    Args:
        module: The module.
        feed: Where the batch comes from.
        seed: The run's seed.
        device: The module's device.
        transfer: Applied to the batch, if given.
    """
    _, batches = next(feed.stream(0, (0,)))
    data = next(iter(batches)).data
    batch = data if transfer is None else transfer(data)
    with isolated_rng(device):
        seed_global_rng(derive_seed(seed, "lazy modules"), device)
        _run_until_initialized(
            module, lambda: module.training_step(*(batch, 0) if takes_batch_index(module) else (batch,))
        )


@torch.no_grad()
def _run_until_initialized(module: nn.Module, step: Callable[[], Any]) -> None:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if not is_lazy(buffer)]

    def before_forward(lazy: nn.Module, *_: Any) -> None:  # after torch's own hook, which has initialised it
        buffers.extend((buffer, buffer.clone()) for buffer in lazy.buffers(recurse=False) if isinstance(buffer, Tensor))
        if not has_lazy_parameters(module):
            raise _Initialized

    handles = [
        part.register_forward_pre_hook(before_forward)
        for part in module.modules()
        if isinstance(part, LazyModuleMixin) and has_lazy_parameters(part)
    ]
    try:
        step()
    except _Initialized:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
