"""Registration with ``pytorch_lightning``: the strategy and the callbacks that it must know."""

from __future__ import annotations

from typing import Any

from lightning_lbgm._compat.twin_import import meet_twin
from lightning_lbgm.callbacks.communication import LBGMCallback
from lightning_lbgm.callbacks.convergence import ConvergenceMonitor
from lightning_lbgm.callbacks.gradient_space import GradientSpaceCallback
from lightning_lbgm.strategy.federated import LBGMFederated

__all__ = ["meet"]


def meet(twin: Any) -> None:
    """Make the twin know the strategy and the callbacks."""
    meet_twin(LBGMFederated, (LBGMCallback, ConvergenceMonitor, GradientSpaceCallback), twin)
