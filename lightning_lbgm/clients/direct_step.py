"""Direct optimizer step and backward pass, without torch's wrappers: a third of the time of a small model's step.

It needs names that torch does not document as public. Seen in torch 2.14.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim import optimizer as _torch_optimizer
from torch.overrides import has_torch_function_unary

__all__ = ["direct_backward", "direct_step"]


def direct_backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, without its checks if the loss is an ordinary number that has a gradient."""
    if (
        type(loss) is Tensor
        and loss.ndim == 0
        and loss.requires_grad
        and loss.is_floating_point()
        and not has_torch_function_unary(loss)
    ):
        gradients = (torch.ones_like(loss),)
        _engine_run_backward((loss,), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        loss.backward()


def direct_step(optimizer: Optimizer) -> Callable[[], Any] | None:
    """Return a function that does what ``optimizer.step()`` does, bit for bit, as long as its settings stay.

    Around each step torch opens a range for its profiler, looks for hooks and switches gradients off and on. Where
    there is no hook and no profiler, the rule is called itself. Optimizers that are not torch's own, and ``LBFGS``,
    which needs a closure, are left as they are: None.

    Args:
        optimizer: The optimizer. What it returns is for one round: hooks added later would be missed.
    """
    if not _has_nothing_around(optimizer):
        return None
    if type(optimizer) is SGD and all(map(_is_plain, optimizer.param_groups)):
        # Aliases that need no gradient, so that none has to be switched off.
        groups = [
            (group, group["params"], [p.detach() for p in group["params"]])
            for group in optimizer.param_groups
            if group["params"]
        ]

        def step_plain_sgd() -> None:
            for group, parameters, aliases in groups:
                gradients = [parameter.grad for parameter in parameters]
                try:
                    torch._foreach_add_(aliases, gradients, alpha=-group["lr"])
                except TypeError:  # a parameter has no gradient; nothing was added
                    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
                    if present:
                        torch._foreach_add_(
                            [aliases[index] for index in present],
                            [gradients[index] for index in present],
                            alpha=-group["lr"],
                        )

        return step_plain_sgd
    rule = inspect.unwrap(type(optimizer).step)

    def step() -> Any:
        with torch.no_grad():
            return rule(optimizer)

    return step


def _has_nothing_around(optimizer: Optimizer) -> bool:
    """Whether the optimizer is one of torch's, and its step has nothing around it that would do something."""
    own = vars(optimizer).get("step")
    return (
        type(optimizer).__module__.startswith("torch.optim.")
        and type(optimizer) is not LBFGS
        # A learning rate schedule wraps the step, to warn if it is never called.
        and (own is None or getattr(own, "_wrapped_by_lr_sched", False))
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not _torch_optimizer._global_optimizer_pre_hooks
        and not _torch_optimizer._global_optimizer_post_hooks
        and not torch.autograd._profiler_enabled()
        and not any(group.get("differentiable") or group.get("capturable") for group in optimizer.param_groups)
    )


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a group's rule is ``p <- p - lr * gradient``."""
    return (
        isinstance(group["lr"], float)
        and group["momentum"] == 0
        and group["weight_decay"] == 0
        and not group["maximize"]
        and not group.get("fused")
    )
