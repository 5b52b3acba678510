"""Chain of stages that encode one after the other and decode in reverse order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Encoded, RoundResult, Stage, State
from lightning_lbgm.core.validation import class_hint
from lightning_lbgm.payloads.base import Payload

__all__ = ["Chain", "as_chain", "inner_chain"]


class Chain(Stage):
    """Stages in order, each encoding what the one before produced; an empty chain sends updates as they are.

    They decode in reverse order: each gets what the one behind it has decoded.

    Args:
        stages: The stages. A terminal one, such as ``LookBack``, can only stand last.
        setting: The argument of the strategy that they are for, for errors.

    Raises:
        TypeError: If an element is not a stage.
        ValueError: If a terminal stage is followed by another, two stages name different stores or capacities, or
            ``LayerRecycling`` stands behind a stage that has to decode.
    """

    def __init__(self, stages: Sequence[Stage], setting: str = "uplink") -> None:
        if isinstance(stages, str) or not isinstance(stages, Sequence):
            raise _not_a_stage(setting, stages)
        for stage in stages:
            if not isinstance(stage, Stage):
                raise _not_a_stage(setting, stage)
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
        payload, decision, needs_state, updates_state = update, None, False, False
        decoders: list[Callable[[Payload], Payload]] = []
        for position, (stage, stage_state) in enumerate(zip(self.stages, state["stages"])):
            child = self._child(context, position)
            step = stage.encode(payload, stage_state, child)
            payload = step.payload
            decision = decision if step.decision is None else step.decision
            needs_state = needs_state or step.needs_state
            updates_state = updates_state or step.updates_state
            if (decoder := _decoder(stage, step, child)) is not None:
                decoders.append(decoder)
        return Encoded(payload, decision, _in_reverse(decoders), needs_state, updates_state)

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


def _decoder(stage: Stage, step: Encoded, context: Context) -> Callable[[Payload], Payload] | None:
    """Return what a stage's ``decode`` will do on the server; None if it does nothing."""
    if step.decode is None and not stage.decodes:
        return None
    name = type(stage).__name__
    if not stage.decodes:
        raise TypeError(
            f"{name} returns `Encoded(decode=...)` but does not override `decode`, so that the server would see"
            " something else than the client: override `decode` too."
        )
    if step.decode is None and stage.init():
        raise TypeError(
            f"{name} has a state and overrides `decode`, but its `encode` does not say what the server will see: return"
            " `Encoded(payload, decode=function)`, a function of the payload that gives what `decode` gives the server."
        )
    return step.decode or (lambda payload: stage.decode(payload, {}, context))


def _in_reverse(decoders: list[Callable[[Payload], Payload]]) -> Callable[[Payload], Payload] | None:
    """Compose the decoders of a chain's stages: the last one decodes first."""
    if len(decoders) < 2:
        return decoders[0] if decoders else None

    def decode(payload: Payload) -> Payload:
        for decoder in reversed(decoders):
            payload = decoder(payload)
        return payload

    return decode


def _only(name: str, values: list[Any], default: Any) -> Any:
    """Return the one value that a chain's stages name."""
    if len(set(values)) > 1:
        raise ValueError(
            f"The stages of one uplink name different values of `{name}`: {', '.join(map(repr, values))}. Each client"
            " has one state, of all stages together: name the same in each, or in one alone."
        )
    return values[0] if values else default


def as_chain(stages: Stage | Sequence[Stage], setting: str = "uplink") -> Chain:
    """Make a chain of one stage or of several, for an argument of the strategy that errors name."""
    if isinstance(stages, Chain):
        return stages
    return Chain([stages] if isinstance(stages, Stage) else stages, setting)


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


def _not_a_stage(setting: str, value: object) -> TypeError:
    return TypeError(
        f"`{setting}` takes stages such as `[TopK(0.1), LookBack(0.2)]`, and `[]` for FedAvg; got"
        f" {value!r}, a {type(value).__name__}.{class_hint(value, Stage)}"
    )
