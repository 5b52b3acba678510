"""Wrapped payload: what those have in common that are another payload and something on top."""

from __future__ import annotations

import torch

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Payload

__all__ = ["Wrapped"]


class Wrapped(Payload):
    """Another payload and something on top, of the same entries and dtype.

    Args:
        body: The payload.
        layout: The parameter tensors; those of the payload if left out.
    """

    def __init__(self, body: Payload, layout: Layout | None = None) -> None:
        super().__init__(body.layout if layout is None else layout)
        self.body = body

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def relabel(self, layout: Layout) -> None:
        super().relabel(layout)
        self.body.relabel(layout)
