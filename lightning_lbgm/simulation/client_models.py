"""Models of clients, put into the module for a while: the one place that knows what client k's model consists of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from lightning_lbgm.clients.base import ClientUpdate, RoundStart
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.server import Server

__all__ = ["client_model", "global_model", "local_model"]


class HasModels(Protocol):
    """What is asked of a federation.

    Attributes:
        flat: The trainable parameters.
        buffers: The module's buffers.
        server: Has the global parameters.
        in_round: Whether clients are being trained, so that the module holds some client's parameters.
    """

    flat: FlatParameters
    buffers: Buffers
    server: Server
    in_round: bool

    def own_values(self, client_id: int) -> dict[str, Tensor] | None:
        """Return what a client keeps for itself, by name; None if there is nothing."""


@contextmanager
def global_model(federation: HasModels) -> Iterator[None]:
    """Put the global parameters and the server's buffers into the module for a while, if a client trains on it now."""
    if not federation.in_round:
        yield
        return
    with _given_back(federation):
        federation.flat.write(federation.server.server_params)
        federation.buffers.load()
        yield


@contextmanager
def client_model(federation: HasModels, client_id: int) -> Iterator[None]:
    """Put the global model as a client uses it into the module for a while: with what the client keeps for itself.

    That is its own buffers with ``buffers="client"``, and what is personal. This rank must hold the client's state, if
    it has one. What is done to the module meanwhile, such as further training, is undone.
    """
    own = federation.own_values(client_id)
    with global_model(federation), _given_back(federation):
        if own:
            # After a fit the module may be on another device than what clients keep.
            held = federation.buffers.read()
            own = {name: value.to(held[name].device) if name in held else value for name, value in own.items()}
            federation.buffers.load(own)
        yield


@contextmanager
def local_model(federation: HasModels, start: RoundStart, update: ClientUpdate) -> Iterator[None]:
    """Put a client's local model at the end of its turn into the module for a while.

    Args:
        federation: The federation.
        start: What the client started from.
        update: What its training came to, still valid.
    """
    own = {**(start.own_buffers(update.client_id) or {}), **update.buffers}
    with _given_back(federation):
        federation.flat.write(start.params - update.update)
        federation.buffers.load(own)
        yield


@contextmanager
def _given_back(federation: HasModels) -> Iterator[None]:
    """Give the module's parameters and buffers back as they were."""
    parameters, buffers = federation.flat.read(), federation.buffers.read()
    try:
        yield
    finally:
        federation.flat.write(parameters)
        federation.buffers.load(buffers)
