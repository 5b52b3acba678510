"""Resuming a federation from a checkpoint, after checking that its clients are this one's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_lbgm import snapshot
from lightning_lbgm._checks import check_same_federation, warn_of_changed_rate
from lightning_lbgm.data import Feed
from lightning_lbgm.federation import Federation
from lightning_lbgm.identity import is_same
from lightning_lbgm.settings import identify_federation

if TYPE_CHECKING:
    from lightning_lbgm.strategy import LBGMFederated

__all__ = ["identify_run", "resume"]


def identify_run(
    strategy: LBGMFederated, federation: Federation, feed: Feed, version: int = snapshot.VERSION
) -> dict[str, Any]:
    """Return what must agree for a checkpoint's clients to be this federation's, as that format of checkpoints says it.

    Call it before the first round: stages and optimizers are described as they were made.
    """
    return identify_federation(
        num_clients=feed.num_clients,
        partitioner=strategy.split,
        partition=feed.fingerprint(),
        uplink=strategy.uplink,
        buffers=strategy.buffers,
        server_optimizer=federation.server.optimizer,
        seed=federation.seed,
        num_parameters=federation.flat.num_parameters,
        version=version,
    )


def resume(strategy: LBGMFederated, federation: Federation, feed: Feed, restored: dict[str, Any]) -> None:
    """Continue a fresh federation from a checkpoint's state.

    Raises:
        MisconfigurationException: If the checkpoint's clients are not this federation's.
        ValueError: If the state cannot be read.
    """
    identity, optimizer = restored["identity"], federation.server.optimizer
    current = identify_run(strategy, federation, feed, restored.get("version", 0))
    check_same_federation(identity, current)
    rates = [group.get("lr") for group in optimizer.param_groups]
    work = {client_id: feed.work(client_id) for client_id in range(feed.num_clients)}
    try:
        federation.load_state_dict(restored, work)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise snapshot.damaged(None, f"{type(error).__name__}: {error}") from error
    if "server_lr" in identity and not is_same(identity["server_lr"], current["server_lr"]):
        # Restoring an optimizer's state brings back the checkpoint's rate, which would hold instead of the new one.
        warn_of_changed_rate(identity["server_lr"], current["server_lr"])
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
