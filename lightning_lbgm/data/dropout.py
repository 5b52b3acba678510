"""Drop-outs: clients that were chosen for a round and do not end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lbgm.core.describe import describe
from lightning_lbgm.core.validation import class_hint
from lightning_lbgm.data.chance import client_chances

__all__ = ["Dropout", "DropoutRule", "as_dropout"]


@dataclass(frozen=True)
class Dropout:
    """Probabilities with which a client that was chosen for a round drops out of it, each client by itself.

    Attributes:
        before: Before training: it never gets the model.
        after: After training, of those that have not dropped out before: it got the model, its update never arrives.

    Raises:
        ValueError: If one of them is not in [0, 1).

    Examples:
        >>> Dropout(after=0.2)
        Dropout(before=0.0, after=0.2)
    """

    before: float = 0.0
    after: float = 0.0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(
                    f"`Dropout({name}=...)` must be a probability in [0, 1); got {value!r}. With 1 no update would ever"
                    " arrive."
                )


class DropoutRule:
    """Which of the chosen clients drop out of a round: a pure function of the run's seed and the round.

    Args:
        given: The same for all clients and rounds, or a function ``(round, client) -> Dropout or float``.
    """

    def __init__(self, given: Dropout | Callable[[int, int], Dropout | float]) -> None:
        self.given = given

    @property
    def is_given(self) -> bool:
        """Whether it asks a user's function."""
        return not isinstance(self.given, Dropout)

    def draw(
        self, round_index: int, chosen: Sequence[int], num_clients: int, seed: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return those who drop out before training, and those who do after it."""
        before = client_chances(seed, "dropout before", round_index, num_clients)
        after = client_chances(seed, "dropout after", round_index, num_clients)
        risks = {client_id: self._of(round_index, client_id) for client_id in chosen}
        unreached = tuple(k for k in chosen if before[k] < risks[k].before)
        reached = set(chosen) - set(unreached)
        return unreached, tuple(k for k in chosen if k in reached and after[k] < risks[k].after)

    def _of(self, round_index: int, client_id: int) -> Dropout:
        if isinstance(self.given, Dropout):
            return self.given
        value = self.given(round_index, client_id)
        try:
            return value if isinstance(value, Dropout) else Dropout(after=value)
        except ValueError:
            raise ValueError(
                f"`dropout={describe(self.given)}` returned {value!r} in round {round_index} for client {client_id}:"
                " return a `Dropout`, or a probability in [0, 1) of dropping out after training."
            ) from None

    def __repr__(self) -> str:
        """Show what was given."""
        return describe(self.given)


def as_dropout(value: Any) -> DropoutRule | None:
    """Return what a user gave as a rule; a number is that of ``Dropout(after=...)``. None for None.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is out of range.
    """
    if value is None or isinstance(value, DropoutRule):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return DropoutRule(Dropout(after=value))
    if isinstance(value, Dropout) or (callable(value) and not isinstance(value, type)):
        return DropoutRule(value)
    raise TypeError(
        "`dropout` must be a probability in [0, 1), a `Dropout(before=0.1, after=0.2)`, a function `(round, client) ->"
        f" Dropout or probability`, or None; got {value!r}.{class_hint(value, Dropout)}"
    )
