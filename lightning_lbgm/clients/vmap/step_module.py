"""Training step as a module's forward, so that ``torch.func`` can replace the module's tensors."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_lbgm.clients.log import LogCall
from lightning_lbgm.clients.vmap.batching import SplitBatch
from lightning_lbgm.clients.vmap.guards import CannotVectorize

__all__ = ["StepModule"]


class StepModule(nn.Module):
    """A module whose forward is the step: ``functional_call`` puts one client's tensors into the module beneath."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[LogCall] = []
        self.argument_names: Sequence[str] = ()
        self._has_buffers = any(True for _ in module.buffers())

    def begin(self, loss: Callable[[Any, int], Tensor | None], batch: SplitBatch, index: int) -> None:
        """Set what the next forward needs beside tensors: vmap lets nothing else in or out."""
        self._loss, self._batch, self._index = loss, batch, index

    def forward(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the loss, if there is one, what was logged as tensors, and the buffers after the step."""
        self.calls = []
        values: list[Tensor] = []

        def record(name: str, value: Any, *args: Any, **options: Any) -> None:
            options.update(zip(self.argument_names, args))
            if any(isinstance(option, Tensor) for option in options.values()):
                raise CannotVectorize(f"`self.log({name!r}, ...)` has a tensor among its options")
            if isinstance(value, Tensor) and value.numel() == 1:
                values.append(value)
                self.calls.append((name, None, options))
            elif isinstance(value, numbers.Real):
                self.calls.append((name, float(value), options))
            else:
                raise CannotVectorize(f"`self.log({name!r}, ...)` is given a {type(value).__name__}, not one number")

        attributes = self.module.__dict__
        outer = attributes.get("log")
        attributes["log"] = record
        try:
            loss = self._loss(self._batch.join(tensors), self._index)
        finally:
            attributes.pop("log")
            if outer is not None:
                attributes["log"] = outer
        buffers = list(self.module.buffers()) if self._has_buffers else []
        return [] if loss is None else [loss.reshape(())], values, buffers
