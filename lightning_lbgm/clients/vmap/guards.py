"""Guards of vectorised training: what a step may not do while several clients share one call of it."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "CannotVectorize",
    "GlobalGenerators",
    "has_backward_hooks",
    "no_metric_updates",
    "none_escapes",
    "refuse_kept_state",
]


class CannotVectorize(Exception):
    """Clients cannot be trained at once; the message says why."""


class GlobalGenerators:
    """The states of Python's, NumPy's and torch's global generators as they were when this was made.

    Args:
        device: The device whose generator is meant besides the CPU's.
        torch_alone: Whether Python's and NumPy's, which take longer to read, are left out.
    """

    def __init__(self, device: torch.device, torch_alone: bool = False) -> None:
        self._device, self._torch_alone = device, torch_alone
        self._python = None if torch_alone else _python_mark()
        self._numpy = None if torch_alone else _numpy_mark()
        self._torch = self._torch_states()

    def _torch_states(self) -> list[Tensor]:
        states = [torch.default_generator.get_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    @property
    def torch_moved(self) -> bool:
        """Whether one of torch's generators was drawn from."""
        return not all(map(torch.equal, self._torch, self._torch_states()))

    @property
    def others_moved(self) -> str | None:
        """The name of the other generator that was drawn from, or None."""
        if self._torch_alone:
            return None
        if _python_mark() != self._python:
            return "Python's"
        return None if _numpy_mark() == self._numpy else "NumPy's"


def _python_mark() -> tuple[Any, ...]:
    """Return what moves with every draw: the place in the generator's block, and the block's first number."""
    _, block, spare = random.getstate()
    return block[0], block[-1], spare


def _numpy_mark() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=False)
    return int(state["state"]["key"][0]), state["state"]["pos"], state["has_gauss"], state["gauss"]


def refuse_kept_state(path: str | None) -> None:
    """Raise if there is a path, that of something that a step has changed and that lasts.

    Raises:
        CannotVectorize: Then.
    """
    if path is not None:
        raise CannotVectorize(f"`training_step` keeps state in {path!r}, which clients would share")


@contextmanager
def none_escapes() -> Iterator[None]:
    """Raise if a tensor that holds several clients' values under ``vmap`` outlives what is done inside.

    Raises:
        CannotVectorize: At the end, wherever such a tensor is kept. Not after another error.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # so that what is made inside stays in the youngest generation, the only one to be looked through
    try:
        yield
        is_batched = torch._C._functorch.is_batchedtensor
        if any(type(value) is Tensor and is_batched(value) for value in gc.get_objects(generation=0)):
            raise CannotVectorize("`training_step` keeps a tensor that holds several clients' values")
    finally:
        if was_enabled:
            gc.enable()


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a hook wants to see a gradient: of clients that are trained at once there is none at that place."""
    globals_: Any = nn.modules.module
    if globals_._global_backward_hooks or globals_._global_backward_pre_hooks:
        return True
    if any(part._backward_hooks or part._backward_pre_hooks for part in module.modules()):
        return True
    return any(
        getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None)
        for p in module.parameters()
    )


@contextmanager
def no_metric_updates(module: nn.Module) -> Iterator[None]:
    """Raise if a ``torchmetrics.Metric`` of the module is updated: its state would get all clients' values stacked.

    Raises:
        CannotVectorize: Inside, at the call.
    """
    metric_class: Any = getattr(sys.modules.get("torchmetrics"), "Metric", ())  # not imported: there is none
    metrics = [(name, part) for name, part in module.named_modules() if isinstance(part, metric_class)]
    if not metrics:
        yield
        return
    kept: list[dict[str, Any]] = [
        {key: part.__dict__[key] for key in ("update", "forward") if key in part.__dict__} for _, part in metrics
    ]
    for name, part in metrics:
        part.__dict__["update"] = part.__dict__["forward"] = _refusal(name)
    try:
        yield
    finally:
        for (_, part), attributes in zip(metrics, kept):
            del part.__dict__["update"], part.__dict__["forward"]
            part.__dict__.update(attributes)


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CannotVectorize(f"`training_step` updates the torchmetrics.Metric {name!r}")

    return refuse
