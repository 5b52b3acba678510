"""The look-back test of the authors' earlier code, to show where their tables come from. Not for use."""

from __future__ import annotations

from typing import Any

from lightning_lbgm import LookBack
from lightning_lbgm.payloads.base import Payload

__all__ = ["CoefficientTest"]


class CoefficientTest(LookBack):
    """Recycle a tensor where its look-back coefficient is in ``[threshold, 1]``, however large the angle is.

    Until the commit 27fa135 of the authors' code (github.com/shams-sam/FedOptim) its threshold was compared with rho,
    not with the squared sine of the paper: a larger threshold recycles less.

    Args:
        threshold: Smallest coefficient that is recycled, in (0, 1].
    """

    def __init__(self, threshold: float) -> None:
        super().__init__(threshold, granularity="layer")

    def _test(
        self, update: Payload, basis: Any, products: Any, threshold: float, age: int
    ) -> tuple[float, list[float] | None]:
        error, coefficients = super()._test(update, basis, products, 1.0, age)
        kept = coefficients is not None and threshold <= coefficients[0] <= 1
        return error, coefficients if kept else None
