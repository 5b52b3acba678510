"""Outputs of ``training_step`` besides the loss: noted by name, with an error if a hook uses one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from lightning_lbgm.data.access import BatchAccessError, NotABatch

__all__ = ["LocalOutput", "note_extra_outputs", "noted_extra_outputs"]

_noted: ContextVar[dict[str, None] | None] = ContextVar("_noted", default=None)
_OPERATIONS = (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "neg",
    "float",
    "int",
    "index",
    "format",
)


@contextmanager
def noted_extra_outputs() -> Iterator[dict[str, None]]:
    """Collect the names of what local steps return beside the loss; their values are not kept."""
    names: dict[str, None] = {}
    token = _noted.set(names)
    try:
        yield names
    finally:
        _noted.reset(token)


def note_extra_outputs(output: Mapping[str, Any]) -> None:
    """Note the names in what a ``training_step`` returned."""
    names = _noted.get()
    if names is not None and len(output) > 1:
        names.update(dict.fromkeys(name for name in output if name != "loss"))


class LocalOutput(NotABatch):
    """Stands in ``outputs`` of ``on_train_batch_end`` for what local steps returned beside the loss.

    Args:
        name: The key.

    Raises:
        BatchAccessError: If anything is done with it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, what: str) -> NoReturn:
        raise BatchAccessError(
            f"`outputs[{self.name!r}]` {what}: `training_step` returned it in each local step of each client, and"
            " `on_train_batch_end` is called once a round, with the cohort's mean loss as `outputs['loss']`. Use"
            f" {self.name!r} in `training_step`, for instance with `self.log`."
        )

    def __repr__(self) -> str:
        return f"LocalOutput({self.name!r})"


def _operation(name: str) -> Any:
    def refuse(self: LocalOutput, *args: Any) -> NoReturn:
        self._refuse("is not kept")

    refuse.__name__ = name
    return refuse


for _name in _OPERATIONS:
    setattr(LocalOutput, f"__{_name}__", _operation(f"__{_name}__"))
