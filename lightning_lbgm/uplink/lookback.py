"""The look-back test: send one coefficient where the new update is nearly parallel to the last one sent in full.

Azam, Hosseinalipour, Qiu, Brinton: "Recycling Model Updates in Federated Learning: Are Gradient Subspaces
Low-Rank?", ICLR 2022 (arXiv 2202.00280), Algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from lightning_lbgm.uplink.payload import Blocks, Coefficients, Payload, Scaled
from lightning_lbgm.uplink.stage import Decision, Encoded, Stage, State

__all__ = ["LookBack", "lbp_error"]


def lbp_error(dot: float, update_squared_norm: float, lbg_squared_norm: float) -> float:
    """Return the look-back phase (LBP) error of an update g against a look-back gradient (LBG) l.

    It is the squared sine of the angle between them, ``sin^2(alpha) = 1 - <g, l>^2 / (|g|^2 |l|^2)``, clamped into
    [0, 1] against round-off.

    Args:
        dot: ``<g, l>``.
        update_squared_norm: ``|g|^2 > 0``.
        lbg_squared_norm: ``|l|^2 > 0``.

    Examples:
        >>> lbp_error(dot=1.0, update_squared_norm=2.0, lbg_squared_norm=1.0)  # 45 degrees
        0.5
    """
    return min(1.0, max(0.0, 1.0 - (dot / update_squared_norm) * (dot / lbg_squared_norm)))


class LookBack(Stage):
    """Recycle the look-back gradient (LBGM): send a scalar where the update has kept its direction.

    Each client and the server hold the client's LBG ``l``, the last update that it sent in full. For a new update
    ``g``, with LBP error ``sin^2(alpha)`` (see ``lbp_error``):

    - error <= ``threshold``: the look-back coefficient (LBC) ``rho = <g, l> / |l|^2`` is sent, one scalar of the
      update's dtype (32 bits), and the server uses ``rho * l``. The client is *recycled*.
    - otherwise, or without an LBG: ``g`` is sent in full (as compressed by the stages before) and becomes the LBG.
      The client is *refreshed*.

    A zero update is recycled with ``rho = 0``; a zero LBG is refreshed. LBGs are kept in the form in which they were
    sent: sparse after ``TopK``, packed after ``SignSGD``.

    Args:
        threshold: delta in the paper, the largest LBP error that is recycled, in [0, 1]. 0 recycles nothing, not even
            where the error rounds to 0, and equals sending everything; 1 recycles whenever there is an LBG.
        granularity: ``"model"``, one test on the whole update, as in the paper; or ``"layer"``, one test for each
            parameter tensor, as in the authors' code.

    Raises:
        TypeError: If ``threshold`` is not a number.
        ValueError: If ``threshold`` is outside [0, 1] or ``granularity`` is unknown.

    Examples:
        >>> from lightning_lbgm.uplink import Dense
        >>> stage = LookBack(threshold=0.2)
        >>> state = stage.init()
        >>> stage.encode(Dense(torch.tensor([1.0, 1.0])), state).payload.num_bits  # no LBG yet: two floats
        64
        >>> encoded = stage.encode(Dense(torch.tensor([2.0, 2.5])), state)
        >>> encoded.payload.num_bits, encoded.decision.recycled, encoded.decision.coefficients
        (32, (True,), (2.25,))
    """

    terminal = True

    def __init__(self, threshold: float = 0.2, granularity: Literal["model", "layer"] = "model") -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"`LookBack(threshold=...)` must be a number in [0, 1]; got {threshold!r}.")
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"`LookBack(threshold=...)` must be in [0, 1], for it bounds a squared sine; got {threshold!r}."
                " Use 0.2 for the paper's setting, 0 to send everything."
            )
        if granularity not in ("model", "layer"):
            raise ValueError(
                f"`LookBack(granularity=...)` must be 'model' (one test for each client) or 'layer' (one for each"
                f" parameter tensor); got {granularity!r}."
            )
        self.threshold = float(threshold)
        self.granularity = granularity

    def init(self) -> State:
        """Make the state of a client without an LBG: ``{"lbgs": {}}``, filled with one entry a test."""
        return {"lbgs": {}}

    def encode(self, update: Payload, state: State) -> Encoded:
        parts = self._parts(update)
        sent: list[Payload] = []
        errors: list[float] = []
        coefficients: list[float] = []
        for index, part in enumerate(parts):
            error, coefficient = self._test(part, state["lbgs"].get(index))
            errors.append(error)
            coefficients.append(coefficient)
            if math.isnan(coefficient):
                _store_lbg(state, index, part)
                sent.append(part)
            else:
                values = part.tensors()[0].new_tensor([coefficient], dtype=_coefficient_dtype(part))
                sent.append(Coefficients(values, part.sizes))
        recycled = tuple(not math.isnan(c) for c in coefficients)
        payload = Blocks(sent) if self.granularity == "layer" else sent[0]
        return Encoded(payload, Decision(recycled, tuple(errors), tuple(coefficients)))

    def reconstruct(self, payload: Payload, state: State) -> Payload:
        parts = [
            Scaled(Payload.from_state(state["lbgs"][index]["payload"]), float(part.values))
            if isinstance(part, Coefficients)
            else part
            for index, part in enumerate(self._parts(payload))
        ]
        return Blocks(parts) if self.granularity == "layer" else parts[0]

    def decode(self, payload: Payload, state: State) -> Payload:
        for index, part in enumerate(self._parts(payload)):
            if not isinstance(part, Coefficients):
                _store_lbg(state, index, part)
        return self.reconstruct(payload, state)

    def _parts(self, payload: Payload) -> list[Payload]:
        return payload.split() if self.granularity == "layer" else [payload]

    def _test(self, update: Payload, lbg: dict[str, Any] | None) -> tuple[float, float]:
        """Return the LBP error, and the LBC or NaN where the update is to be sent in full."""
        if lbg is None:
            return 1.0, math.nan
        squared_norm, lbg_squared_norm = update.squared_norm(), lbg["squared_norm"]
        if squared_norm == 0:
            return 0.0, 0.0 if self.threshold > 0 else math.nan
        if lbg_squared_norm == 0:
            return 1.0, math.nan
        dot = update.dot(Payload.from_state(lbg["payload"]))
        error = lbp_error(dot, squared_norm, lbg_squared_norm)
        coefficient = dot / lbg_squared_norm
        # A coefficient that its dtype cannot hold would decode to something that is not finite.
        fits = abs(coefficient) <= torch.finfo(_coefficient_dtype(update)).max
        recycle = self.threshold > 0 and error <= self.threshold and fits
        return error, coefficient if recycle else math.nan


def _coefficient_dtype(payload: Payload) -> torch.dtype:
    """Coefficients travel in the update's own precision."""
    return next((tensor.dtype for tensor in payload.tensors() if tensor.is_floating_point()), torch.float32)


def _store_lbg(state: State, index: int, update: Payload) -> None:
    """Keep a copy of a fully sent update, in the storage of the LBG before it where that fits."""
    old = state["lbgs"].get(index)
    kept = Payload.from_state(old["payload"]).tensors() if old is not None else []
    new = update.tensors()
    if len(kept) == len(new) and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(kept, new)):
        assert old is not None
        payload = old["payload"]
        for a, b in zip(kept, new):
            a.copy_(b)
    else:
        payload = update.clone().to_state()
    state["lbgs"][index] = {"payload": payload, "squared_norm": update.squared_norm()}
