"""What happens to a module's buffers (BatchNorm's running statistics) between server and clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["BufferMode", "Buffers"]

BufferMode = Literal["average", "server", "client"]


class Buffers:
    """Hand the server's buffers to each client and treat what comes back as ``mode`` says.

    Every client starts a round from the same buffers, so that nothing leaks from one client to the next:

    - ``"average"``: the persistent float buffers that a client changed are sent with its update and averaged with the
      clients' weights. Integer buffers (``num_batches_tracked``) and non-persistent ones stay the server's.
    - ``"server"``: the server's buffers stay as they are; nothing is sent.
    - ``"client"``: each client keeps its own float buffers from round to round; nothing is sent, and the server's stay
      as they are.

    Args:
        module: The module whose buffers are meant.
        mode: One of the three.
    """

    def __init__(self, module: nn.Module, mode: BufferMode) -> None:
        self.module = module
        self.mode = mode
        # The base class's method: a user's override may leave buffers out of the checkpoint, not out of the model.
        persistent = set(nn.Module.state_dict(module))
        named = dict(module.named_buffers())
        self._any = bool(named)
        self.names = [name for name, b in named.items() if name in persistent and b.is_floating_point()]
        self._own: dict[str, Tensor] = named  # the module's tensors, whatever training puts in their place
        self._server: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def downlink_bits(self) -> int:
        """Bits of the float buffers that the server sends to one client with the parameters."""
        if self.mode == "client":
            return 0
        return sum(8 * self._own[name].nbytes for name in self.names)

    @torch.no_grad()
    def begin_round(self) -> None:
        """Remember the module's buffers as the server's."""
        self._sums = {}
        if self._any:
            self._own = dict(self.module.named_buffers())
            self._server = self.read()

    @torch.no_grad()
    def load(self, own: dict[str, Tensor] | None = None) -> None:
        """Set the module's buffers to the server's, or to the client's own where it has some."""
        if not self._any:
            return
        current = dict(self.module.named_buffers())
        for name, value in self._server.items():
            value = own[name] if own is not None and name in own else value
            buffer = self._own[name]
            buffer.copy_(value)
            if current.get(name) is not buffer:  # training has put another tensor in its place
                owner, _, attribute = name.rpartition(".")
                setattr(self.module.get_submodule(owner), attribute, buffer)

    def read(self) -> dict[str, Tensor]:
        """Copy the module's buffers."""
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def start(self, own: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what ``load`` would set: the server's buffers, or the client's own where it has some. Not copied."""
        return {**self._server, **{name: value for name, value in (own or {}).items() if name in self._server}}

    def changed(self, current: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the float buffers that differ from the server's, by name.

        Args:
            current: All buffers of a client. None: the module's own tensors.
        """
        if not self._any or self.mode == "server":
            return {}
        current = dict(self.module.named_buffers()) if current is None else current
        return {
            name: current[name]
            for name in self.names
            if name in current
            and current[name].shape == self._server[name].shape
            and not torch.equal(current[name], self._server[name])
        }

    @torch.no_grad()
    def receive(self, buffers: dict[str, Tensor], weight: float) -> None:
        """Add a client's changed buffers to the average, with the client's weight."""
        for name, buffer in buffers.items():
            change = (buffer - self._server[name]).mul_(weight)
            if name in self._sums:
                self._sums[name].add_(change)
            else:
                self._sums[name] = change

    @property
    def received(self) -> list[str]:
        """Names of the buffers that clients have sent in this round."""
        return sorted(self._sums)

    @torch.no_grad()
    def combine(self, names: Iterable[str], all_reduce_sum: Callable[[Tensor], None]) -> None:
        """Add up what several processes have received.

        Args:
            names: The buffers received anywhere, in the same order in each process.
            all_reduce_sum: Replaces a tensor by its sum over the processes.
        """
        sums = {name: self._sums.get(name, torch.zeros_like(self._server[name])) for name in names}
        if not sums:
            return
        together = torch.cat([value.reshape(-1) for value in sums.values()])
        all_reduce_sum(together)
        for value, part in zip(sums.values(), together.split([value.numel() for value in sums.values()])):
            value.copy_(part.view_as(value))
        self._sums = sums

    @torch.no_grad()
    def finish_round(self, total_weight: float) -> None:
        """Set the module's buffers to the server's for the next round: averaged, or as they were."""
        for name, change in self._sums.items():
            self._server[name].add_(change, alpha=1 / total_weight)
        self._sums = {}
        self.load()
