"""The contract of an uplink stage, and the chain of stages."""

from __future__ import annotations

import copy
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_lbgm.describe import describe
from lightning_lbgm.uplink.checks import class_hint
from lightning_lbgm.uplink.context import NO_CONTEXT, Context, Decision, RoundResult, State
from lightning_lbgm.uplink.payload import Payload

__all__ = [
    "NO_CONTEXT",
    "Chain",
    "Context",
    "Decision",
    "Encoded",
    "RoundResult",
    "Stage",
    "State",
    "as_chain",
    "inner_chain",
]


@dataclass(frozen=True)
class Encoded:
    """A stage's result. It unpacks into payload and decision.

    Attributes:
        payload: What to send.
        decision: What was decided on the way, None where nothing was tested.
        reads: Whether the payload decodes only beside what the server remembers of the client.
        writes: Whether the server is to remember something of it.
    """

    payload: Payload
    decision: Decision | None = None
    reads: bool = False
    writes: bool = False

    def __iter__(self) -> Iterator[Any]:
        """Yield payload and decision: ``payload, decision = stage.encode(update, state)``."""
        return iter((self.payload, self.decision))


class Stage(ABC):
    """One step of the uplink: encodes on the client, decodes on the server.

    A stage object holds settings only. What it remembers about a client is in a ``State`` made by ``init``,
    one at each end, and is passed in at each call; the client's is advanced by ``encode``, the server's by
    ``decode``, in place. What the server keeps for all clients together, and tells them with the global parameters, is
    in another one, made by ``init_shared`` and advanced by ``end_round``. A compressor needs ``encode`` alone, for its
    payload decodes itself.

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
            update: What the stage before produced, or a ``Dense`` update. It is not written to.
            state: The client's state, changed in place. What it keeps is copied.
            context: The round, its randomness and what is shared.
        """

    def reconstruct(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        """Return what the server sees for a payload just encoded, from the client's own state, which stays as it is.

        In simulation this stands for ``decode``, so that both ends share one copy of the state. A stage that decodes
        without a state need not implement it.

        Raises:
            TypeError: If the stage overrides ``decode`` alone, and has a state.
        """
        if not self._overrides("decode"):
            return payload
        if self.init():
            raise TypeError(
                f"{type(self).__name__} has a state and overrides `decode`: override `reconstruct` too, which returns"
                " what `decode` gives the server, from the client's state after `encode`."
            )
        return self.decode(payload, {}, context)

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
        return self._overrides("decode") or self._overrides("reconstruct")

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Stage, name)

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
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if name not in self._shown_if_set or value != parameter.default:
                shown.append(f"{name}={describe(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


class Chain(Stage):
    """Stages in order, each encoding what the one before produced; an empty chain sends updates as they are.

    They decode in reverse order: each gets what the one behind it has decoded.

    Args:
        stages: The stages. A terminal one, such as ``LookBack``, can only stand last.

    Raises:
        TypeError: If an element is not a stage.
        ValueError: If a terminal stage is followed by another, two stages name different stores or capacities, or
            ``LayerRecycling`` stands behind a stage that has to decode.
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
        for position, stage in enumerate(stages):
            before = [one for one in stages[:position] if one.decodes]
            if stage.uses_mean and before:
                raise ValueError(
                    f"{stage!r} decodes to the server's aggregated update, which {before[0]!r} before it would decode"
                    " once more: leave one of them out."
                )
        self.stages = list(stages)
        self.terminal = any(stage.terminal for stage in self.stages)
        self.uses_mean = any(stage.uses_mean for stage in self.stages)
        # A client's state is one, of all stages together.
        inside = [stage for part in self.stages for stage in part.stages_inside()]
        self.store = _only("store", [stage.store for stage in inside if stage.store != "memory"], "memory")
        capacities = [stage.capacity for stage in inside if stage.capacity is not None]
        self.capacity = _only("capacity", capacities, None)

    def without_store(self) -> Chain:
        """Return a copy that keeps clients' states in memory, to compare: where they lie changes no result."""
        copied = copy.deepcopy(self)
        for stage in copied.stages_inside():
            stage.store = "memory"
        return copied

    def init(self) -> State:
        return {"stages": [stage.init() for stage in self.stages]}

    def init_shared(self) -> State:
        return {"stages": [stage.init_shared() for stage in self.stages]}

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        encoded = Encoded(update)
        for position, (stage, stage_state) in enumerate(zip(self.stages, state["stages"])):
            step = stage.encode(encoded.payload, stage_state, self._child(context, position))
            encoded = Encoded(
                step.payload,
                encoded.decision if step.decision is None else step.decision,
                reads=encoded.reads or step.reads,
                writes=encoded.writes or step.writes,
            )
        return encoded

    def reconstruct(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        for position in reversed(range(len(self.stages))):
            stage, stage_state = self.stages[position], state["stages"][position]
            payload = stage.reconstruct(payload, stage_state, self._child(context, position))
        return payload

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        for position in reversed(range(len(self.stages))):
            stage, stage_state = self.stages[position], state["stages"][position]
            payload = stage.decode(payload, stage_state, self._child(context, position))
        return payload

    @property
    def decodes(self) -> bool:
        return any(stage.decodes for stage in self.stages)

    def forget(self, state: State) -> None:
        for stage, stage_state in zip(self.stages, state["stages"]):
            stage.forget(stage_state)

    def end_round(self, shared: State, result: RoundResult, context: Context = NO_CONTEXT) -> None:
        for position, (stage, stage_shared) in enumerate(zip(self.stages, shared["stages"])):
            stage.end_round(stage_shared, result, context.child(position, stage_shared))

    @staticmethod
    def _child(context: Context, position: int) -> Context:
        return context.child(position, context.shared["stages"][position] if context.shared else {})

    def __repr__(self) -> str:
        return repr(self.stages)


def _only(name: str, values: list[Any], default: Any) -> Any:
    """Return the one value that a chain's stages name."""
    if len(set(values)) > 1:
        raise ValueError(
            f"The stages of one uplink name different values of `{name}`: {', '.join(map(repr, values))}. Each client"
            " has one state, of all stages together: name the same in each, or in one alone."
        )
    return values[0] if values else default


def as_chain(stages: Stage | Sequence[Stage]) -> Chain:
    """Make a chain of one stage or of several."""
    if isinstance(stages, Chain):
        return stages
    return Chain([stages] if isinstance(stages, Stage) else stages)


def inner_chain(owner: str, name: str, stages: Stage | Sequence[Stage], *, whole: bool = False) -> Chain:
    """Make the chain that a stage wraps.

    Args:
        owner: The stage, for errors.
        name: Its argument.
        stages: What was given.
        whole: Whether the chain decodes to the whole update, so that a stage may put in what the server has aggregated.

    Raises:
        TypeError: If it is not a stage or a list of stages.
        ValueError: If it has such a stage and is for a part.
    """
    if not isinstance(stages, (Stage, Sequence)) or isinstance(stages, str) or not stages:
        raise TypeError(
            f"`{owner}({name}=...)` takes a stage or a list of stages; got {stages!r}.{class_hint(stages, Stage)}"
        )
    chain = as_chain(stages)
    if chain.uses_mean and not whole:
        raise ValueError(
            f"`{owner}({name}={chain!r})` gets a part of the update, for which `LayerRecycling` would put in the whole"
            " one of the last round: leave one of them out."
        )
    return chain


def _not_a_stage(value: object) -> TypeError:
    return TypeError(
        "`uplink` takes stages such as `[TopK(0.1), LookBack(0.2)]`, and `[]` for FedAvg; got"
        f" {value!r}, a {type(value).__name__}.{class_hint(value, Stage)}"
    )
