"""Undo log of a round: what a federation was before it, until the round is final."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_lbgm.data.samplers import Sampler, SamplerState
from lightning_lbgm.protocol.downlink import Downlink
from lightning_lbgm.protocol.recency import LeastRecentlyUsed
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.objective import ServerObjective
from lightning_lbgm.server.server import Server

__all__ = ["RoundState", "RoundUndo"]

_MAX_KEPT_BYTES = 2**30


class RoundState(Protocol):
    """What a round changes of a federation, and its undo log puts back.

    Attributes:
        round_index: The round to come.
        placement: The rank that holds a client's state, of all clients.
        shared: What the server keeps for all clients.
        ledger: The account of bits.
        recency: The order in which clients were last used.
        clients: The states of this rank's clients.
        server: Its own undo is called.
        buffers: Their own undo is called.
        objective: Its own undo is called, if the server has a part in the local objective.
        downlink: What clients hold.
        sampler: What draws the cohorts, if it learns.
        sampling: The sampler's state, which no round changes: it makes a new one.
    """

    round_index: int
    placement: dict[int, int]
    shared: dict[str, Any]
    ledger: Ledger
    recency: LeastRecentlyUsed
    clients: MutableMapping[int, Any]
    server: Server
    buffers: Buffers
    objective: ServerObjective | None
    downlink: Downlink
    sampler: Sampler | None
    sampling: SamplerState


class _Kept:
    """A client's state before its turn: its containers copied, its tensors shared as long as nobody writes to them."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = _copy_containers(state)
        self._versions = [(tensor, tensor._version) for tensor in _tensors(self._state)]

    @property
    def is_whole(self) -> bool:
        """Whether no tensor has been written to."""
        return all(tensor._version == version for tensor, version in self._versions)

    def state(self) -> dict[str, Any]:
        copied: dict[str, Any] = _copy_containers(self._state)
        return copied

    @property
    def personal(self) -> dict[str, Tensor] | None:
        """The client's personal parameters, which nobody writes to; None if it has none."""
        return self._state.get("personal")

    def bytes_beside(self, state: dict[str, Any]) -> int:
        """Return the bytes that are kept only for this, because the new state has other tensors.

        Personal parameters do not count: they are kept in any case.
        """
        if not self._versions:
            return 0
        used = set(map(id, _tensors(state))) | set(map(id, _tensors(self.personal or {})))
        return sum(tensor.nbytes for tensor, _ in self._versions if id(tensor) not in used)


@dataclass(frozen=True)
class _Lost:
    """What is left of a client's state that took too much memory: its personal parameters, if it has some."""

    personal: dict[str, Tensor] | None


class RoundUndo:
    """Remember a federation at the start of a round, and each client's state at the start of its turn.

    A client's old tensors are kept as long as they are at most 1 GiB together and the uplink's stages write new ones
    instead of changing them; else ``restore`` lets that client forget what it has sent, so that its next update goes
    in full. Its personal parameters it has in any case.

    Args:
        federation: What to remember.

    Attributes:
        downlink: The downlink's state at the start of the round.
    """

    def __init__(self, federation: RoundState) -> None:
        self._federation = federation
        self._fields = {
            "round_index": federation.round_index,
            "placement": dict(federation.placement),
            "shared": copy.deepcopy(federation.shared),
            "sampling": federation.sampling,
        }
        self._ledger = copy.copy(federation.ledger)
        self._order = federation.recency.order
        self.downlink = federation.downlink.state_dict()
        self._clients: dict[int, _Kept | _Lost | None] = {}
        self._kept_bytes = 0

    def remember(self, client_id: int, state: dict[str, Any] | None) -> None:
        """Remember a client's state before it changes; None if it has none. Later calls for a client do nothing."""
        if client_id not in self._clients:
            self._clients[client_id] = None if state is None else _Kept(state)

    def settle(self, client_id: int, state: dict[str, Any]) -> None:
        """Let go of what was remembered of a client if it takes too much memory beside its new state."""
        kept = self._clients.get(client_id)
        # A shared objective's states belong together: one client's cannot be let go of alone.
        if isinstance(kept, _Kept) and self._federation.objective is None:
            self._kept_bytes += (size := kept.bytes_beside(state))
            if self._kept_bytes > _MAX_KEPT_BYTES:
                self._kept_bytes -= size
                self._clients[client_id] = _Lost(kept.personal)

    def before(self, clients: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the clients' states as of the round's start, without those that are lost."""
        for client_id, state in clients.items():
            if client_id not in self._clients:
                yield client_id, state
        for client_id, kept in self._clients.items():
            if (state := _state_of(kept)) is not None:
                yield client_id, state

    @property
    def personal(self) -> dict[int, dict[str, Any] | None]:
        """Of the clients whose state may have changed the personal parameters as of the round's start, as a state."""
        return {client_id: _personal_of(kept) for client_id, kept in self._clients.items()}

    def restore(self) -> int:
        """Put everything back; return the number of clients whose state is lost."""
        federation = self._federation
        federation.server.undo()
        federation.buffers.undo()
        if federation.objective is not None:
            federation.objective.undo()
        federation.downlink.load_state_dict(self.downlink)
        for name, value in self._fields.items():
            setattr(federation, name, value)
        for name, value in vars(self._ledger).items():
            setattr(federation.ledger, name, value)
        federation.recency.undo(self._order)
        lost = 0
        for client_id, kept in self._clients.items():
            if (state := _state_of(kept)) is not None:
                federation.clients[client_id] = state
            else:
                federation.clients.pop(client_id, None)
            lost += kept is not None and not (isinstance(kept, _Kept) and kept.is_whole)
        return lost


def _state_of(kept: _Kept | _Lost | None) -> dict[str, Any] | None:
    """Return what there is of a client's old state: all, its personal parameters alone, or nothing."""
    if isinstance(kept, _Kept) and kept.is_whole:
        return kept.state()
    return _personal_of(kept)


def _personal_of(kept: _Kept | _Lost | None) -> dict[str, Any] | None:
    return None if kept is None or kept.personal is None else {"personal": dict(kept.personal)}


def _copy_containers(value: Any) -> Any:
    """Copy a dict or a list, and those in it at any depth; all else is shared."""
    copied = value.copy()
    for key, item in enumerate(value) if type(value) is list else value.items():
        if type(item) in _CONTAINERS:
            copied[key] = _copy_containers(item)
    return copied


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a dict or a list, at any depth."""
    found: list[Tensor] = []
    containers = [value]
    for container in containers:  # which grows meanwhile
        for item in container if type(container) is list else container.values():
            kind = type(item)
            if kind in _CONTAINERS:
                containers.append(item)
            elif kind is Tensor:
                found.append(item)
    return found


_CONTAINERS = frozenset((dict, list))
