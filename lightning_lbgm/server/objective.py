"""The server's part of a local objective: its state, and what it learns from a round's updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.clients.objectives import ObjectiveState, SharedObjective
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.server.aggregation import Ranks

__all__ = ["ServerObjective"]


class ServerObjective:
    """Keep the server's state of a ``SharedObjective``, round by round.

    Args:
        objective: The objective.
        num_clients: All clients of the federation.
        params: The global parameters, shape ``(M,)``.

    Attributes:
        state: The server's; replaced in ``finish``, never changed in place.
    """

    def __init__(self, objective: SharedObjective, num_clients: int, params: Tensor) -> None:
        self.objective = objective
        self.state = objective.init_shared(params)
        self._num_clients = num_clients
        self._before: ObjectiveState | None = None  # the state before the last round, to take it back
        self._totals = objective.init_totals(self.state)

    @property
    def num_bits(self) -> int:
        """Bits of what each client of a cohort is sent besides the model."""
        return sum(8 * tensor.nbytes for tensor in self.objective.sent_down(self.state))

    def begin_round(self) -> None:
        """Start a round."""
        self._before = None
        self._totals = self.objective.init_totals(self.state)

    @torch.no_grad()
    def receive(self, kept: ObjectiveState | None, update: Payload, step_sizes: Sequence[float]) -> ObjectiveState:
        """Let both ends learn from a client's decoded update; return what the client keeps, empty if nothing.

        Args:
            kept: What the client kept before; None if nothing.
            update: The update.
            step_sizes: See ``SharedObjective.learn``.
        """
        self.objective.receive(self._totals, self.state, update, step_sizes)
        return self.objective.learn(kept or {}, self.state, update, step_sizes)

    def merge(self, ranks: Ranks) -> None:
        """Put together what several processes have received."""
        for name in sorted(self._totals):
            ranks.all_reduce_sum(self._totals[name])

    @torch.no_grad()
    def finish(self, mean_update: Tensor) -> None:
        """End a round in which something was received; ``mean_update`` may be changed in place."""
        self._before = self.state
        self.state = self.objective.finish(self.state, self._totals, mean_update, self._num_clients)

    def undo(self) -> None:
        """Take the round back."""
        if self._before is not None:
            self.state, self._before = self._before, None

    def state_dict(self) -> dict[str, Any]:
        """Return the state, shared, not copied."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.state, self._before = state, None
