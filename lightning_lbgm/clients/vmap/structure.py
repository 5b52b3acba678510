"""Structure of a module, to notice changes: submodules, tensors, hooks and the kind of its optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["structure_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def structure_of(module: nn.Module, optimizer: Optimizer) -> tuple[Any, ...]:
    """Return what can be compared with ``==`` from round to round; values of tensors and settings are left out."""
    modules = nn.modules.module
    parts = [
        (name, id(part), part.training, *(tuple(getattr(part, hooks)) for hooks in _HOOKS))
        for name, part in module.named_modules(remove_duplicate=False)
    ]
    parameters = [
        (
            name,
            id(p),
            p.shape,
            p.requires_grad,
            tuple(getattr(p, "_backward_hooks", None) or ()),
            tuple(getattr(p, "_post_accumulate_grad_hooks", None) or ()),
        )
        for name, p in module.named_parameters(remove_duplicate=False)
    ]
    buffers = [
        (f"{owner}.{name}", None if buffer is None else (buffer.shape, buffer.dtype))
        for owner, part in module.named_modules()
        for name, buffer in part._buffers.items()
    ]
    everywhere = tuple(tuple(getattr(modules, f"_global{hooks}")) for hooks in _HOOKS)
    groups = [(sorted(group), [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    step = getattr(getattr(module, "training_step", None), "__func__", None)
    return (parts, parameters, buffers, everywhere, type(optimizer), id(optimizer), groups, id(step))
