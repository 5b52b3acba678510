"""World of processes that simulate one federation together: collectives and moves of client state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lbgm.core.nested import map_leaves

__all__ = ["ProcessGroupWorld", "World", "to_device"]

Move = tuple[int, int, int]  # client, from rank, to rank


class World:
    """The world of one process: nothing is sent.

    Attributes:
        rank: This process's number, from 0.
        size: Number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_open(self) -> bool:
        """Whether the processes still can talk to each other."""
        return True

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, in place; the result is the same to the bit on every rank."""

    def gather(self, value: Any, purpose: str) -> list[Any]:
        """Return every rank's value, in order of rank, on every rank.

        Args:
            value: Anything that can be pickled, without tensors on an accelerator.
            purpose: What is gathered, the same on every rank.
        """
        return [value]

    def gather_to_first(self, value: Any, purpose: str) -> list[Any]:
        """Return every rank's value on rank 0, and nothing elsewhere."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        return value

    def move(self, moves: Sequence[Move], states: MutableMapping[int, Any], device: torch.device) -> None:
        """Carry clients' states from rank to rank.

        Args:
            moves: Client, from rank and to rank, of every move anywhere: the same on every rank.
            states: The states that this rank holds, changed in place. A client may have none.
            device: Where its tensors lie.
        """

    def close(self) -> None:
        """Break the connection, so that the other ranks fail instead of waiting for this one."""


class ProcessGroupWorld(World):
    """The world of torch's default process group. Each method but ``close`` must be called on every rank.

    Objects travel through Gloo, because it notices at once that a process has ended. So a method that sends objects
    stands before one that sends tensors through NCCL, which would wait.

    Args:
        is_ours: Whether the process group is the federation's own. If another has made it, ``close`` leaves it alone:
            the federation talks through a group of its own, and closes that.

    Raises:
        RuntimeError: In every method but ``close``, if another process has ended.
    """

    def __init__(self, is_ours: bool = True) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._is_ours = is_ours
        is_gloo = dist.get_backend() == "gloo"
        self._objects: Any = dist.group.WORLD if is_gloo and is_ours else dist.new_group(backend="gloo")
        self._tensors: Any = self._objects if is_gloo else dist.group.WORLD

    @property
    def is_open(self) -> bool:
        return self._objects is not None and dist.is_initialized()

    def all_reduce_sum(self, tensor: Tensor) -> None:
        with _explained():
            dist.all_reduce(tensor, group=self._tensors)

    def gather(self, value: Any, purpose: str) -> list[Any]:
        parts: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(parts, (purpose, value), group=self._objects)
        return _checked(parts, purpose)

    def gather_to_first(self, value: Any, purpose: str) -> list[Any]:
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _explained():
            dist.gather_object((purpose, value), parts, group=self._objects)
        return [] if parts is None else _checked(parts, purpose)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with _explained():
            dist.broadcast_object_list(box, group=self._objects)
        return box[0]

    def move(self, moves: Sequence[Move], states: MutableMapping[int, Any], device: torch.device) -> None:
        # In one order for all: the first pair that is not done yet has both its ranks waiting for it, so none hangs.
        ordered = sorted(moves, key=lambda move: (move[1], move[2], move[0]))
        for (source, target), pair in itertools.groupby(ordered, key=lambda move: (move[1], move[2])):
            with _explained():
                if self.rank == source:
                    carried = {k: to_device(states.pop(k), "cpu") for k, _, _ in pair if k in states}
                    dist.send_object_list([carried], dst=target, group=self._objects)
                elif self.rank == target:
                    box: list[Any] = [None]
                    dist.recv_object_list(box, src=source, group=self._objects)
                    states.update(to_device(box[0], device))

    def close(self) -> None:
        objects, self._objects, self._tensors = self._objects, None, None
        if dist.is_initialized() and (self._is_ours or objects is not None):
            dist.destroy_process_group(None if self._is_ours else objects)


def to_device(value: Any, device: torch.device | str) -> Any:
    """Move the tensors in nested built-ins."""
    return map_leaves(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def _checked(parts: list[Any], purpose: str) -> list[Any]:
    found = [part[0] for part in parts]
    if any(name != purpose for name in found):
        raise RuntimeError(
            f"The processes of the federation are out of step, at {found}: they must all run the same script with the"
            " same settings, and save checkpoints on all ranks or none."
        )
    return [part[1] for part in parts]


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "The connection to another process of the federation broke. That process has most likely ended with an"
            " error: look for it above, or in that process's own output."
        ) from error
