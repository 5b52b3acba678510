"""What a training step may not do while several clients share one call of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchmetrics import Metric

__all__ = ["CannotVectorize", "StateWatch", "no_kept_state", "no_metric_updates"]

_CONTAINERS = (list, dict, set, deque)
# Kept by torch: `functional_call` swaps the first two and puts them back.
_NOT_WATCHED = {"_parameters", "_buffers", "_modules"}


class CannotVectorize(Exception):
    """Clients cannot be trained at once; the message says why."""


class StateWatch:
    """Remember a module's attributes, and put back those that a step has changed.

    Attributes that are replaced are seen, and containers that are changed; deeper changes are not.

    Args:
        module: The module; its submodules are watched too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for name, part in module.named_modules():
            attributes = {key: value for key, value in part.__dict__.items() if key not in _NOT_WATCHED}
            copies = {key: value.copy() for key, value in attributes.items() if type(value) in _CONTAINERS}
            self._seen.append((name, part.__dict__, attributes, copies))

    def restore(self) -> str | None:
        """Put back what has changed; return the name of the first such attribute, or None."""
        first: str | None = None
        for name, now, before, copies in self._seen:
            changed = [key for key in now if key not in _NOT_WATCHED and now[key] is not before.get(key, _NOTHING)]
            changed += [key for key in before if key not in now]
            for key in changed:
                if key in before:
                    now[key] = before[key]
                else:
                    del now[key]
            for key, copy in copies.items():
                if not _same_items(before[key], copy):
                    _refill(before[key], copy)
                    changed.append(key)
            if changed and first is None:
                first = f"{name}.{changed[0]}" if name else changed[0]
        return first


@contextmanager
def no_kept_state(module: nn.Module) -> Iterator[None]:
    """Put the module's attributes back after a step, and raise where it had changed them.

    Raises:
        CannotVectorize: At the end, if state was kept in an attribute. After another error it is put back silently.
    """
    watch = StateWatch(module)
    try:
        yield
    except BaseException:
        watch.restore()
        raise
    if (kept := watch.restore()) is not None:
        raise CannotVectorize(f"`training_step` keeps state in the attribute {kept!r}, which clients would share")


@contextmanager
def no_metric_updates(module: nn.Module) -> Iterator[None]:
    """Raise where a ``torchmetrics.Metric`` of the module is updated: its state would get all clients' values stacked.

    Raises:
        CannotVectorize: Inside, at the call.
    """
    metrics = [(name, part) for name, part in module.named_modules() if isinstance(part, Metric)]
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


_NOTHING = object()


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CannotVectorize(f"`training_step` updates the torchmetrics.Metric {name!r}")

    return refuse


def _same_items(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(key in copy and value is copy[key] for key, value in container.items())
    if isinstance(container, set):
        return container == copy
    return all(item is old for item, old in zip(container, copy))


def _refill(container: Any, copy: Any) -> None:
    container.clear()
    container.update(copy) if isinstance(container, (dict, set)) else container.extend(copy)
