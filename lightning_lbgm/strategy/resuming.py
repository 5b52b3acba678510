"""Resuming a federation from a checkpoint, after checking that its clients are this one's."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lbgm.data.feed import Feed
from lightning_lbgm.simulation.checkpoint import damaged, load
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.identity import is_same, show
from lightning_lbgm.strategy.settings import Settings

__all__ = ["resume"]


def resume(settings: Settings, federation: Federation, feed: Feed, restored: dict[str, Any]) -> None:
    """Continue a fresh federation from a checkpoint's state.

    Raises:
        MisconfigurationException: If the checkpoint's clients are not this federation's.
        ValueError: If the state cannot be read.
    """
    identity, optimizer = restored["identity"], federation.server.optimizer
    current = settings.identify(federation, feed, restored.get("version", 0))
    _check_same(identity, current)
    rates = [group.get("lr") for group in optimizer.param_groups]
    work = {client_id: feed.work(client_id) for client_id in range(feed.num_clients)}
    try:
        load(federation, restored, work)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(None, f"{type(error).__name__}: {error}") from error
    if federation.objective is not None and "objective" in identity and "objective" not in restored:
        rank_zero_warn(
            f"The checkpoint was made within a round and lacks what some clients keep for `objective="
            f"{settings.objective!r}`: all of them, and the server, start anew with it."
        )
    if "server_lr" in identity and not is_same(identity["server_lr"], current["server_lr"]):
        # Restoring an optimizer's state brings back the checkpoint's rate, which would hold instead of the new one.
        _warn_of_rate(identity["server_lr"], current["server_lr"])
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


def _check_same(restored: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a checkpoint whose clients' state does not fit the current settings.

    Args:
        restored: The checkpoint's identity.
        current: This federation's.
    """
    remedy = "or start anew from its weights with `load_from_checkpoint`."
    kept = ("objective", "downlink", "personal")  # without them, what clients keep for them would be lost
    gone: dict[str, Any] = {name: None for name in kept if name in restored}
    for name, value in {**gone, **current}.items():
        if name in ("partition", "server_lr") or name not in restored:
            continue
        if is_same(_without_capacity(restored[name]), _without_capacity(value)):
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
            " labels or their order has changed, `ClientEvaluation(split=...)` holds out others, or the partitioner"
            f" draws from something else than its `rng`. Resume with the same data, {remedy}"
        )


def _without_capacity(identity: Any) -> Any:
    """Leave out ``LookBack(capacity=...)``, of how many clients states are kept: it may change."""
    if isinstance(identity, dict):
        return {name: _without_capacity(value) for name, value in identity.items() if name != "capacity"}
    return [_without_capacity(value) for value in identity] if isinstance(identity, list) else identity


def _warn_of_rate(before: list[Any], now: list[Any]) -> None:
    """Warn that the server optimizer goes on with another learning rate than the checkpoint's."""
    rank_zero_warn(
        f"The server optimizer goes on with the learning rate {_one(now)} of `LBGMFederated(server_optimizer=...)`; the"
        f" checkpoint's was {_one(before)}."
    )


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
