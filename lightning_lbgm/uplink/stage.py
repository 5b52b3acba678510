"""The contract of an uplink stage, and the chain of stages."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lbgm.uplink.payload import Payload

__all__ = ["Chain", "Decision", "Encoded", "Stage", "State", "as_chain"]

State = dict[str, Any]
"""What one end keeps for one client at one stage: built-ins and tensors only, so that checkpoints load safely."""


@dataclass(frozen=True)
class Decision:
    """What the look-back tests of one client decided in one round, one entry a test.

    Attributes:
        recycled: Whether the coefficient was sent instead of the update.
        errors: LBP error, the squared sine of the angle to the look-back gradient, in [0, 1]; 1 where there is none.
        coefficients: LBC (rho) where recycled, NaN where refreshed.
    """

    recycled: tuple[bool, ...]
    errors: tuple[float, ...]
    coefficients: tuple[float, ...]


class Encoded(NamedTuple):
    """A stage's result: what to send, and what was decided on the way (None where nothing was tested)."""

    payload: Payload
    decision: Decision | None = None


class Stage(ABC):
    """One step of the uplink: encodes on the client, decodes on the server.

    A stage object holds settings only. What it remembers about a client is in a ``State`` made by ``init``,
    one at each end, and is passed in at each call; the client's is advanced by ``encode``, the server's by
    ``decode``, in place. A compressor needs ``encode`` alone, for its payload decodes itself.

    Attributes:
        terminal: Whether the stage must be the last of its chain.
    """

    terminal = False

    def init(self) -> State:
        """Make the state of a client that has sent nothing yet."""
        return {}

    @abstractmethod
    def encode(self, update: Payload, state: State) -> Encoded:
        """Encode an update on the client and advance the client's state.

        Args:
            update: What the stage before produced, or a ``Dense`` update. It is not written to.
            state: The client's state, changed in place. What it keeps is copied.
        """

    def reconstruct(self, payload: Payload, state: State) -> Payload:
        """Return what the server sees for a payload just encoded, from the client's own state, which stays as it is.

        In simulation this stands for ``decode``, so that both ends share one copy of the state.
        """
        return payload

    def decode(self, payload: Payload, state: State) -> Payload:
        """Decode a payload on the server and advance the server's state."""
        return payload

    def __repr__(self) -> str:
        """Show the constructor call."""
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({settings})"


class Chain(Stage):
    """Stages in order, each encoding what the one before produced; an empty chain sends updates as they are.

    Args:
        stages: The stages. A terminal one, such as ``LookBack``, can only stand last.

    Raises:
        TypeError: If an element is not a stage.
        ValueError: If a terminal stage is followed by another.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if isinstance(stages, str) or not isinstance(stages, Sequence):
            raise _not_a_stage(stages)
        for stage in stages:
            if not isinstance(stage, Stage):
                raise _not_a_stage(stage)
        for stage, following in itertools.pairwise(stages):
            if stage.terminal:
                raise ValueError(
                    f"{stage!r} must be the last stage of its chain, but {following!r} follows it: put {following!r}"
                    " before it."
                )
        self.stages = list(stages)
        self.terminal = any(stage.terminal for stage in self.stages)

    def init(self) -> State:
        return {"stages": [stage.init() for stage in self.stages]}

    def encode(self, update: Payload, state: State) -> Encoded:
        encoded = Encoded(update)
        for stage, stage_state in zip(self.stages, state["stages"]):
            payload, decision = stage.encode(encoded.payload, stage_state)
            encoded = Encoded(payload, decision or encoded.decision)
        return encoded

    def reconstruct(self, payload: Payload, state: State) -> Payload:
        # Payloads of the stages before the last one decode themselves.
        return self.stages[-1].reconstruct(payload, state["stages"][-1]) if self.stages else payload

    def decode(self, payload: Payload, state: State) -> Payload:
        return self.stages[-1].decode(payload, state["stages"][-1]) if self.stages else payload

    def __repr__(self) -> str:
        return repr(self.stages)


def as_chain(stages: Stage | Sequence[Stage]) -> Chain:
    """Make a chain of one stage or of several."""
    if isinstance(stages, Chain):
        return stages
    return Chain([stages] if isinstance(stages, Stage) else stages)


def _not_a_stage(value: object) -> TypeError:
    return TypeError(
        "`uplink` takes stages such as `[TopK(0.1), LookBack(0.2)]`, and `[]` for FedAvg; got"
        f" {value!r}, a {type(value).__name__}."
    )
