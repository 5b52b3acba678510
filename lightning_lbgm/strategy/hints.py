"""Hints for unknown arguments of ``LBGMFederated``: where the setting belongs."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["with_hints"]

_Init = TypeVar("_Init", bound=Callable[..., None])

_LOOK_BACK = ("threshold", "granularity", "rank", "max_age", "rowwise", "store", "dtype", "capacity")
_HINTS = {
    **dict.fromkeys(("mu", "proximal_mu", "prox_mu"), "`objective=FedProx(mu=...)`"),
    **{name: f"`uplink=[LookBack({name}=...)]`" for name in _LOOK_BACK},
    **dict.fromkeys(("delta", "error_tol"), "`uplink=[LookBack(threshold=...)]`"),
    **dict.fromkeys(("fraction", "k", "topk", "top_k", "sparsity"), "`uplink=[TopK(fraction=...), LookBack()]`"),
    **dict.fromkeys(("compressor", "compressors", "compression", "stages"), "`uplink=[...]`, a list of stages"),
    **dict.fromkeys(
        ("classes_per_client", "alpha", "labels", "client_ids"),
        "`partitioner=PathologicalPartitioner(3)` or another partitioner, which takes it",
    ),
    **dict.fromkeys(("cohort_size", "fraction_fit", "fraction_train", "participation"), "`clients_per_round=...`"),
    **dict.fromkeys(("d", "client_sampler", "selection"), "`sampler=PowerOfChoice(d=...)` or another sampler"),
    **dict.fromkeys(
        ("bandwidth", "latency", "clock", "network_clock"), "`network=NetworkClock(uplink=..., downlink=...)`"
    ),
    **dict.fromkeys(("stragglers", "drop_rate", "dropout_rate"), "`dropout=...`, `over_select=...` or `deadline=...`"),
    **dict.fromkeys(
        ("lr", "server_lr"),
        "`server_optimizer=functools.partial(torch.optim.SGD, lr=...)` for the server,"
        " or the module's `configure_optimizers` for the clients",
    ),
    **dict.fromkeys(("batch_size", "num_workers", "shuffle"), "the training `DataLoader(...)`"),
    **dict.fromkeys(("rounds", "num_rounds", "max_rounds"), "`Trainer(max_epochs=...)`, which counts rounds"),
    **dict.fromkeys(("accelerator", "devices", "num_nodes", "precision"), "`Trainer(...)`"),
}


def with_hints(init: _Init) -> _Init:
    """Say in the error for an unknown keyword argument where the setting belongs."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def init_with_hints(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise TypeError(_unknown(type(self).__name__, name, known))
        init(self, *args, **kwargs)

    return cast(_Init, init_with_hints)


def _unknown(owner: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = _HINTS.get(name) or (f"`{close[0]}=...`" if close else None)
    remedy = f"Use {hint}." if hint else f"It takes {', '.join(f'`{argument}`' for argument in known)}."
    return f"`{owner}({name}=...)`: there is no such argument. {remedy}"
