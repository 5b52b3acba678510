"""Prediction from the client's past updates: send coefficients of their span, and the compressed remainder."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lightning_lbgm.compression.chain import inner_chain
from lightning_lbgm.compression.row_span import RowSpan
from lightning_lbgm.compression.span import Numbers, Span, new_basis
from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Decision, Encoded, RoundResult, Stage, State
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.codec import MessageError, Reader, Writer, varint_size

__all__ = ["Predict", "Predicted"]


class Predicted(Payload):
    """Coefficients of past updates, and a correction: the number of coefficients, them, the correction's kind and body.

    Args:
        coefficients: Shape ``(r,)``, in the update's dtype; empty if there is no past.
        correction: What is added to the prediction.
        layout: The parameter tensors.
    """

    fields = ("coefficients", "correction")
    code = 11

    def __init__(self, coefficients: Tensor, correction: Payload, layout: LayoutLike) -> None:
        super().__init__(layout)
        self.coefficients = coefficients
        self.correction = correction

    @property
    def dtype(self) -> torch.dtype:
        return self.coefficients.dtype

    def relabel(self, layout: Layout) -> None:
        super().relabel(layout)
        self.correction.relabel(layout)

    def dense(self) -> Tensor:
        raise TypeError("A predicted update decodes only beside the past ones: call the stage's `decode`.")

    @property
    def num_bits(self) -> int:
        count = self.coefficients.numel()
        return 8 * (varint_size(count) + self.coefficients.nbytes + 1) + self.correction.num_bits

    def write(self, out: Writer) -> None:
        out.varint(self.coefficients.numel())
        out.tensor(self.coefficients)
        self.correction.write_inside(out)

    @classmethod
    def read(cls, data: Reader, size: int) -> Payload:
        coefficients = data.tensor(data.varint())
        return cls(coefficients, Payload.read_inside(data, size), (size,))


class Predict(Stage):
    """Predict the update by its projection on the client's last ones, and send the remainder compressed.

    Both ends keep the last r updates as the server reconstructed them. For a new update ``g`` the coefficients of its
    projection ``P g`` on their span are sent, and ``correction`` of ``g - P g``; the server adds the two up, and the
    sum joins the span. Nothing ever goes in full. Wrap it in ``ErrorFeedback``.

    Args:
        rank: r, vectors kept at each end.
        correction: Stage, or list of stages, for the remainder, such as ``TopK(0.03)``.
        rowwise: Whether each row of a parameter matrix has coefficients of its own, as in ``LookBack``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``rank`` is not positive.

    Examples:
        >>> from lightning_lbgm import TopK
        >>> stage = Predict(rank=1, correction=TopK(0.5))
        >>> state = stage.init()
        >>> stage.encode(Dense(torch.tensor([2.0, 1.0])), state).decoded.dense().tolist()
        [2.0, 0.0]
        >>> stage.encode(Dense(torch.tensor([3.0, 1.0])), state).decoded.dense().tolist()
        [3.0, 1.0]
    """

    terminal = True
    _shown_if_set = ("rowwise",)

    def __init__(self, rank: int, correction: Stage | list[Stage], rowwise: bool = False) -> None:
        self.rank = check_count("Predict", "rank", rank)
        self.correction = inner_chain("Predict", "correction", correction)
        self.rowwise = bool(rowwise)
        self._span = RowSpan() if rowwise else Span()

    def init(self) -> State:
        """Make the state of a client without a past."""
        return {"basis": new_basis(), "correction": self.correction.init()}

    def init_shared(self) -> State:
        return self.correction.init_shared()

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        basis = state["basis"]
        has_past, is_zero = bool(basis["payloads"]), update.is_zero()
        vectors = self._span.vectors(basis, update.layout)
        error, found = 1.0, cast("Numbers", [])
        if has_past and not is_zero:
            error, found = self._span.fit(basis, self._span.dots(basis, update, vectors), update)
        if not len(found) and has_past:
            error, found = 0.0 if is_zero else 1.0, [0.0] * self._span.count(basis, update.layout)
        coefficients = torch.tensor(found, dtype=update.dtype, device=update.device)
        predicted = self._predicted(coefficients, state, update.layout, vectors)
        remainder = update.dense().clone() if predicted is None else update.dense() - predicted
        step = self.correction.encode(Dense(remainder, update.layout), state["correction"], context)
        payload = Predicted(coefficients, step.payload, update.layout)
        total = self._remember(predicted, step.decoded, state, vectors)
        decision = Decision((), (error,), (), outcome="predicted")
        return Encoded(payload, decision, lambda _: total, needs_state=bool(len(found)), updates_state=True)

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        wanted = self._span.count(state["basis"], payload.layout) if state["basis"]["payloads"] else 0
        if not isinstance(payload, Predicted) or payload.coefficients.numel() != wanted:
            raise MessageError(f"The message does not have the {wanted} coefficients of a prediction.")
        correction = self.correction.decode(payload.correction, state["correction"], context)
        vectors = self._span.vectors(state["basis"], payload.layout)
        predicted = self._predicted(payload.coefficients, state, payload.layout, vectors)
        return self._remember(predicted, correction, state, vectors)

    def forget(self, state: State) -> None:
        state["basis"] = new_basis()
        self.correction.forget(state["correction"])

    def end_round(self, shared: State, result: RoundResult, context: Context = NO_CONTEXT) -> None:
        self.correction.end_round(shared, result, context)

    def _predicted(self, coefficients: Tensor, state: State, layout: Layout, vectors: list[Payload]) -> Tensor | None:
        """Return the prediction, a new vector; None without a past."""
        if not coefficients.numel():
            return None
        # Added to zeros, not the cached vector of a payload: it is written to.
        predicted = torch.zeros(layout.size, dtype=coefficients.dtype, device=coefficients.device)
        self._span.combination(state["basis"], coefficients, layout, vectors).add_to(predicted)
        return predicted

    def _remember(self, predicted: Tensor | None, correction: Payload, state: State, vectors: list[Payload]) -> Payload:
        """Add the correction to the prediction, let the sum join the span, and return it."""
        basis = state["basis"]
        if predicted is None:
            total = correction.dense().clone()
        else:
            correction.add_to(predicted)
            total = predicted
        reconstructed = Dense(total, correction.layout)
        products = self._span.dots(basis, reconstructed, vectors) if basis["payloads"] else None
        self._span.append(basis, reconstructed, products, self.rank, copy=False)
        return reconstructed
