"""What a client keeps for itself from round to round besides its objective's state: its own buffers and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lbgm.clients.personal import PersonalParameters

__all__ = ["OwnValues"]


class OwnValues:
    """Tell what clients keep for themselves, and where it is in their states.

    A client's state has ``"personal"`` for what is personal, and ``"buffers"`` for the other buffers if each client
    keeps its own: dicts of tensors by name.

    Args:
        buffers: Whether clients keep all buffers (``buffers="client"``).
        personal: What is personal. None: nothing.
    """

    def __init__(self, buffers: bool, personal: PersonalParameters | None = None) -> None:
        self._buffers = buffers
        self._personal = personal

    @property
    def is_any(self) -> bool:
        """Whether clients may keep something."""
        return self._buffers or self._personal is not None

    @property
    def has_personal(self) -> bool:
        """Whether something is personal."""
        return self._personal is not None

    def is_personal(self, name: str, tensor: Tensor) -> bool:
        """Whether a parameter or buffer is personal."""
        return self._personal is not None and self._personal.includes(name, tensor)

    def personal(self) -> dict[str, nn.Parameter]:
        """Return the module's personal parameters that are trained, by name."""
        return {} if self._personal is None else self._personal.trainable()

    def of(self, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return what a client keeps, by name, from its state; None if there is nothing."""
        kept = dict(state.get("buffers", ())) if self._buffers else {}
        if self._personal is not None:
            kept.update(state.get("personal", ()))
        return kept or None

    def part(self, changed: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Part what a client's turn has changed.

        Returns:
            What the client keeps, copied, to be put into its state; and what it sends.
        """
        kept: dict[str, dict[str, Tensor]] = {}
        rest = dict(changed)
        if self._personal is not None:
            mine = {name: rest.pop(name).clone() for name, t in changed.items() if self._personal.includes(name, t)}
            kept["personal"] = mine
        if self._buffers:
            kept["buffers"] = {name: buffer.clone() for name, buffer in rest.items()}
            rest = {}
        return kept, rest
