"""LBGM, the look-back test: coefficients if an update is nearly in the span of the last ones sent in full.

Azam, Hosseinalipour, Qiu, Brinton: "Recycling Model Updates in Federated Learning: Are Gradient Subspaces
Low-Rank?", ICLR 2022 (arXiv 2202.00280), Algorithm 1. ``rank`` above 1 is this package's generalisation of it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_lbgm.compression.methods.cast import check_format
from lightning_lbgm.compression.methods.target_savings import TargetSavings, check_threshold, threshold_of
from lightning_lbgm.compression.row_span import RowSpan
from lightning_lbgm.compression.span import Basis, Numbers, Span, new_basis
from lightning_lbgm.compression.stage import NO_CONTEXT, Context, Decision, Encoded, RoundResult, Stage, State
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.core.validation import check_count
from lightning_lbgm.payloads.base import Payload
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.codec import MessageError
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.payloads.rounded import rounded

__all__ = ["LookBack"]


class LookBack(Stage):
    """Recycle the look-back gradient (LBGM): send a scalar if the update has kept its direction.

    Each client and the server hold the client's look-back gradients (LBGs) ``l_1 ... l_r``, its last updates that went
    in full; the paper has one. For a new update ``g``, with LBP error ``1 - |P g|^2 / |g|^2``, P the projection on
    their span (for one LBG the squared sine of the angle, see ``lbp_error``):

    - error <= ``threshold``: the look-back coefficients (LBC, rho) of the projection are sent, one number an LBG in the
      update's dtype (32 bits), and the server uses ``P g``; for one LBG ``rho = <g, l> / |l|^2`` and ``rho * l``. The
      client is *recycled*.
    - otherwise, or without an LBG: ``g`` is sent in full (as compressed by the stages before) and becomes an LBG; the
      oldest one beyond ``rank`` goes. The client is *refreshed*.

    A zero update is recycled with ``rho = 0``; LBGs that are all zero are refreshed. LBGs are kept in the form in which
    they were sent (sparse after ``TopK``, packed after ``SignSGD``, factors after ``ATOMO``), and the test is computed
    there.

    Args:
        threshold: delta in the paper, the largest LBP error that is recycled, in [0, 1]. 0 recycles nothing, not even
            if the error rounds to 0, and equals sending everything; 1 recycles whenever there is an LBG. Also a
            function of the round (from 0), or ``TargetSavings(0.9)``.
        granularity: ``"model"``, one test on the whole update, as in the paper; or ``"layer"``, one test for each
            parameter tensor, as in the authors' code.
        rank: r, LBGs kept for each test: r vectors of memory a client, and r inner products an update. Above 1 it
            recycles more of noisy updates (see docs/choosing.md).
        max_age: Rounds in a row that a test may recycle; then the update goes in full. None: any number.
        rowwise: Whether each row of a parameter matrix has coefficients of its own.
        store: Deprecated: ``LBGMFederated(client_store=...)``.
        dtype: Dtype that LBGs are kept in at both ends, ``torch.bfloat16``, ``torch.float16`` or its name: half the
            memory. Tests and coefficients are those of the rounded LBGs; an update that goes in full is applied as it
            was sent. None: as sent.
        capacity: Deprecated: ``LBGMFederated(client_capacity=...)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``threshold`` is outside [0, 1], ``granularity`` or ``dtype`` is unknown, ``store`` is empty, or
            a count is not positive.

    Examples:
        >>> from lightning_lbgm.payloads import Dense
        >>> stage = LookBack(threshold=0.2)
        >>> state = stage.init()
        >>> stage.encode(Dense(torch.tensor([1.0, 1.0])), state).payload.num_bits  # no LBG yet: two floats
        64
        >>> encoded = stage.encode(Dense(torch.tensor([2.0, 2.5])), state)
        >>> encoded.payload.num_bits, encoded.decision.recycled, encoded.decision.coefficients
        (32, (True,), (2.25,))
    """

    terminal = True
    _shown_if_set = ("rank", "max_age", "rowwise", "store", "dtype", "capacity")

    def __init__(
        self,
        threshold: float | Callable[[int], float] | TargetSavings = 0.2,
        granularity: Literal["model", "layer"] = "model",
        rank: int = 1,
        max_age: int | None = None,
        rowwise: bool = False,
        store: str = "memory",
        dtype: torch.dtype | str | None = None,
        capacity: int | None = None,
    ) -> None:
        self.threshold = check_threshold(threshold)
        if granularity not in ("model", "layer"):
            raise ValueError(
                f"`LookBack(granularity=...)` must be 'model' (one test for each client) or 'layer' (one for each"
                f" parameter tensor); got {granularity!r}."
            )
        self.granularity = granularity
        self.rank = check_count("LookBack", "rank", rank)
        self.max_age = None if max_age is None else check_count("LookBack", "max_age", max_age)
        self.rowwise = bool(rowwise)
        if not isinstance(store, (str, os.PathLike)):
            raise TypeError(f"`LookBack(store=...)` must be 'memory' or a directory; got {store!r}.")
        if not str(store):
            raise ValueError("`LookBack(store='')` names no directory: pass 'memory' or a directory.")
        if str(store) != "memory" or capacity is not None:
            warnings.warn(
                "`LookBack(store=..., capacity=...)` go in the next version: where clients' states are kept, and of how"
                " many, are settings of the federation, `LBGMFederated(client_store=..., client_capacity=...)`.",
                FutureWarning,
                stacklevel=2,
            )
        self.store = os.fspath(store)
        self.dtype = None if dtype is None else check_format("LookBack", dtype)
        self.capacity = None if capacity is None else check_count("LookBack", "capacity", capacity)
        self._span = RowSpan() if rowwise else Span()

    def init(self) -> State:
        """Make the state of a client without an LBG: filled with the LBGs and the age of each test."""
        return {"lbgs": {}, "ages": {}}

    def init_shared(self) -> State:
        return self.threshold.init() if isinstance(self.threshold, TargetSavings) else {}

    def encode(self, update: Payload, state: State, context: Context = NO_CONTEXT) -> Encoded:
        threshold = threshold_of(self.threshold, context)
        lbgs, ages = state["lbgs"], state["ages"]
        known = bool(lbgs)
        sent: list[Payload] = []
        decoded: list[Payload] = []
        errors: list[float] = []
        newest: list[float] = []
        for index, part in enumerate(self._parts(update)):
            basis = lbgs.get(index)
            vectors = self._span.vectors(basis, part.layout) if basis is not None else []
            products = self._span.dots(basis, part, vectors) if basis is not None else None
            error, coefficients = self._test(part, basis, products, threshold, ages.get(index, 0))
            errors.append(error)
            if coefficients is None:
                sent.append(part)
                decoded.append(part)
                self._refresh(lbgs, index, part, products)
                ages[index] = 0
                newest.append(float("nan"))
            else:
                values = torch.tensor(coefficients, dtype=part.dtype, device=part.device)
                sent.append(Coefficients(values, part.layout))
                decoded.append(self._span.combination(lbgs[index], values, part.layout, vectors))
                ages[index] = ages.get(index, 0) + 1
                newest.append(float(coefficients[-1]))
        recycled = tuple(coefficient == coefficient for coefficient in newest)
        seen = self._whole(decoded, update.layout)
        return Encoded(
            self._whole(sent, update.layout),
            Decision(recycled, tuple(errors), tuple(newest), threshold, _outcome(recycled)),
            lambda _: seen,
            # One LBG that is replaced, everywhere, refers to nothing.
            needs_state=known and (any(recycled) or self.rank > 1),
            updates_state=not all(recycled),
        )

    def decode(self, payload: Payload, state: State, context: Context = NO_CONTEXT) -> Payload:
        parts = self._parts(payload)
        decoded = [self._decoded(index, part, state) for index, part in enumerate(parts)]
        for index, part in enumerate(parts):
            if not isinstance(part, Coefficients):
                known = state["lbgs"].get(index)
                products = self._span.dots(known, part) if known is not None else None
                self._refresh(state["lbgs"], index, part, products)
        return self._whole(decoded, payload.layout)

    def forget(self, state: State) -> None:
        state["lbgs"].clear()
        state["ages"].clear()

    def end_round(self, shared: State, result: RoundResult, context: Context = NO_CONTEXT) -> None:
        if isinstance(self.threshold, TargetSavings):
            self.threshold.update(shared, result)

    def _parts(self, payload: Payload) -> list[Payload]:
        return payload.split() if self.granularity == "layer" else [payload]

    def _whole(self, parts: list[Payload], layout: Layout) -> Payload:
        return Blocks(parts, layout) if self.granularity == "layer" else parts[0]

    def _test(
        self, update: Payload, basis: Basis | None, products: Any, threshold: float, age: int
    ) -> tuple[float, Numbers | None]:
        """Return the LBP error, and the LBCs or None if the update is to be sent in full."""
        if basis is None:
            return 1.0, None
        may_recycle = threshold > 0 and (self.max_age is None or age < self.max_age)
        if update.is_zero():
            return 0.0, [0.0] * self._span.count(basis, update.layout) if may_recycle and update.size else None
        error, coefficients = self._span.fit(basis, products, update)
        if not (may_recycle and error <= threshold and len(coefficients)):
            return error, None
        if self.rowwise and 8 * update.dtype.itemsize * len(coefficients) > update.num_bits:
            return error, None  # rows as short as those of low-rank adapters: the update itself is less to send
        return error, coefficients

    def _refresh(self, lbgs: dict[int, Basis], index: int, update: Payload, products: Any) -> None:
        """Let an update that went in full become an LBG, by its ``dots`` with those that there are."""
        basis = lbgs.setdefault(index, new_basis())
        kept = self._kept(update)
        if kept is not update and products is not None and self.rank > 1:
            products = self._span.dots(basis, kept)  # of what is kept: the Gram matrix must be that of one span
        self._span.append(basis, kept, products, self.rank)

    def _kept(self, update: Payload) -> Payload:
        """Return an update as it is kept: rounded, if that is smaller; packed signs are not."""
        dtype = self.dtype
        if dtype is None or dtype.itemsize >= update.dtype.itemsize:
            return update
        smaller = update.compress(lambda numbers: rounded(numbers, dtype), factors=True)
        return smaller if _num_bytes(smaller) < _num_bytes(update) else update

    def _decoded(self, index: int, part: Payload, state: State) -> Payload:
        if not isinstance(part, Coefficients):
            return part
        basis = state["lbgs"].get(index)
        wanted = 0 if basis is None else self._span.count(basis, part.layout)
        if basis is None or part.values.numel() != wanted:
            raise MessageError(f"The message has {part.values.numel()} look-back coefficients, not {wanted}.")
        return self._span.combination(basis, part.values, part.layout)


def _outcome(recycled: tuple[bool, ...]) -> str:
    if all(recycled):
        return "recycled"
    return "partly recycled" if any(recycled) else "refreshed"


def _num_bytes(payload: Payload) -> int:
    return sum(tensor.nbytes for tensor in payload.tensors())
