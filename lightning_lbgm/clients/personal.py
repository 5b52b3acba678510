"""Personal parameters: parameters and buffers that each client keeps, as in FedPer, FedRep and FedBN.

FedPer (Arivazhagan et al., 2019, arXiv 1912.00818) keeps the last layers, FedRep (Collins et al., ICML 2021, arXiv
2102.07078) trains these and the shared ones in turns, FedBN (Li et al., ICLR 2021, arXiv 2102.07623) keeps BatchNorm.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_lbgm.clients.objective_turn import ObjectiveTurn

__all__ = ["Alternation", "Personal", "PersonalParameters", "gradient_correction"]

_COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of a submodule
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Personal:
    """The settings of personal parameters.

    Attributes:
        rule: Patterns, or a function of name and tensor.
        steps: Local steps of a turn that change personal parameters alone. None: all steps change all parameters.
    """

    rule: tuple[str, ...] | Callable[[str, Tensor], bool]
    steps: int | None = None

    @classmethod
    def of(
        cls,
        personal: Sequence[str] | Callable[[str, Tensor], bool] | None,
        personal_steps: int | None,
        local_steps: int | None,
    ) -> Personal | None:
        """Return the settings of ``LBGMFederated``'s arguments; None if nothing is personal.

        Raises:
            TypeError: If ``personal`` is neither patterns nor a function.
            ValueError: If ``personal_steps`` is out of range, or has no meaning.
        """
        if personal is not None and not callable(personal):
            if isinstance(personal, str) or not all(isinstance(pattern, str) for pattern in _items(personal)):
                raise TypeError(
                    "`personal` must be a list of patterns such as ['head.*'], or a function of a name and a tensor;"
                    f" got {personal!r}."
                )
            personal = tuple(personal) or None
        if personal_steps is not None:
            if isinstance(personal_steps, bool) or not isinstance(personal_steps, int) or personal_steps < 1:
                raise ValueError(f"`personal_steps` must be a positive integer; got {personal_steps!r}.")
            if personal is None:
                raise ValueError(
                    f"`personal_steps={personal_steps}` says how many local steps change personal parameters alone, but"
                    " there are none: pass `personal=['head.*']` too."
                )
            if local_steps is not None and personal_steps >= local_steps:
                raise ValueError(
                    f"`personal_steps={personal_steps}` of `local_steps={local_steps}` leaves no step for the shared"
                    " parameters: make it smaller."
                )
        return None if personal is None else cls(personal, personal_steps)

    @property
    def identity(self) -> Any:
        """What decides which tensors are personal, to be compared: the patterns in order, or the function."""
        return self.rule if callable(self.rule) else sorted(self.rule)

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values, for loggers."""
        rule = getattr(self.rule, "__qualname__", repr(self.rule)) if callable(self.rule) else list(self.rule)
        return {"personal": rule} if self.steps is None else {"personal": rule, "personal_steps": self.steps}


def _items(personal: object) -> list[object]:
    return list(personal) if isinstance(personal, Sequence) else [None]


class PersonalParameters:
    """Which parameters and buffers of a module are personal.

    The names are those of ``named_parameters`` and ``named_buffers``, without the ``_orig_mod.`` of compiled
    submodules. A tensor with several names (tied weights) must match with all of them or none.

    Args:
        settings: The settings.
        module: The module.

    Raises:
        ValueError: If a pattern matches nothing, or a tensor matches with one of its names alone.
    """

    def __init__(self, settings: Personal, module: nn.Module) -> None:
        self.module = module
        self.settings = settings
        self._known: dict[str, bool] = {}
        names = dict(_named(module))
        unset = [f"{owner}.{key}".removeprefix(".") for owner, part in module.named_modules() for key in part._buffers]
        self._check_patterns(list(dict.fromkeys([*names, *unset])))
        owners: dict[int, str] = {}
        for name, tensor in names.items():
            known = owners.setdefault(id(tensor), name)
            if self.includes(name, tensor) != self.includes(known, tensor):
                one, other = (name, known) if self.includes(name, tensor) else (known, name)
                raise ValueError(
                    f"`personal` matches {_clean(one)!r} and not {_clean(other)!r}, which are two names of one tensor:"
                    " let it match both or neither."
                )
        if settings.steps is not None and not any(self.includes(name, p) for name, p in module.named_parameters()):
            raise ValueError(
                f"`personal_steps={settings.steps}` needs a personal parameter to train, and `personal` matches buffers"
                " alone: remove one of them."
            )

    def includes(self, name: str, tensor: Tensor) -> bool:
        """Whether a parameter or buffer is personal, also one that the module has got since."""
        known = self._known.get(name)
        if known is None:
            rule, clean = self.settings.rule, _clean(name)
            if callable(rule):
                known = bool(rule(clean, tensor))
            else:
                known = any(fnmatchcase(clean, pattern) for pattern in rule)
            self._known[name] = known
        return known

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the personal parameters that are trained now, by name."""
        named = self.module.named_parameters()
        return {name: p for name, p in named if p.requires_grad and self.includes(name, p)}

    def _check_patterns(self, names: list[str]) -> None:
        clean = [_clean(name) for name in names]
        if callable(self.settings.rule):
            if not any(self.includes(name, tensor) for name, tensor in _named(self.module)):
                raise ValueError(
                    f"`personal={self.settings.rule!r}` is true for none of its {len(names)} parameters and buffers,"
                    f" such as {_listed(clean)}."
                )
            return
        for pattern in self.settings.rule:
            if not any(fnmatchcase(name, pattern) for name in clean):
                near = difflib.get_close_matches(pattern, clean, _SHOWN, cutoff=0.3) or clean
                raise ValueError(
                    f"The pattern {pattern!r} of `personal` matches none of its {len(names)} parameters and buffers."
                    f" The nearest are {_listed(near)}."
                )


class Alternation:
    """Which of a client's parameters a local step changes, if personal and shared ones are trained in turns (FedRep).

    The gradients of the others are dropped, so that momentum and weight decay do not move them either.

    Args:
        steps: The first steps of a turn, which change the personal ones.
        shared: The shared parameters, each of shape ``(*shape)``, or ``(C, *shape)`` for a chunk.
        personal: The personal ones.
    """

    def __init__(self, steps: int, shared: Sequence[Tensor], personal: Sequence[Tensor]) -> None:
        self.steps = steps
        self._shared = list(shared)
        self._personal = list(personal)

    def is_personal(self, index: int) -> bool:
        """Whether the local step of an index changes the personal parameters."""
        return index < self.steps

    def drop(self, index: int) -> None:
        """Drop the gradients of the parameters that the local step of an index does not change."""
        for parameter in self._shared if self.is_personal(index) else self._personal:
            parameter.grad = None

    def num_shared(self, num_steps: int) -> int:
        """Return how many of a turn's steps have changed the shared parameters."""
        return max(0, num_steps - self.steps)


def gradient_correction(
    objective: ObjectiveTurn | None, alternation: Alternation | None
) -> Callable[[int, float | None], None] | None:
    """Return what is called after each backward pass with the step's index and the loss scale; None for nothing.

    A local objective concerns the shared parameters, and is asked in the steps that change them.
    """
    if objective is None and alternation is None:
        return None

    def correct(index: int, scale: float | None) -> None:
        if alternation is not None:
            alternation.drop(index)
            if alternation.is_personal(index):
                return
        if objective is not None:
            objective.correct(scale)

    return correct


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _clean(name: str) -> str:
    return name.replace(_COMPILED, "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN]))
