"""Chunk of clients trained at once: their parameters are stacked, and ``torch.func.vmap`` runs the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lbgm.clients.base import ClientUpdate, TurnBuffers
from lightning_lbgm.clients.local import copy_hyperparameter
from lightning_lbgm.clients.log import ChunkLog
from lightning_lbgm.clients.objective_turn import (
    ObjectiveTurn,
    check_stacked,
    stack_states,
    stack_turns,
    state_at,
)
from lightning_lbgm.clients.objectives import ObjectiveState, SharedObjective
from lightning_lbgm.clients.personal import Alternation, gradient_correction
from lightning_lbgm.clients.vmap.batching import SplitBatch
from lightning_lbgm.clients.vmap.chunk_parts import ChunkResult, ChunkStep
from lightning_lbgm.clients.vmap.guards import CannotVectorize, no_metric_updates
from lightning_lbgm.clients.vmap.step_module import StepModule
from lightning_lbgm.core.flat import FlatParameters

__all__ = ["ELEMENTWISE_OPTIMIZERS", "ChunkTrainer"]

ELEMENTWISE_OPTIMIZERS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
)
"""Optimizers that treat every number alike, so that stacked clients are stepped as they would be one by one."""

_PREFIX = "module."
_MAX_CACHED_CHUNK_SIZES = 2  # whole chunks, and the last one of a cohort


class ChunkTrainer:
    """Make the local steps of C clients at once.

    Each parameter becomes a leaf of shape ``(C, *shape)``. The step is vmapped over its first dimension, and one
    backward pass through the sum of the losses gives every client its own gradient, since a client's loss depends on
    its own slice alone. That needs no gradient transform inside the vmap, and so less overhead.

    Args:
        module: The module; its own parameters and buffers are read, not written, unless the step does so.
        flat: Its shared parameters.
        buffers: Its other tensors, its personal parameters among them.
        update: The vector that a client's update is written to, shape ``(M,)``.
    """

    def __init__(self, module: nn.Module, flat: FlatParameters, buffers: TurnBuffers, update: Tensor) -> None:
        self.module = module
        self._flat = flat
        self._buffers = buffers
        self._call = StepModule(module)
        self._vmapped = {
            alike: torch.func.vmap(self._functional, randomness="same" if alike else "different")
            for alike in (False, True)
        }
        self._personal = buffers.personal()
        self._trained = [*flat.parameters, *self._personal.values()]
        self._names = [_PREFIX + name for name in (*flat.names, *self._personal)]
        self._buffer_names = [_PREFIX + name for name, _ in module.named_buffers()]
        self._update = update
        self._params: dict[int, list[Tensor]] = {}
        # Linear layers make the gradients of stacked weights transposed; weights of the same memory layout save a
        # transposition a step. It is fixed beforehand, because it shows in the rounding.
        linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
        self._orders = [(0, 2, 1) if id(parameter) in linear else None for parameter in self._trained]
        self._positions = {id(parameter): i for i, parameter in enumerate(self._trained)}

    def train(
        self,
        step: ChunkStep,
        batches: Iterable[SplitBatch],
        own_buffers: Sequence[dict[str, Tensor] | None],
        start_params: Tensor,
        argument_names: Sequence[str],
        check: bool = False,
        draw_alike: bool = False,
        states: Sequence[ObjectiveState] = (),
    ) -> ChunkResult:
        """Train a chunk from the global parameters with a fresh optimizer.

        Args:
            step: The local step.
            batches: The stacked batch of each local step.
            own_buffers: For each client what it has kept for itself, or None.
            start_params: Global parameters, shape ``(M,)``.
            argument_names: The arguments of ``self.log`` after name and value, in order.
            check: Whether to look for gradients that reach the module's own parameters.
            draw_alike: Whether all clients see the same random numbers, those that each would see alone.
            states: For each client the state of its local objective, which is not changed; not used without one.

        Raises:
            CannotVectorize: If the step does what cannot be vmapped. Other errors of the step are raised as they come.
        """
        with no_metric_updates(self.module):
            params = self._load(start_params, own_buffers)
            optimizer = self._make_optimizer(step, params)
            shared, personal = params[: len(self._flat.parameters)], params[len(self._flat.parameters) :]
            objective = None if step.objective is None else ObjectiveTurn(step.objective, shared, optimizer)
            if objective is not None:
                # Copies in the memory layout of the stacked parameters: others would be transposed at every step.
                shares = isinstance(step.objective, SharedObjective)
                turns = stack_turns(states, shared) if shares else stack_states(states)
                objective.begin([stacked[0].detach().clone() for stacked in shared], turns)
            alternation = Alternation(step.personal_steps, shared, personal) if step.personal_steps else None
            correct = gradient_correction(objective, alternation)
            own = dict(zip(self._personal, personal))
            result = ChunkResult(shared, own, self._stack_buffers(own_buffers), ChunkLog(len(own_buffers)))
            self._call.argument_names = argument_names
            for index, batch in enumerate(batches):
                tensors = batch.tensors if step.transfer is None else step.transfer(batch.tensors)
                self._call.begin(step.loss, batch, index)
                vmapped = self._vmapped[draw_alike]
                losses, logged, new_buffers = vmapped(params, list(result.buffers.values()), tensors)
                if len(new_buffers) != len(result.buffers):
                    raise CannotVectorize("`training_step` registers or removes a buffer")
                result.log.take(self._call.calls, logged, batch.size)
                result.buffers = {name: buffer.detach() for name, buffer in zip(result.buffers, new_buffers)}
                if losses:
                    self._differentiate(losses[0].sum(), params, check and index == 0)
                    if correct is not None:
                        correct(index, None)
                    if step.clip_value:
                        _clip(params, step.clip_value, step.clip_algorithm)
                    optimizer.step()
                result.local.add(losses[0] if losses else None, batch.size)
            if objective is not None:
                num_steps = result.local.num_steps
                result.objective = objective.end(
                    num_steps if alternation is None else alternation.num_shared(num_steps)
                )
                check_stacked(result.objective, len(own_buffers))
                result.step_sizes = objective.step_sizes
        return result

    @torch.no_grad()
    def update_of(self, result: ChunkResult, position: int, client_id: int, start_params: Tensor) -> ClientUpdate:
        """Return the update of the client at ``position`` of a chunk, in a vector that the next call reuses."""
        views = self._flat.views(self._update)
        for server, stacked, view in zip(self._flat.views(start_params), result.params, views):
            view.copy_(stacked[position])  # faster at transposing than other operations
            torch.sub(server, view, out=view)
        loss_sum = None if result.local.loss_sum is None else result.local.loss_sum[position]
        local = replace(result.local, loss_sum=loss_sum)
        stacks = {**result.buffers, **result.personal}
        changed = self._buffers.changed({name: stacked.detach()[position] for name, stacked in stacks.items()})
        state = state_at(result.objective, position)
        return ClientUpdate(client_id, local, self._update, changed, state, result.step_sizes)

    def _functional(
        self, params: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        # Lists, for vmap takes nested arguments apart at each call, and dicts at a price.
        named = {**dict(zip(self._names, params)), **dict(zip(self._buffer_names, buffers))}
        return torch.func.functional_call(self._call, named, (tensors,))

    def _differentiate(self, loss: Tensor, params: list[Tensor], check: bool) -> None:
        """Set the gradients as they come: accumulating them would copy those whose memory layout is another."""
        own = self._trained if check else []
        gradients = torch.autograd.grad(loss, [*params, *own], allow_unused=True)
        if any(gradient is not None for gradient in gradients[len(params) :]):
            raise CannotVectorize("`training_step` reaches parameters by another way than the module's attributes")
        for parameter, gradient in zip(params, gradients):
            parameter.grad = gradient

    @torch.no_grad()
    def _load(self, start_params: Tensor, own: Sequence[dict[str, Tensor] | None]) -> list[Tensor]:
        num_clients = len(own)
        params = self._params.get(num_clients)
        if params is None:
            if len(self._params) >= _MAX_CACHED_CHUNK_SIZES:
                self._params.clear()
            params = self._params[num_clients] = [
                _empty((num_clients, *p.shape), order, p).requires_grad_()
                for p, order in zip(self._trained, self._orders)
            ]
        for stacked, server in zip(params, self._flat.views(start_params)):
            stacked[0].copy_(server)  # which may transpose; the others then have the same layout
            stacked[1:].copy_(stacked[:1])
            stacked.grad = None
        if self._personal:
            personal = params[len(self._flat.parameters) :]
            for position, values in enumerate(own):
                for stacked, value in zip(personal, self._buffers.start_personal(values)):
                    stacked[position].copy_(value)
                    stacked.grad = None
        return params

    def _stack_buffers(self, own: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor]:
        starts = []
        for buffers in own:
            start = self._buffers.start(buffers)
            if start is None:
                raise CannotVectorize("clients keep tensors of their own that the global model does not have")
            starts.append(start)
        return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}

    def _make_optimizer(self, step: ChunkStep, params: list[Tensor]) -> Optimizer:
        """Make a fresh optimizer of the same class and hyperparameters on the stacked parameters."""
        groups, like = [], step.optimizer
        for group in like.param_groups:
            # Parameters outside the federation are frozen: they have no gradient, so no step would change them.
            positions = [self._positions[id(p)] for p in group["params"] if id(p) in self._positions]
            settings = {
                name: copy_hyperparameter(value)
                for name, value in group.items()
                if name not in ("params", "param_names")
            }
            groups.append({**settings, "params": [params[i] for i in positions]})
        optimizer = type(like)(groups)  # type: ignore[call-arg]
        stacked = {id(parameter): params[i] for i, parameter in enumerate(self._trained)}
        step.start.stack(optimizer, lambda parameter: stacked.get(id(parameter)), len(params[0]))
        return optimizer


@torch.no_grad()
def _clip(params: list[Tensor], bound: float, algorithm: str) -> None:
    """Clip each client's gradients as ``clip_grad_norm_`` and ``clip_grad_value_`` would.

    Not in place: autograd may give two parameters one tensor for their gradients.
    """
    clipped = [p for p in params if p.grad is not None]
    if not clipped:
        return
    gradients = [p.grad for p in clipped if p.grad is not None]
    if algorithm == "value":
        for parameter, gradient in zip(clipped, gradients):
            parameter.grad = gradient.clamp(-bound, bound)
        return
    norms = torch.stack([torch.linalg.vector_norm(g.unsqueeze(-1), dim=tuple(range(1, g.ndim + 1))) for g in gradients])
    factors = (bound / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_(max=1.0)
    for parameter, gradient in zip(clipped, gradients):
        parameter.grad = gradient * factors.view(-1, *[1] * (gradient.ndim - 1))


def _empty(shape: tuple[int, ...], order: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """Allocate a tensor with its dimensions in the given order in memory."""
    order = order or tuple(range(len(shape)))
    flat = torch.empty([shape[dim] for dim in order], dtype=like.dtype, device=like.device)
    return flat.permute([order.index(dim) for dim in range(len(shape))])
