"""Checkpoint format of a federation between rounds, for any client store and any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.data.samplers import Sampler, SamplerState
from lightning_lbgm.protocol.recency import LeastRecentlyUsed
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.simulation.client_store import ClientFiles, is_index, read_index
from lightning_lbgm.simulation.placement import deal
from lightning_lbgm.simulation.undo import RoundState, RoundUndo
from lightning_lbgm.simulation.world import World, to_device

__all__ = ["VERSION", "FederationState", "check", "damaged", "load", "save"]

VERSION = 1
"""Format of what ``save`` returns. 0, without a mark: settings were compared by their representations."""

_PARTS = {"round_index": int, "seed": int, "ledger": dict, "server": dict, "uplink": dict, "clients": dict}


class FederationState(RoundState, Protocol):
    """What a checkpoint holds of a federation, and what it takes to save and load that.

    Attributes:
        flat: The trainable parameters.
        uplink: The stages.
        seed: The run's seed.
        world: The processes.
        undo: The undo log of the round at hand, or of the last one until it is final.
        in_round: Whether the client phase has begun and the server has not stepped yet.
    """

    flat: FlatParameters
    uplink: Chain
    seed: int
    world: World
    undo: RoundUndo | None
    in_round: bool


def check(state: Any, path: Any) -> None:
    """Check that a checkpoint's federation is one that can be read.

    Args:
        state: The state.
        path: The checkpoint's, to be named.

    Raises:
        ValueError: If it was made in a newer format, or a part is missing or something else.
    """
    if not isinstance(state, dict):
        raise damaged(path, f"it is a {type(state).__name__}")
    version = state.get("version", 0)
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"The checkpoint '{path}' was made by a newer lightning_lbgm: its federation has the format {version}, this"
            f" version reads up to {VERSION}. Upgrade lightning_lbgm to resume from it."
        )
    kinds = {**_PARTS, "identity": dict}
    wrong = [repr(name) for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if wrong or not isinstance(version, int):
        raise damaged(path, f"{', '.join(wrong) or 'the version'} is missing or is not what was saved")


def damaged(path: Any, what: str) -> ValueError:
    """Return the error for a checkpoint whose federation cannot be read."""
    name = f" {str(path)!r}" if path else ""
    return ValueError(
        f"The federation in the checkpoint{name} is damaged: {what}. Use another checkpoint, or start anew from its"
        " weights with `load_from_checkpoint`."
    )


def save(federation: FederationState, clients_folder: Path | None = None) -> dict[str, Any]:
    """Return a federation as built-ins and tensors (shared, not copied).

    Within a round it is that of the round's start, as after ``Federation.roll_back``.

    Of several processes all must call it; rank 0 gets all clients, the others their own. Within a round, and if the
    connection is broken, rank 0 too gets its own alone: the others' send in full next time.

    Args:
        federation: The federation.
        clients_folder: Where clients that are on disk are linked to; the state then has only an index of them. Of
            several processes all must see this folder.
    """
    world = federation.world
    clients: dict[Any, Any]
    on_disk, is_complete = False, world.size == 1
    if isinstance(federation.clients, ClientFiles) and clients_folder is not None:
        changed = federation.undo.personal if federation.in_round and federation.undo is not None else {}
        clients = federation.clients.snapshot(clients_folder, instead=changed)["skeletons"]
        on_disk, is_complete = True, is_complete and not changed
    elif federation.in_round and federation.undo is not None:
        clients = dict(sorted(federation.undo.before(federation.clients)))
    else:
        clients = dict(federation.clients)
    if world.size > 1 and world.is_open and not federation.in_round:
        parts, is_complete = world.gather_to_first(to_device(clients, "cpu"), "clients' state"), True
        if world.rank == 0:
            clients = dict(sorted(item for part in parts for item in part.items()))
    undo, objective = federation.undo if federation.in_round else None, federation.objective
    downlink = federation.downlink.state_dict() if undo is None else undo.downlink
    return {
        "version": VERSION,
        "round_index": federation.round_index,
        "seed": federation.seed,
        "ledger": federation.ledger.state_dict(),
        "server": federation.server.state_dict(),
        "uplink": federation.shared,
        "buffers": federation.buffers.state_dict(),
        "clients": {"folder": str(clients_folder), "skeletons": clients} if on_disk else clients,
        "uses": federation.recency.order,
        **({"downlink": downlink} if downlink else {}),
        **_saved_sampling(federation),
        # The server's part of an objective goes with all clients' or, in `load`, with none.
        **({"objective": objective.state_dict()} if objective is not None and is_complete else {}),
    }


def load(federation: FederationState, state: dict[str, Any], work: Mapping[int, int] | None = None) -> None:
    """Continue from ``save``, made by a federation with the same settings, in any number of processes.

    Args:
        federation: The federation, changed in place.
        state: The state.
        work: Each client's local work, to deal the clients to the processes. None: all the same.
    """
    device = federation.flat.device
    federation.round_index = state["round_index"]
    federation.seed = state["seed"]
    federation.ledger = Ledger.from_state(state["ledger"])
    federation.server.load_state_dict(state["server"])
    federation.shared = to_device(state["uplink"], device)
    federation.recency = LeastRecentlyUsed(federation.recency.capacity, state.get("uses", []))
    if "buffers" in state:  # checkpoints of earlier versions have none
        federation.buffers.load_state_dict(state["buffers"])
    if "downlink" in state:
        federation.downlink.load_state_dict(to_device(state["downlink"], device))
    federation.sampling = _restored_sampling(federation.sampler, state, device) or federation.sampling
    if federation.objective is not None and "objective" in state:
        federation.objective.load_state_dict(to_device(state["objective"], device))
    _load_clients(federation, state["clients"], work)
    if federation.objective is not None and "objective" not in state:
        for client_id in list(federation.clients):
            kept = federation.clients[client_id]
            if kept.pop("objective", None) is not None:
                federation.clients[client_id] = kept


def _load_clients(federation: FederationState, clients: dict[Any, Any], work: Mapping[int, int] | None) -> None:
    device, world = federation.flat.device, federation.world
    on_disk = is_index(clients)
    ids = sorted(clients["skeletons"] if on_disk else clients)
    ranks = deal(ids, [1 if work is None else work[k] for k in ids], {}, world.size)
    federation.placement = dict(zip(ids, ranks))
    own = [k for k in ids if federation.placement[k] == world.rank]
    if on_disk:
        clients = {"folder": clients["folder"], "skeletons": {k: clients["skeletons"][k] for k in own}}
        if isinstance(federation.clients, ClientFiles):
            federation.clients.restore(clients)
            return
        clients = read_index(clients)
    federation.clients.clear()
    federation.clients.update(to_device({k: clients[k] for k in own}, device))


def _restored_sampling(
    sampler: Sampler | None, state: dict[str, Any], device: torch.device | str = "cpu"
) -> SamplerState | None:
    """Return what a sampler remembers in a checkpoint; None if it is not this sampler's, which then starts anew."""
    saved = state.get("sampling", {})
    if sampler is None or saved.get("of") != type(sampler).__qualname__:
        return None
    remembered: SamplerState = to_device(saved["state"], device)
    return remembered


def _saved_sampling(federation: FederationState) -> dict[str, Any]:
    if not federation.sampling:
        return {}
    return {"sampling": {"of": type(federation.sampler).__qualname__, "state": federation.sampling}}
