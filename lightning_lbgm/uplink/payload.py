"""What crosses the uplink: the payloads, what they hold and how many bits that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Blocks", "Coefficients", "Dense", "Payload", "Scaled", "Signs", "Sparse", "inner"]

# Outside this range a float32 sum of squares has lost digits to underflow, or overflows.
_SAFE_SQUARES = (1e-26, 1e36)


def inner(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors of shape ``(n,)``.

    It runs in the vectors' dtype, at memory bandwidth, and again in ``float64`` where the first result shows that
    ``float32`` may have under- or overflowed, so that tests on it stay true for updates of any scale.
    """
    result = float(torch.dot(a, b))
    low, high = _SAFE_SQUARES
    if a.dtype != torch.float64 and not low < abs(result) < high:
        result = float(torch.dot(a.double(), b.double()))
    return result


class Payload(ABC):
    """The body of a message: an update of ``size`` numbers in some encoding.

    A subclass is constructed from the tensors that it sends, in the order of ``tensors``, and ``sizes``, so that a
    stored one can be rebuilt. It overrides ``split`` where its parts have an encoding smaller than all values.

    Attributes:
        sizes: Number of entries of each parameter tensor, in order. Both ends know it: it is not sent.
    """

    _kinds: ClassVar[dict[str, type[Payload]]] = {}

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._squared_norm: float | None = None

    def __init_subclass__(cls) -> None:
        """Make the class known to ``from_state``."""
        Payload._kinds[cls.__name__] = cls

    @property
    def size(self) -> int:
        """Number of entries, M for a whole update."""
        return sum(self.sizes)

    @property
    def num_bits(self) -> int:
        """Bits sent: exactly the bytes of ``tensors``. Framing (kind, round, layout) is not counted."""
        return sum(8 * tensor.nbytes for tensor in self.tensors())

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """List the tensors that are sent."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Decode into a vector of shape ``(size,)``. May be a view of the payload: do not write to it."""

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha`` times the decoded update to ``out``, shape ``(size,)``, in place."""
        out.add_(self.dense(), alpha=alpha)

    def dot(self, other: Payload) -> float:
        """Return the inner product with another payload of the same size."""
        return inner(self.dense(), other.dense())

    def squared_norm(self) -> float:
        """Return ``|g|^2``, computed once."""
        if self._squared_norm is None:
            self._squared_norm = self._compute_squared_norm()
        return self._squared_norm

    def _compute_squared_norm(self) -> float:
        return self.dot(self)

    def split(self) -> list[Payload]:
        """Cut into one payload per parameter tensor."""
        return [Dense(part) for part in self.dense().split(self.sizes)]

    def clone(self) -> Payload:
        """Copy the payload with its tensors."""
        return self._from_state({**self.to_state(), "tensors": [tensor.clone() for tensor in self.tensors()]})

    def to_state(self) -> dict[str, Any]:
        """Return the payload as built-ins and tensors, for checkpoints. Tensors are shared, not copied."""
        return {"kind": type(self).__name__, "sizes": list(self.sizes), "tensors": self.tensors()}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Payload:
        """Rebuild a payload from ``to_state``."""
        return Payload._kinds[state["kind"]]._from_state(state)

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Payload:
        return cls(*state["tensors"], state["sizes"])  # type: ignore[call-arg]


class Dense(Payload):
    """All values: ``size`` times the bits of the dtype (32 for ``float32``).

    Args:
        values: Shape ``(size,)``.
        sizes: Entries of each parameter tensor; all in one where left out.

    Examples:
        >>> Dense(torch.zeros(10)).num_bits
        320
    """

    def __init__(self, values: Tensor, sizes: Sequence[int] | None = None) -> None:
        super().__init__((values.numel(),) if sizes is None else sizes)
        self.values = values

    def tensors(self) -> list[Tensor]:
        return [self.values]

    def dense(self) -> Tensor:
        return self.values


class Sparse(Payload):
    """Some values and where they stand: for each, its dtype's bits and 32 for the index.

    Args:
        values: Shape ``(k,)``.
        indices: Shape ``(k,)``, ``int32`` and increasing (``int64`` for 2^31 parameters or more).
        sizes: Entries of each parameter tensor.

    Examples:
        >>> payload = Sparse(torch.tensor([5.0, -7.0]), torch.tensor([1, 3], dtype=torch.int32), sizes=(4,))
        >>> payload.dense().tolist(), payload.num_bits
        ([0.0, 5.0, 0.0, -7.0], 128)
    """

    def __init__(self, values: Tensor, indices: Tensor, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.values = values
        self.indices = indices

    def tensors(self) -> list[Tensor]:
        return [self.values, self.indices]

    def dense(self) -> Tensor:
        out = self.values.new_zeros(self.size)
        out[self.indices] = self.values
        return out

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        out.index_add_(0, self.indices, self.values, alpha=alpha)

    def dot(self, other: Payload) -> float:
        if other is self:
            return inner(self.values, self.values)
        return inner(self.values, other.dense()[self.indices])

    def split(self) -> list[Payload]:
        ends = torch.tensor(self.sizes).cumsum(0)
        cuts = torch.searchsorted(self.indices.cpu().long(), ends).tolist()
        parts: list[Payload] = []
        begin, offset = 0, 0
        for cut, size in zip(cuts, self.sizes):
            parts.append(Sparse(self.values[begin:cut], self.indices[begin:cut] - offset, (size,)))
            begin, offset = cut, offset + size
        return parts


class Signs(Payload):
    """One sign bit for each entry, eight to a byte, and one scale: ``8 * ceil(size / 8)`` bits and the scale's.

    Args:
        bits: Shape ``(ceil(size / 8),)``, ``uint8``; bit ``i % 8`` of byte ``i // 8`` is set where entry ``i >= 0``.
        scale: Shape ``()``, the magnitude that every entry decodes to.
        sizes: Entries of each parameter tensor.
    """

    def __init__(self, bits: Tensor, scale: Tensor, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.bits = bits
        self.scale = scale

    @staticmethod
    def pack(values: Tensor, scale: Tensor, sizes: Sequence[int]) -> Signs:
        """Keep the signs of ``values``, shape ``(size,)``; zero counts as positive."""
        positive = torch.nn.functional.pad((values >= 0).to(torch.uint8), (0, -values.numel() % 8)).view(-1, 8)
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=values.device)
        return Signs((positive * weights).sum(1, dtype=torch.uint8), scale, sizes)

    def tensors(self) -> list[Tensor]:
        return [self.bits, self.scale]

    def dense(self) -> Tensor:
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        positive = ((self.bits[:, None] >> shifts) & 1).view(-1)[: self.size].to(self.scale.dtype)
        return positive.mul_(2).sub_(1).mul_(self.scale)

    def _compute_squared_norm(self) -> float:
        return float(self.scale) ** 2 * self.size

    def split(self) -> list[Payload]:
        return [Signs.pack(part, self.scale, (part.numel(),)) for part in self.dense().split(self.sizes)]


class Coefficients(Payload):
    """Look-back coefficients (LBC, rho), one for each basis vector: they mean nothing without the look-back gradient.

    Args:
        values: Shape ``(rank,)``.
        sizes: Entries of each parameter tensor that they stand for.
    """

    def __init__(self, values: Tensor, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.values = values

    def tensors(self) -> list[Tensor]:
        return [self.values]

    def dense(self) -> Tensor:
        raise TypeError("Coefficients decode only beside the look-back gradient: call the stage's `decode`.")


class Scaled(Payload):
    """A stored payload times a number: what a coefficient decodes to. It is never sent."""

    def __init__(self, base: Payload, factor: float) -> None:
        super().__init__(base.sizes)
        self.base = base
        self.factor = factor

    def tensors(self) -> list[Tensor]:
        raise TypeError("A scaled look-back gradient exists at each end and is never sent.")

    def dense(self) -> Tensor:
        return self.base.dense() * self.factor

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self.base.add_to(out, alpha * self.factor)


class Blocks(Payload):
    """One payload for each parameter tensor: what layer-wise decisions send."""

    def __init__(self, parts: Sequence[Payload]) -> None:
        super().__init__([part.size for part in parts])
        self.parts = list(parts)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts])

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        for part, view in zip(self.parts, out.split(self.sizes)):
            part.add_to(view, alpha)

    def split(self) -> list[Payload]:
        return self.parts

    def clone(self) -> Payload:
        return Blocks([part.clone() for part in self.parts])

    def to_state(self) -> dict[str, Any]:
        return {"kind": "Blocks", "parts": [part.to_state() for part in self.parts]}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Payload:
        return Blocks([Payload.from_state(part) for part in state["parts"]])
