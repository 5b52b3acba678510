"""Payload, the encoded update that is sent: its contract, and the dense kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.numerics import inner, inners
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer
from lightning_lbgm.payloads.registry import Registry

__all__ = ["Dense", "Payload", "inner"]


class Payload(ABC):
    """The body of a message: an update of ``size`` numbers in some encoding.

    A subclass names in ``fields`` what it is made of (tensors, payloads, lists of payloads, built-ins); its constructor
    takes them in that order, and then the layout. It implements ``dtype`` and ``dense``. The rest has defaults: it
    overrides ``split`` if its parts have an encoding smaller than all values, ``_dot`` if there is a shorter way
    than to decode, and with a ``code`` of its own ``write`` and ``read`` to have a binary form.

    Attributes:
        fields: Names of the attributes that make up the payload.
        code: Its kind in the binary form, 1 to 255; the package uses those below 64.
        layout: The parameter tensors. Both ends know them: they are not sent.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    code: ClassVar[int | None] = None
    _kinds: ClassVar[Registry[Payload]] = Registry()

    def __init__(self, layout: LayoutLike) -> None:
        self.layout = Layout.of(layout)
        self._squared_norm: float | None = None

    def __init_subclass__(cls) -> None:
        """Make the class known to ``from_state`` and ``read_from``; TypeError if another has its name or code."""
        super().__init_subclass__()
        Payload._kinds.add(cls)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype that it decodes to."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each parameter tensor."""
        return self.layout.sizes

    @property
    def size(self) -> int:
        """Number of entries, M for a whole update."""
        return self.layout.size

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        return self.tensors()[0].device

    def relabel(self, layout: Layout) -> None:
        """Take over the parameter tensors of an update of the same size, which a message does not name.

        Raises:
            MessageError: If the payload is not one of such an update.
        """
        if self.size != layout.size:
            raise MessageError(f"The message holds an update of {self.size} entries, not {layout.size}.")
        self.layout = layout

    # What it decodes to

    @abstractmethod
    def dense(self) -> Tensor:
        """Decode into a vector of shape ``(size,)``. May be a view of the payload: do not write to it."""

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha`` times the decoded update to ``out``, shape ``(size,)``, in place."""
        out.add_(self.dense(), alpha=alpha)

    def dot(self, other: Payload) -> float:
        """Return the inner product with another payload of the same size, without decoding if that can be done."""
        for one, two in ((self, other), (other, self)):
            result = one._dot(two)
            if result is not None:
                return result
        return inner(self.dense(), other.dense())

    def _dot(self, other: Payload) -> float | None:
        """Return the inner product if there is a shorter way for this pair of kinds, else None."""
        return None

    def squared_norm(self) -> float:
        """Return ``|g|^2``, computed once; in ``float64`` it may be 0 or infinite though ``g`` is not (at 1e±200)."""
        if self._squared_norm is None:
            product = self.dot(self)
            self._squared_norm = 0.0 if product < 0 else product  # factors that cancel leave round-off of either sign
        return self._squared_norm

    def is_zero(self) -> bool:
        """Whether all numbers are zero. It costs no pass over them once the squared norm is known, unless that is 0."""
        return self.squared_norm() == 0 and not bool(self.dense().any())

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return bool(torch.isfinite(self.dense()).all())

    def dots(self, others: Sequence[Payload]) -> list[float]:
        """Return the inner products with several payloads of the same size."""
        return [self.dot(other) for other in others]

    def split(self) -> list[Payload]:
        """Cut into one payload per parameter tensor."""
        parts = self.dense().split(self.sizes)
        return [Dense(part, Layout([shape])) for part, shape in zip(parts, self.layout.shapes)]

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        """Encode the numbers that it holds and keep its structure: a sparse payload's values, not its zeros.

        Args:
            encode: Applied to the numbers.
            factors: Whether ``encode`` may also be applied to numbers that are no entries of the update, such as the
                factors of a matrix.
        """
        return encode(Dense(self.dense(), self.layout))

    # What it is made of

    def tensors(self) -> list[Tensor]:
        """List the tensors that it holds."""
        found: list[Tensor] = []
        for name in self.fields:
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Tensor):
                    found.append(item)
                elif isinstance(item, Payload):
                    found += item.tensors()
        return found

    def clone(self) -> Payload:
        """Copy the payload with its tensors."""
        return Payload.from_state(self.to_state(copy=True), self.layout)

    def to_state(self, *, copy: bool = False) -> dict[str, Any]:
        """Return the payload as built-ins and tensors, for checkpoints. Tensors are shared unless they are copied."""
        fields = {name: _field_to_state(getattr(self, name), copy) for name in self.fields}
        return {"kind": type(self).__name__, "shapes": [list(shape) for shape in self.layout.shapes], **fields}

    @staticmethod
    def from_state(state: dict[str, Any], layout: LayoutLike | None = None) -> Payload:
        """Rebuild a payload from ``to_state``; a layout that is at hand saves making it anew."""
        kind = Payload._kinds.names[state["kind"]]
        fields = [_field_from_state(state[name]) for name in kind.fields]
        return kind(*fields, state["shapes"] if layout is None else layout)  # type: ignore[call-arg]

    # What is sent

    @property
    def num_bits(self) -> int:
        """Bits of the body: eight times the bytes of ``to_bytes``."""
        return sum(8 * tensor.nbytes for tensor in self.tensors())

    def to_bytes(self) -> bytes:
        """Return the body in its binary form, without its kind, size and dtype, which a ``Message`` has in its header.

        Raises:
            TypeError: If it has no binary form.
        """
        out = Writer()
        self.write(out)
        return out.getvalue()

    def write(self, out: Writer) -> None:
        """Write the body."""
        raise TypeError(f"{type(self).__name__} has no binary form: implement `code`, `write` and `read`.")

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        """Read a body of ``size`` entries, to the last byte."""
        raise MessageError(f"{cls.__name__} has no binary form.")

    @staticmethod
    def read_from(data: Reader, code: int, size: int) -> Payload:
        """Read a body of a kind given by its code.

        Raises:
            MessageError: If it is none.
        """
        kind = Payload._kinds.codes.get(code)
        if kind is None:
            raise MessageError(f"The message holds a payload of unknown kind {code}.")
        payload = kind.read(data, size)
        data.finish()
        return payload

    def write_inside(self, out: Writer) -> None:
        """Write the kind (a byte) and the body, as the last of another payload's."""
        out.byte(self.wire_code())
        self.write(out)

    @staticmethod
    def read_inside(data: Reader, size: int) -> Payload:
        """Undo ``write_inside``."""
        code = data.byte()
        return Payload.read_from(data.sub(), code, size)

    def wire_code(self) -> int:
        """Return the code of the kind.

        Raises:
            TypeError: If it has no binary form.
        """
        if self.code is None:
            self.write(Writer())  # says so
        assert self.code is not None
        return self.code


class Dense(Payload):
    """All values: ``size`` times the bits of the dtype (32 for ``float32``).

    Args:
        values: Shape ``(size,)``.
        layout: The parameter tensors; one vector if left out.

    Examples:
        >>> Dense(torch.zeros(10)).num_bits
        320
    """

    fields = ("values",)
    code = 1

    def __init__(self, values: Tensor, layout: LayoutLike | None = None) -> None:
        super().__init__((values.numel(),) if layout is None else layout)
        self.values = values

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def num_bits(self) -> int:
        return 8 * self.values.nbytes

    def dense(self) -> Tensor:
        return self.values

    def is_finite(self) -> bool:
        # The squared norm is wanted anyway, and tells unless it overflows.
        return math.isfinite(self.squared_norm()) or super().is_finite()

    def _dot(self, other: Payload) -> float | None:
        return inner(self.values, other.values) if isinstance(other, Dense) else None

    def dots(self, others: Sequence[Payload]) -> list[float]:
        vectors = [other.values for other in others if isinstance(other, Dense)]
        if len(vectors) < len(others):
            return super().dots(others)
        if self._squared_norm is not None:
            return inners(self.values, vectors)
        # Whoever asks for inner products will ask for the norm.
        *products, self._squared_norm = inners(self.values, [*vectors, self.values])
        return products

    def compress(self, encode: Callable[[Dense], Payload], *, factors: bool = False) -> Payload:
        return encode(self)

    def write(self, out: Writer) -> None:
        out.tensor(self.values)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        return cls(data.tensor(size), (size,))


def _field_to_state(value: Any, copy: bool) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if copy else value
    if isinstance(value, Payload):
        return value.to_state(copy=copy)
    if isinstance(value, dict):
        return {key: _field_to_state(item, copy) for key, item in value.items()}
    return [_field_to_state(item, copy) for item in value] if isinstance(value, list) else value


def _field_from_state(value: Any) -> Any:
    if isinstance(value, dict):
        return Payload.from_state(value) if "kind" in value else value
    return [_field_from_state(item) for item in value] if isinstance(value, list) else value
