"""The federation's settings: checks that need neither data nor a Trainer, and what a checkpoint compares."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.optim import Optimizer

from lightning_lbgm.clients.objectives import LocalObjective
from lightning_lbgm.compression.chain import Chain, as_chain
from lightning_lbgm.compression.methods.lookback import LookBack
from lightning_lbgm.core.validation import class_hint
from lightning_lbgm.data.partitioners import IIDPartitioner, Partitioner
from lightning_lbgm.strategy.identity import identify, identify_optimizer

__all__ = ["check_settings", "describe_changes", "identify_federation", "with_hints"]

_Init = TypeVar("_Init", bound=Callable[..., None])

_LOOK_BACK = ("threshold", "granularity", "rank", "max_age", "rowwise", "store", "dtype", "capacity")
_HINTS = {
    **{name: f"`uplink=[LookBack({name}=...)]`" for name in _LOOK_BACK},
    **dict.fromkeys(("delta", "error_tol"), "`uplink=[LookBack(threshold=...)]`"),
    **dict.fromkeys(("fraction", "k", "topk", "top_k", "sparsity"), "`uplink=[TopK(fraction=...), LookBack()]`"),
    **dict.fromkeys(("compressor", "compressors", "compression", "stages"), "`uplink=[...]`, a list of stages"),
    **dict.fromkeys(
        ("classes_per_client", "alpha", "labels", "client_ids"),
        "`partitioner=PathologicalPartitioner(3)` or another partitioner, which takes it",
    ),
    **dict.fromkeys(("cohort_size", "fraction_fit", "fraction_train", "participation"), "`clients_per_round=...`"),
    **dict.fromkeys(
        ("lr", "server_lr"),
        "`server_optimizer=functools.partial(torch.optim.SGD, lr=...)` for the server,"
        " or the module's `configure_optimizers` for the clients",
    ),
    **dict.fromkeys(("mu", "proximal_mu", "prox_mu"), "`objective=FedProx(mu=...)`"),
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


def describe_changes(settings: dict[str, Any]) -> str:
    """Show M and the resolved settings that are not the defaults, in the way of the constructor call."""
    defaults = {
        "partitioner": repr(IIDPartitioner()),
        "uplink": repr(as_chain(LookBack(threshold=0.2))),
        "clients_per_round": settings["num_clients"],
        "local_epochs": 1,
        "server_optimizer": "SGD(lr=1.0)",
        "weighting": "examples",
        "buffers": "average",
        "rounds_per_epoch": 1,
        "execution": "auto",
        "num_parameters": settings["num_parameters"],
    }
    shown = {name: v for name, v in settings.items() if v is not None and v != defaults.get(name)}
    call = ", ".join(f"{name}={value}" for name, value in shown.items())
    return f"{settings['num_parameters']:,} parameters, {call}"


def check_settings(
    *,
    num_clients: Any,
    partitioner: Any,
    local_epochs: Any,
    local_steps: Any,
    server_optimizer: Any,
    weighting: Any,
    buffers: Any,
    rounds_per_epoch: Any,
    seed: Any,
    execution: Any,
    vectorized_chunk: Any,
    objective: Any,
) -> None:
    """Check the arguments of ``LBGMFederated`` that do not check themselves.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range, or both ``local_epochs`` and ``local_steps`` are given.
    """
    if num_clients is not None:
        _check_positive("num_clients", num_clients)
    elif partitioner is not None:
        raise ValueError(
            f"`num_clients=None` takes each training loader as one client, so that nothing is dealt, but"
            f" `partitioner={partitioner!r}` deals the examples of one loader. Pass one of them: `num_clients=...` with"
            " the partitioner, or no partitioner."
        )
    _check_positive("rounds_per_epoch", rounds_per_epoch)
    for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
        if value is not None:
            _check_positive(name, value)
    if local_epochs is not None and local_steps is not None:
        raise ValueError(
            f"`local_epochs={local_epochs}` and `local_steps={local_steps}` both say how long a client trains in a"
            " round: pass one of them."
        )
    if partitioner is not None and not isinstance(partitioner, Partitioner):
        raise TypeError(
            f"`partitioner` must be a `Partitioner` such as `PathologicalPartitioner(3)`; got {partitioner!r}."
        )
    if server_optimizer is not None and (isinstance(server_optimizer, Optimizer) or not callable(server_optimizer)):
        raise TypeError(
            "`server_optimizer` must be a callable that takes parameters and returns a `torch.optim.Optimizer`,"
            f" such as `lambda params: torch.optim.Adam(params, lr=0.01)`; got {server_optimizer!r}."
        )
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"`weighting` must be 'examples' or 'uniform'; got {weighting!r}.")
    if buffers not in ("average", "server", "client"):
        raise ValueError(f"`buffers` must be 'average', 'server' or 'client'; got {buffers!r}.")
    if execution not in ("sequential", "vectorized", "auto"):
        raise ValueError(f"`execution` must be 'sequential', 'vectorized' or 'auto'; got {execution!r}.")
    if vectorized_chunk is not None:
        _check_positive("vectorized_chunk", vectorized_chunk)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"`seed` must be an int or None; got {seed!r}.")
    if objective is not None and not isinstance(objective, LocalObjective):
        raise TypeError(
            f"`objective` must be a `LocalObjective` such as `FedProx(mu=0.1)`, or None; got {objective!r}."
            f"{class_hint(objective, LocalObjective)}"
        )


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")


def identify_federation(
    *,
    num_clients: int,
    partitioner: Partitioner | str,
    partition: str,
    uplink: Chain,
    buffers: str,
    server_optimizer: Optimizer,
    seed: int,
    num_parameters: int,
    version: int,
) -> dict[str, Any]:
    """Return what must agree for a checkpoint's clients to be this federation's, as values that can be compared.

    ``server_lr`` may differ: the new one holds.

    Args:
        num_clients: K.
        partitioner: The partitioner.
        partition: Fingerprint of which examples are whose.
        uplink: The stages.
        buffers: What becomes of buffers.
        server_optimizer: As it was made, before its first step.
        seed: The run's seed.
        num_parameters: M.
        version: Format of the checkpoint; that of 0 had representations.
    """
    identity: dict[str, Any] = {"num_clients": num_clients, "seed": seed, "num_parameters": num_parameters}
    if version == 0:
        reprs = {"partitioner": repr(partitioner), "uplink": repr(uplink.without_store())}
        return {**identity, **reprs, "server_optimizer": type(server_optimizer).__name__, "partition": partition}
    return {
        **identity,
        "partitioner": identify(partitioner),
        "partition": partition,
        "uplink": identify(uplink),
        "buffers": buffers,
        "server_optimizer": identify_optimizer(server_optimizer),
        "server_lr": [identify(group.get("lr")) for group in server_optimizer.param_groups],
    }
