"""Module state besides the shared parameters: what a client's turn may change of buffers, frozen and personal ones."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lbgm.clients.personal import PersonalParameters

__all__ = ["ModuleState", "Saved", "same_values"]

Saved = tuple[dict[str, Tensor], list[dict[str, "Tensor | None"]]]
"""What a ``ModuleState`` remembers: values by name, and the buffers registered at each place."""


@dataclass(frozen=True)
class _Place:
    """What a submodule has registered, the tensor objects themselves."""

    name: str
    part: nn.Module
    buffers: dict[str, Tensor | None]
    parameters: dict[str, nn.Parameter | None]

    def restore(self) -> None:
        for now, before in ((self.part._buffers, self.buffers), (self.part._parameters, self.parameters)):
            if now.keys() == before.keys() and all(map(operator.is_, now.values(), before.values())):
                continue
            for key in now.keys() - before.keys():
                del now[key]
                self.part._non_persistent_buffers_set.discard(key)
            now.update(before)  # type: ignore[arg-type]

    def keys_of(self, names: Iterable[str]) -> list[str]:
        """Return the keys of those buffers, by full name, that belong here and are not registered."""
        split = (name.rpartition(".") for name in names)
        return [key for owner, _, key in split if owner == self.name and self.buffers.get(key) is None]


class ModuleState:
    """Remember a module's buffers and frozen parameters, and put them back.

    Buffers of every kind are meant (float, integer, persistent or not, also those that a step makes, resizes, replaces
    or removes), and parameters without ``requires_grad``, such as a momentum encoder; of the trainable parameters those
    that are personal. The module's own tensor objects stay in place, so compiled modules and aliases keep working.

    Args:
        module: The module.
        personal: Which trainable parameters are personal. None: none.

    Attributes:
        values: What is remembered, by name.
        personal: Names of the personal parameters among it, which are trained.
    """

    def __init__(self, module: nn.Module, personal: PersonalParameters | None = None) -> None:
        self.module = module
        self._rule = personal
        self.values: dict[str, Tensor] = {}  # copies, by name
        self._own: dict[str, Tensor] = {}  # the module's tensor objects, by name
        self._places: list[_Place] = []
        self._frozen: list[str] = []
        self.personal: list[str] = []
        self._pointers: dict[str, int] = {}
        self._trainable: list[nn.Parameter] = []

    @torch.no_grad()
    def capture(self) -> None:
        """Remember what the module holds now."""
        kept, self.values = self.values, {}
        self._places = [
            _Place(name, part, dict(part._buffers), dict(part._parameters))
            for name, part in self.module.named_modules()
        ]
        parameters = list(self.module.named_parameters())
        self._frozen = [name for name, parameter in parameters if not parameter.requires_grad]
        self.personal = [] if self._rule is None else list(self._rule.trainable())
        personal = set(self.personal)
        self._trainable = [p for name, p in parameters if p.requires_grad and name not in personal]
        self._own = self._current()
        for name, tensor in self._own.items():
            old = kept.get(name)
            if old is not None and _matches(old, tensor):
                self.values[name] = old.copy_(tensor)
            else:
                self.values[name] = tensor.detach().clone()
        self._pointers = {name: tensor.data_ptr() for name, tensor in self._own.items()}

    @torch.no_grad()
    def restore(self, own: Mapping[str, Tensor] | None = None) -> None:
        """Put back what was remembered; the values of ``own`` instead, by name, if given.

        Args:
            own: A client's own values. Names that the module does not have are registered as buffers.
        """
        for place in self._places:
            place.restore()
            if own is not None:
                for key in place.keys_of(own.keys() - self.values.keys()):  # no parameters: they are among the values
                    place.part._buffers[key] = own[f"{place.name}.{key}" if place.name else key].clone()
        if not self._own:
            return
        taken = {parameter.data_ptr() for parameter in self._trainable}
        for name, tensor in self._own.items():
            value = own[name] if own is not None and name in own else self.values[name]
            pointer = tensor.data_ptr()
            # A step may have given the tensor another storage, perhaps a trainable parameter's: that is not written to.
            if pointer == self._pointers[name] and pointer not in taken and _matches(tensor, value):
                tensor.copy_(value)
            else:
                tensor.data = value.clone()
                self._pointers[name] = tensor.data_ptr()

    def read(self) -> dict[str, Tensor]:
        """Copy what the module holds now, by name."""
        return {name: tensor.detach().clone() for name, tensor in self._current().items()}

    def changed(
        self, current: Mapping[str, Tensor] | None = None, always: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of what differs from what was remembered, in shape, dtype or a number.

        Args:
            current: The tensors to compare, by name. None: those of the module.
            always: Names that are yielded in any case.
        """
        if current is None:
            if not self._own and not any(place.part._buffers for place in self._places):
                return  # the usual case, at every client's turn
            current = self._current()
        for name, tensor in current.items():
            known = self.values.get(name)
            if known is None or name in always or not same_values(tensor, known):
                yield name, tensor.detach()

    def register(self, name: str, value: Tensor) -> None:
        """Let a value be what is remembered under a name, also one that the module has no buffer for yet."""
        self.values[name] = value
        if name in self._own:
            return
        owner, _, key = name.rpartition(".")
        part = self.module.get_submodule(owner)
        part._buffers[key] = self._own[name] = value.clone()
        self._pointers[name] = self._own[name].data_ptr()
        for place in self._places:
            if place.part is part:
                place.buffers[key] = self._own[name]

    def save(self) -> Saved:
        """Return what is remembered, for ``reset``. Nothing is copied but containers."""
        return dict(self.values), [dict(place.buffers) for place in self._places]

    def reset(self, saved: Saved) -> None:
        """Remember again what was remembered at ``save``, since the last ``capture``, and put it back."""
        self.values = dict(saved[0])
        self._own = {name: tensor for name, tensor in self._own.items() if name in self.values}
        for place, buffers in zip(self._places, saved[1]):
            place.buffers.clear()
            place.buffers.update(buffers)
        self.restore()

    def is_frozen(self, name: str) -> bool:
        """Whether a name is that of a frozen parameter."""
        return name in self._frozen

    def _current(self) -> dict[str, Tensor]:
        tensors = dict(self.module.named_buffers())
        for name in (*self._frozen, *self.personal):
            tensors[name] = self.module.get_parameter(name)
        return tensors


def same_values(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every number; NaN equals NaN."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if torch.equal(one, two):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def _matches(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and one.device == two.device
