"""Initial optimizer state of a client: what its constructor made, such as Adagrad's initial accumulator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lbgm.clients.vmap.guards import CannotVectorize

__all__ = ["OptimizerStart"]


class OptimizerStart:
    """Remember a new optimizer's state, to make the optimizer new again for each client.

    Most optimizers start empty; some, such as Adagrad, put an entry for each parameter there when they are made.

    Args:
        optimizer: An optimizer that has made no step yet.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = {parameter: copy.deepcopy(entry) for parameter, entry in optimizer.state.items()}

    def restore(self, optimizer: Optimizer) -> None:
        """Give the optimizer the state that it was made with."""
        optimizer.state.clear()
        for parameter, entry in self._state.items():
            optimizer.state[parameter] = copy.deepcopy(entry)

    def stack(self, optimizer: Optimizer, stacked: Callable[[Any], Tensor | None], num_clients: int) -> None:
        """Give an optimizer on stacked parameters, each of shape ``(C, *shape)``, that state for every client.

        Args:
            optimizer: The optimizer.
            stacked: Returns the stacked form of a parameter; None for one that is not trained.
            num_clients: C.

        Raises:
            CannotVectorize: If the state has what cannot be stacked.
        """
        optimizer.state.clear()
        for parameter, entry in self._state.items():
            target = stacked(parameter)
            if target is not None:
                optimizer.state[target] = {
                    name: _stack(name, value, parameter, num_clients) for name, value in entry.items()
                }


def _stack(name: str, value: Any, parameter: Tensor, num_clients: int) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.ndim == 0:
        return value.clone()
    if value.shape != parameter.shape:
        raise CannotVectorize(f"the optimizer starts with {name!r} of the shape {tuple(value.shape)}")
    return value.expand(num_clients, *value.shape).clone(memory_format=torch.contiguous_format)
