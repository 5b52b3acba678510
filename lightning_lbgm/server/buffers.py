"""Buffer policy: buffers and frozen parameters are averaged, stay the server's, or are each client's own.

Personal parameters are always each client's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lbgm.clients.own import OwnValues
from lightning_lbgm.clients.personal import PersonalParameters
from lightning_lbgm.clients.state import ModuleState, Saved

__all__ = ["BufferMode", "Buffers"]

BufferMode = Literal["average", "server", "client"]


@dataclass
class _Sum:
    """What clients have sent of one buffer in a round.

    Attributes:
        values: Weighted sum: of the changes, of whole values if there is nothing to change from; at least ``float32``.
        dtype: Its own dtype.
        weight: Weight of the clients that sent it.
    """

    values: Tensor
    dtype: torch.dtype
    weight: float


class Buffers:
    """Hand the server's buffers to each client and treat what comes back as ``mode`` says.

    Buffers are meant in a wide sense: all tensors that the module holds besides its trainable parameters, so also
    frozen parameters that the step changes (a momentum encoder), and buffers that training makes, resizes or replaces.
    Every client starts a round from the same ones, so that nothing leaks from one client to the next:

    - ``"average"``: the float ones that a client changed are sent with its update and averaged with the clients'
      weights. Those that cannot be averaged, because they are no floats or have another shape at another client, stay
      the server's; ``take_notes`` names them.
    - ``"server"``: the server's stay as they are; nothing is sent.
    - ``"client"``: each client keeps its own, of every kind, from round to round; nothing is sent, and the server's
      stay as they are.

    What is personal is each client's own in any mode: buffers and frozen parameters as with ``"client"``, and trainable
    parameters, which are treated here because they are not among those that clients share.

    Args:
        module: The module whose buffers are meant.
        mode: One of the three.
        personal: What is personal. None: nothing.

    Attributes:
        own: Tells what clients keep for themselves.
    """

    def __init__(self, module: nn.Module, mode: BufferMode, personal: PersonalParameters | None = None) -> None:
        self.module = module
        self.mode = mode
        self.own = OwnValues(mode == "client", personal)
        self._state = ModuleState(module, personal)
        self._state.capture()
        # The base class's method: a user's override may leave buffers out of the checkpoint, not out of the model.
        persistent = set(nn.Module.state_dict(module))
        self._kept = {name for name, _ in module.named_buffers() if name in persistent}
        # Running statistics that are averaged do not need the counter beside them.
        self._counters = {
            f"{name}.num_batches_tracked".removeprefix(".")
            for name, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
        }
        self.names = [
            name for name, b in module.named_buffers() if b.is_floating_point() and not self.own.is_personal(name, b)
        ]
        self._moving: set[str] = set()  # what was averaged once, and so travels from then on
        self._before: tuple[set[str], Saved] = (set(), self._state.save())
        self._sums: dict[str, _Sum] = {}
        self._unfit: dict[str, str] = {}  # what cannot be averaged, and why
        self._noted: set[str] = set()

    @property
    def _device(self) -> torch.device:
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def downlink(self) -> dict[str, Tensor]:
        """What the server sends to a client with the parameters, by name: float buffers, and what else was averaged."""
        if self.mode == "client":
            return {}
        values = self._state.values
        sent = {name for name in self._kept & values.keys() if values[name].is_floating_point()} | self._moving
        sent = {name for name in sent & values.keys() if not self.own.is_personal(name, values[name])}
        return {name: values[name] for name in sorted(sent)}

    def begin_round(self) -> None:
        """Remember the module's buffers as the server's."""
        self._sums, self._unfit = {}, {}
        self._state.capture()
        self._before = set(self._moving), self._state.save()

    def undo(self) -> None:
        """Take the round back: the module's are as at its start."""
        self._moving = set(self._before[0])
        self._sums, self._unfit = {}, {}
        self._state.reset(self._before[1])

    def load(self, own: Mapping[str, Tensor] | None = None) -> None:
        """Set the module's buffers to the server's, or to the client's own if it has some."""
        self._state.restore(own)

    def read(self) -> dict[str, Tensor]:
        """Copy the module's buffers."""
        return self._state.read()

    def start(self, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """Return the buffers alone that ``load`` would set, not copied; None if a client's own go beyond them."""
        values, state = self._state.values, self._state
        if any(name not in values or state.is_frozen(name) for name in own or {}):
            return None
        named = {name: value for name, value in values.items() if not state.is_frozen(name)}
        named.update(own or {})
        return {name: value for name, value in named.items() if name not in state.personal}

    def personal(self) -> dict[str, nn.Parameter]:
        """Return the module's personal parameters that are trained, by name."""
        return self.own.personal()

    def start_personal(self, own: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return the values of ``personal`` that ``load`` would set, in order, not copied."""
        own, values = own or {}, self._state.values
        return [own[name] if name in own else values[name] for name in self._state.personal]

    def changed(
        self, current: Mapping[str, Tensor] | None = None, own: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return what is sent, or kept by the client, by name: not copied; ``own.part`` parts them.

        Args:
            current: All buffers and personal parameters of a client. None: the module's own tensors.
            own: What the client has kept for itself so far.
        """
        if self.mode == "server" and not self.own.is_any:
            return {}
        changed = self._state.changed(current, always=(*(own or ()), *self._state.personal))
        if self.mode == "client":
            return dict(changed)
        found = {}
        for name, tensor in changed:
            if self.own.is_personal(name, tensor):
                found[name] = tensor
            elif self.mode == "server":
                continue
            elif tensor.is_floating_point():
                found[name] = tensor
            elif name not in self._counters:
                self._unfit[name] = f"of dtype {str(tensor.dtype).removeprefix('torch.')}"
        return found

    def differs(self, frozen_only: bool = False) -> str | None:
        """Return the name of something in the module that is not as ``load`` would set it, or None."""
        for name, _ in self._state.changed():
            if not frozen_only or self._state.is_frozen(name):
                return name
        return None

    def is_sound(self, buffers: Mapping[str, Tensor]) -> bool:
        """Whether a client's buffers have no number that became NaN, or infinite from a finite one."""
        for name, buffer in buffers.items():
            if bool(torch.isfinite(buffer).all()):
                continue
            known = self._state.values.get(name)
            if known is None or known.shape != buffer.shape:
                if bool(buffer.isnan().any()):
                    return False
            elif not bool((buffer.isfinite() | ~known.isfinite() & ~(buffer.isnan() & ~known.isnan())).all()):
                return False
        return True

    @torch.no_grad()
    def receive(self, buffers: Mapping[str, Tensor], weight: float) -> None:
        """Add a client's changed buffers to the average, with the client's weight."""
        for name, buffer in buffers.items():
            wide = buffer.to(torch.promote_types(buffer.dtype, torch.float32), copy=True)
            base = self._base(name, buffer)
            contribution = (wide if base is None else wide.sub_(base)).mul_(weight)
            known = self._sums.get(name)
            if known is None:
                self._sums[name] = _Sum(contribution, buffer.dtype, weight)
            elif known.values.shape != contribution.shape or known.dtype != buffer.dtype:
                self._unfit[name] = "of different shapes at different clients"
            else:
                known.values.add_(contribution)
                known.weight += weight

    def _base(self, name: str, like: Tensor) -> Tensor | None:
        """Return what a change is counted from, 0 if the server's number is not finite; None if it has no such."""
        known = self._state.values.get(name)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            return None
        return known if bool(known.isfinite().all()) else known.nan_to_num(0.0, 0.0, 0.0)

    @property
    def received(self) -> dict[str, Any]:
        """What clients have sent in this round, for the other processes: built-ins alone."""
        sums = {name: (tuple(s.values.shape), s.dtype, s.weight) for name, s in self._sums.items()}
        return {"sums": sums, "unfit": self._unfit}

    def combine(self, parts: Sequence[dict[str, Any]], all_reduce_sum: Callable[[Tensor], None]) -> None:
        """Add up what several processes have received.

        Args:
            parts: ``received`` of each process, in order.
            all_reduce_sum: Replaces a tensor by its sum over the processes.
        """
        together: dict[str, _Sum] = {}
        kinds: dict[str, set[tuple[Any, Any]]] = {}
        for part in parts:
            self._unfit = {**part["unfit"], **self._unfit}
            for name, (shape, dtype, _) in part["sums"].items():
                kinds.setdefault(name, set()).add((shape, dtype))
        for name in sorted(kinds):
            if len(kinds[name]) > 1:
                self._unfit[name] = "of different shapes at different clients"
                continue
            ((shape, dtype),) = kinds[name]
            own = self._sums.get(name)
            wide = torch.promote_types(dtype, torch.float32)
            values = torch.zeros(shape, dtype=wide, device=self._device) if own is None else own.values
            weight = sum(part["sums"][name][2] for part in parts if name in part["sums"])
            together[name] = _Sum(values, dtype, weight)
        self._sums = together
        for dtype in sorted({s.values.dtype for s in together.values()}, key=str):
            sums = [s for s in together.values() if s.values.dtype == dtype]
            flat = torch.cat([s.values.reshape(-1) for s in sums])
            all_reduce_sum(flat)
            for one, values in zip(sums, flat.split([s.values.numel() for s in sums])):
                one.values = values.view_as(one.values)

    @torch.no_grad()
    def finish_round(self, total_weight: float) -> None:
        """Set the module's buffers to the server's for the next round: averaged, or as they were."""
        for name, received in self._sums.items():
            if name in self._unfit:
                continue
            mean = self._mean(name, received, total_weight)
            self._state.register(name, mean)
            self._moving.add(name)
        self._sums = {}
        self.load()

    def _mean(self, name: str, received: _Sum, total_weight: float) -> Tensor:
        known = self._state.values.get(name)
        if known is None or known.shape != received.values.shape or known.dtype != received.dtype:
            return (received.values / received.weight).to(received.dtype)
        # Clients that did not send it have the server's value.
        mean = known.clone()
        finite = known.isfinite()
        if bool(finite.all()):
            return mean.add_(received.values, alpha=1 / total_weight)
        # From an infinite value there is no change to add: the mean is of what was sent, if all sent it.
        mean = torch.where(finite, mean, 0.0).add_(received.values, alpha=1 / total_weight)
        all_sent = received.weight >= total_weight * (1 - 1e-6)
        return mean if all_sent else torch.where(finite, mean, known)

    def take_notes(self) -> dict[str, str]:
        """Return what could not be averaged in the round and why, by name, each name once a run."""
        notes = {name: why for name, why in sorted(self._unfit.items()) if name not in self._noted}
        self._noted.update(notes)
        return notes

    def state_dict(self) -> dict[str, Any]:
        """Return what the module's own ``state_dict`` does not hold, as built-ins and tensors."""
        hidden = set(self.module.state_dict())
        values = self._state.values
        return {
            "moving": sorted(self._moving),
            "values": {name: values[name] for name in sorted(self._moving & values.keys() - hidden)},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict`` in the module."""
        self._moving = set(state["moving"])
        for name, value in state["values"].items():
            self._state.register(name, value.to(self._device))
        self.load()
