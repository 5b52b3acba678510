"""The turn of a client, or of a chunk of clients, with a local objective: its gradients and its state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients.base import RoundStart
from lightning_lbgm.clients.objectives import LocalObjective, ObjectiveState, SharedObjective
from lightning_lbgm.clients.vmap.guards import CannotVectorize
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.core.nested import map_leaves

__all__ = [
    "ObjectiveTurn",
    "check_stacked",
    "copy_state",
    "kind_of",
    "stack_states",
    "stack_turns",
    "start_tensors",
    "state_at",
    "state_of",
    "turn_of",
    "values_of",
]

_PLAIN = (bool, int, float, str, type(None))


class ObjectiveTurn:
    """Apply a local objective to the gradients of the parameters that a client, or a chunk of clients, trains.

    Args:
        objective: The objective.
        parameters: The trainable parameters, each of shape ``(*shape)``, or ``(C, *shape)`` for a chunk.
        optimizer: The optimizer that steps them.
    """

    def __init__(self, objective: LocalObjective, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        self.objective = objective
        self._parameters = list(parameters)
        self._groups = optimizer.param_groups
        self._rates: list[float] | None = None  # summed over the local steps, by group
        self._start: list[Tensor] = []
        self._state: ObjectiveState = {}

    def begin(self, start: list[Tensor], state: ObjectiveState) -> None:
        """Begin a turn.

        Args:
            start: The parameters that it starts from, each of shape ``(*shape)``.
            state: What ``correct`` works with: the clients' state, which is the objective's to change.
        """
        self._start, self._state = start, state
        if isinstance(self.objective, SharedObjective):
            self._rates = [0.0] * len(self._groups)

    def correct(self, scale: float | None = None) -> None:
        """Correct the parameters' ``grad``, after a backward pass.

        Args:
            scale: What mixed precision has multiplied the gradients by. If they have overflowed they stay as they are,
                because the step will be skipped. None: nothing.
        """
        enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # the function: the context manager takes half as long as a small correction
        try:
            self._correct(scale)
        finally:
            torch.set_grad_enabled(enabled)

    def _correct(self, scale: float | None) -> None:
        gradients = _own_gradients(self._parameters)
        if scale is not None:
            torch._foreach_mul_(gradients, 1 / scale)
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                torch._foreach_mul_(gradients, scale)
                return
        # A list of its own: an item that is replaced counts as one that is changed in place.
        corrected = list(gradients)
        if (returned := self.objective.correct(corrected, self._parameters, self._start, self._state)) is not None:
            raise TypeError(
                f"`{type(self.objective).__name__}.correct` must change the gradients in place and return None, as"
                f" with `torch._foreach_add_`; it returned a {type(returned).__name__}."
            )
        if scale is not None:
            torch._foreach_mul_(corrected, scale)
        for parameter, gradient, before in zip(self._parameters, corrected, gradients):
            if gradient is not before:
                parameter.grad = gradient
        if self._rates is not None:
            for number, group in enumerate(self._groups):
                self._rates[number] += float(group["lr"])

    @torch.no_grad()
    def end(self, num_steps: int) -> ObjectiveState | None:
        """End the turn; return the state after it, or None if there is none.

        Args:
            num_steps: Local steps that have changed the parameters; if there was none, the objective is not asked.
        """
        state, self._state = self._state, {}
        if self._rates is not None:
            return None  # its state follows from the decoded update
        if num_steps:
            self.objective.end_turn(self._parameters, self._start, state, num_steps)
        return state or None

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """For each parameter the sum of the learning rates of the steps that were corrected since ``begin``.

        Steps that mixed precision skips are none. It is empty if the server has no part in the objective.
        """
        if self._rates is None:
            return ()
        rates = {id(p): rate for group, rate in zip(self._groups, self._rates) for p in group["params"]}
        return tuple(rates.get(id(parameter), 0.0) for parameter in self._parameters)


def _own_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return each parameter's gradient, made safe to be written to.

    A parameter that the loss does not reach gets zeros. Autograd may give two parameters one tensor, or an expanded one
    whose entries share memory: these are copied.
    """
    gradients: list[Tensor] = []
    seen: set[int] = set()
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            parameter.grad = gradient = torch.zeros_like(parameter)
        elif gradient.layout is not torch.strided:
            raise RuntimeError(
                f"A local objective needs dense gradients, but a parameter of shape {tuple(parameter.shape)} has one in"
                f" the layout {gradient.layout}: use `nn.Embedding(sparse=False)`, or no `objective`."
            )
        else:
            memory = gradient.untyped_storage().data_ptr()
            if memory in seen or 0 in gradient.stride():
                parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
            seen.add(memory)
        gradients.append(gradient)
    return gradients


def start_tensors(flat: FlatParameters, start_params: Tensor) -> list[Tensor]:
    """Return global parameters, shape ``(M,)``, in the shapes and dtypes of the module's, not copied if they agree."""
    return [view.to(parameter.dtype) for view, parameter in zip(flat.views(start_params), flat.parameters)]


def copy_state(state: Any) -> Any:
    """Copy a state: its containers and its tensors.

    Raises:
        TypeError: If it has anything else than tensors, numbers, strings, dicts and lists.
    """
    return map_leaves(state, _copy_leaf)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if isinstance(leaf, _PLAIN):
        return leaf
    raise _no_state(leaf)


def _no_state(value: Any) -> TypeError:
    return TypeError(
        "The state of a local objective must be made of tensors, numbers, strings, dicts and lists, so that"
        f" checkpoints can hold it; got a {type(value).__name__}."
    )


def turn_of(
    objective: LocalObjective, flat: FlatParameters, start: RoundStart, client_id: int
) -> tuple[list[Tensor], ObjectiveState]:
    """Return what a client's turn begins with: the parameters that it starts from, and what ``correct`` works with."""
    tensors, known = start_tensors(flat, start.params), start.objective_state(client_id)
    if not isinstance(objective, SharedObjective):
        return tensors, state_of(objective, tensors, known)
    vectors = objective.begin_turn(start.params, known or {}, start.shared_objective)
    return tensors, {name: _cut(flat, vector) for name, vector in vectors.items()}


def _cut(flat: FlatParameters, vector: Tensor) -> list[Tensor]:
    """Cut a client's vector into the parameters' shapes and dtypes, past the views that ``flat`` keeps."""
    return [part.view(p.shape).to(p.dtype) for part, p in zip(vector.split(flat.sizes), flat.parameters)]


def state_of(objective: LocalObjective, start: list[Tensor], known: ObjectiveState | None) -> ObjectiveState:
    """Return the state that a client begins its turn with, its own to change.

    Args:
        objective: The objective.
        start: The parameters that the client starts from.
        known: What it has kept; None if it has no state yet.
    """
    copied: ObjectiveState = copy_state(objective.init(start) if known is None else known)
    return copied


def kind_of(state: Any) -> Any:
    """Return what two clients' states must agree in to be stacked: structure, shapes, dtypes and plain values."""
    if isinstance(state, dict):
        return tuple((key, kind_of(item)) for key, item in state.items())
    if isinstance(state, list):
        return (list, *map(kind_of, state))
    return (state.shape, state.dtype) if isinstance(state, Tensor) else (type(state), state)


def stack_states(states: Sequence[Any]) -> Any:
    """Stack the states of C clients that agree in ``kind_of``: each tensor gets a leading dimension C."""
    first = states[0]
    if isinstance(first, dict):
        return {key: stack_states([state[key] for state in states]) for key in first}
    if isinstance(first, list):
        return [stack_states(items) for items in zip(*states)]
    return torch.stack(list(states)) if isinstance(first, Tensor) else first


def stack_turns(turns: Sequence[ObjectiveState], parameters: Sequence[Tensor]) -> ObjectiveState:
    """Stack what C clients' ``turn_of`` a ``SharedObjective`` has, in the memory layout of the stacked parameters."""
    stacked: ObjectiveState = {}
    for name in turns[0]:
        stacked[name] = tensors = [torch.empty_like(parameter.detach()) for parameter in parameters]
        for position, turn in enumerate(turns):
            for tensor, part in zip(tensors, turn[name]):
                tensor[position].copy_(part)
    return stacked


def state_at(state: Any, position: int) -> Any:
    """Return a copy of one client's part of a stacked state."""
    return map_leaves(state, lambda leaf: leaf[position].detach().clone() if isinstance(leaf, Tensor) else leaf)


def check_stacked(state: Any, num_clients: int) -> None:
    """Check that a stacked state can be taken apart again.

    Raises:
        CannotVectorize: If a tensor has no leading dimension C.
        TypeError: If it has anything else than tensors, numbers, strings, dicts and lists.
    """
    for path, value in values_of(state):
        if not isinstance(value, (Tensor, *_PLAIN)):
            raise _no_state(value)
        if isinstance(value, Tensor) and value.shape[:1] != (num_clients,):
            raise CannotVectorize(
                f"the local objective keeps a tensor {path!r} of the shape {tuple(value.shape)}, without a leading"
                f" dimension for {num_clients} clients"
            )


def values_of(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each tensor and plain value of a state with the way to it, such as ``"control.0"``."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        yield path, state
        return
    for key, item in items:
        yield from values_of(item, f"{path}.{key}" if path else str(key))
