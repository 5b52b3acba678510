"""Round context of both ends: the round's index, its randomness and what the server told all clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.core.rng import derive_seed

__all__ = ["NO_CONTEXT", "Context", "Decision", "RoundResult", "State"]

State = dict[str, Any]
"""What one end keeps for one client at one stage: built-ins and tensors only, so that checkpoints load safely."""


@dataclass(frozen=True)
class Decision:
    """What the look-back tests of one client decided in one round, one entry a test.

    Attributes:
        recycled: Whether the coefficients were sent instead of the update.
        errors: LBP error, the squared sine of the angle to the look-back gradients, in [0, 1]; 1 if there is none.
        coefficients: LBC (rho) if recycled (with ``rank`` above 1 that of the newest look-back gradient), NaN if
            refreshed.
        threshold: What the errors were compared with; None if no test decides.
        outcome: What became of the update, in a word for tables, such as ``"recycled"``.
        metrics: Numbers for the client's report, by name.
    """

    recycled: tuple[bool, ...]
    errors: tuple[float, ...]
    coefficients: tuple[float, ...]
    threshold: float | None = None
    outcome: str = "sent"
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """A client's round, as a stage sees it.

    Attributes:
        round_index: The round, from 0.
        shared: What the stage keeps for all clients, as of the round's start; read only here.
        seed: The run's seed. None: randomness comes from torch's global generator.
        path: Tells apart what draws from one seed: the client, and the stage's place.
    """

    round_index: int = 0
    shared: State = field(default_factory=dict)
    seed: int | None = None
    path: tuple[int, ...] = ()

    def child(self, position: int, shared: State) -> Context:
        """Return the context of a stage within a stage."""
        return Context(self.round_index, shared, self.seed, (*self.path, position))

    def draw_seed(self) -> int:
        """Return a seed in ``[0, 2**63)``: the same for the same run, round and path, another one each time without."""
        if self.seed is None:
            return int(torch.randint(2**63 - 1, ()))
        return derive_seed(self.seed, "uplink", self.round_index, *self.path)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a generator on a device, seeded by ``draw_seed``: one for all that a stage draws in a round."""
        return torch.Generator(device).manual_seed(self.draw_seed())


NO_CONTEXT = Context()
"""Round 0, nothing shared, randomness from torch's global generator."""


@dataclass(frozen=True)
class RoundResult:
    """What the server knows at the end of a round.

    Attributes:
        layout: The parameter tensors.
        server_params: The global parameters of the round, before the server's step, shape ``(M,)``.
        mean_update: The weighted mean of the decoded updates, shape ``(M,)``.
        uplink_bits: Bits that each client sent.
        dense_bits: Bits that FedAvg would have sent for each.
        decisions: Each client's look-back tests; None if none was made.
    """

    layout: Layout
    server_params: Tensor
    mean_update: Tensor
    uplink_bits: tuple[int, ...]
    dense_bits: tuple[int, ...]
    decisions: tuple[Decision | None, ...]
