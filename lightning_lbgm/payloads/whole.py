"""Whole payload: values, and the state that the receiver's stages need from then on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import Reader, Writer
from lightning_lbgm.payloads.states import read_state, state_bytes, write_state
from lightning_lbgm.payloads.wrapped import Wrapped

__all__ = ["WithState"]


class WithState(Wrapped):
    """All values, and a stage's state behind them.

    Args:
        body: The values.
        state: Nested built-ins and tensors.
    """

    fields = ("body", "state")
    code = 21

    def __init__(self, body: Dense, state: Any, layout: Layout | None = None) -> None:
        super().__init__(body, layout)
        self.state = state

    def dense(self) -> Tensor:
        return self.body.dense()

    @property
    def num_bits(self) -> int:
        return self.body.num_bits + 8 * state_bytes(self.state)

    def write(self, out: Writer) -> None:
        self.body.write(out)
        write_state(out, self.state)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        return cls(Dense(data.tensor(size), (size,)), read_state(data))
