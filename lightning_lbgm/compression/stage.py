"""Stage: the contract of one step that encodes an update and decodes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from lightning_lbgm.compression.context import NO_CONTEXT, Context, Decision, RoundResult, State
from lightning_lbgm.core.describe import describe_call
from lightning_lbgm.payloads.base import Payload

__all__ = ["NO_CONTEXT", "Context", "Decision", "Encoded", "RoundResult", "Stage", "State"]


@dataclass(frozen=True)
class Encoded:
    """A stage's result. It unpacks into payload and decision.

    Attributes:
        payload: What to send.
        decision: What was decided on the way; None if nothing was tested.
        decode: What the stage's ``decode`` will return on the server, as a function of the payload: this one, or if
            stages follow in the chain what they have decoded. It holds whatever it needs of the client's state, so that
            it stays valid when that advances. None: the payload decodes itself, or ``decode`` needs no state.
        needs_state: Whether the payload decodes only with what the server remembers of the client.
        updates_state: Whether the server is to remember something of the payload.
    """

    payload: Payload
    decision: Decision | None = None
    decode: Callable[[Payload], Payload] | None = None
    needs_state: bool = False
    updates_state: bool = False

    @cached_property
    def decoded(self) -> Payload:
        """What the server sees: the decoded payload."""
        return self.payload if self.decode is None else self.decode(self.payload)

    def shares_memory(self, values: Tensor) -> bool:
        """Whether a tensor of what is sent, or of what the server sees, lies in the memory of ``values``."""
        memory = values.untyped_storage().data_ptr()
        sent = {self.payload, self.decoded}
        return any(tensor.untyped_storage().data_ptr() == memory for one in sent for tensor in one.tensors())

    def __iter__(self) -> Iterator[Any]:
        """Yield payload and decision: ``payload, decision = stage.encode(update, state)``."""
        return iter((self.payload, self.decision))


class Stage(ABC):
    """One step of the uplink: encodes on the client, decodes on the server.

    A stage object holds settings only. What it remembers about a client is in a ``State`` made by ``init``,
    one at each end, and is passed in at each call; the client's is advanced by ``encode``, the server's by
    ``decode``, in place. What the server keeps for all clients together, and tells them with the global parameters, is
    in another one, made by ``init_shared`` and advanced by ``end_round``.

    A compressor whose payload decodes itself needs ``encode`` alone, and a stage that decodes without a state also
    ``decode``. A stage that decodes with a state tells the client what the server will see as well, by
    ``Encoded(payload, decode=...)``: in simulation both ends share the client's state.

    Attributes:
        terminal: Whether the stage must be the last of its chain.
        uses_mean: Whether it decodes to what the server has aggregated; then no stage before it may have to decode.
        store: Where the clients' states are to be kept: ``"memory"``, or a directory.
        capacity: How many clients' states both ends are to remember; None: all.
    """

    terminal = False
    uses_mean = False
    store = "memory"
    capacity: int | None = None
    _shown_if_set: ClassVar[tuple[str, ...]] = ()  # arguments that the representation leaves out at their default

    def init(self) -> State:
        """Make the state of a client that has sent nothing yet."""
        return {}

    def init_shared(self) -> State:
        """Make the state that concerns all clients, before the first round."""
        return {}

    @abstractmethod
    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        """Encode an update on the client and advance the client's state.

        Args:
            update: What the stage before produced, or a ``Dense`` update. It is not written to. Its numbers may change
                after the call, except those in tensors of the payload or of what it decodes to.
            state: The client's state, changed in place. What it keeps is copied.
            context: The round, its randomness and what is shared.
        """

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        """Decode what the stage has encoded, on the server, and advance the server's state.

        Args:
            payload: The stage's own payload; if stages follow in the chain, as they have decoded it.
            state: The server's state of the client.
            context: The round.
        """
        return payload

    @property
    def decodes(self) -> bool:
        """Whether ``decode`` has to make an update of its payload, which decodes itself to something else."""
        return type(self).decode is not Stage.decode

    def forget(self, state: State) -> None:  # noqa: B027 (most have nothing to forget)
        """Drop, on the client, what the server is to remember too: the next update needs none of it."""

    def end_round(  # noqa: B027 (most keep nothing for all clients)
        self, shared: State, result: RoundResult, context: Context = NO_CONTEXT
    ) -> None:
        """Advance, on the server, the state that concerns all clients, in place."""

    def stages_inside(self) -> Iterator[Stage]:
        """Yield the stage and all that it is made of."""
        yield self
        for value in vars(self).values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Stage):
                    yield from item.stages_inside()

    def __repr__(self) -> str:
        """Show the constructor call."""
        return describe_call(self, self._shown_if_set)
