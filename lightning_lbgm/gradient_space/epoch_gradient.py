"""Epoch gradient: the sum of the gradients of an epoch's optimizer steps, as one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lbgm.core.flat import FlatParameters

__all__ = ["EpochGradient"]


class EpochGradient:
    """Add up gradients over the trainable parameters, in the order of ``named_parameters``.

    The sum has shape ``(M,)``, is ``float32`` (``float64`` if a parameter is) and lies on the parameters' device.

    Args:
        module: The module. Its set of trainable parameters is fixed here; one without a gradient counts as zeros.

    Attributes:
        flat: The parameters.
        num_steps: Steps added since the last ``take``.
        total: Their sum.

    Raises:
        ValueError: As ``FlatParameters``.

    Examples:
        >>> module = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> gradient = EpochGradient(module)
        >>> for x in ([1.0, 2.0], [3.0, 4.0]):
        ...     optimizer.zero_grad()
        ...     module(torch.tensor(x)).sum().backward()
        ...     gradient.add(optimizer)
        >>> gradient.num_steps, gradient.take().tolist()
        (2, [4.0, 6.0, 2.0])
    """

    def __init__(self, module: nn.Module) -> None:
        self.flat = FlatParameters(module)
        self.num_steps = 0
        self.total = self.flat.empty().zero_()
        self._views = {id(p): view for p, view in zip(self.flat.parameters, self.flat.views(self.total))}

    @torch.no_grad()
    def add(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Add ``scale`` times the gradients that the optimizer is about to step by.

        Only those of its own parameters: another optimizer's may be left from a step that was added already.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                view = self._views.get(id(parameter))
                if view is not None and parameter.grad is not None:
                    view.add_(parameter.grad, alpha=scale)
        self.num_steps += 1

    def take(self) -> Tensor:
        """Return the sum in float32 on the CPU and start anew."""
        total = self.total.to("cpu", torch.float32, copy=True)
        self.total.zero_()
        self.num_steps = 0
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return what the steps have added up to; without steps that is nothing."""
        return {"num_steps": self.num_steps, "total": self.total.cpu().clone() if self.num_steps else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.num_steps = state_dict["num_steps"]
        if self.num_steps:
            self.total.copy_(state_dict["total"])


def all_finite(optimizer: Optimizer) -> bool:
    """Whether every gradient that the optimizer is about to step by is finite."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
