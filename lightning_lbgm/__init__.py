"""Federated learning for PyTorch Lightning, with its communication compressed, measured and logged."""

from lightning_lbgm import _twin_import
from lightning_lbgm.__about__ import __version__
from lightning_lbgm.callback import LBGMCallback
from lightning_lbgm.convergence import ConvergenceMonitor
from lightning_lbgm.data import DirichletPartitioner, IIDPartitioner, NaturalPartitioner, PathologicalPartitioner
from lightning_lbgm.gradient_space_callback import GradientSpaceCallback
from lightning_lbgm.strategy import LBGMFederated
from lightning_lbgm.uplink import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LayerRecycling,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    SignSGD,
    TargetSavings,
    TopK,
)

__all__ = [
    "ATOMO",
    "DIANA",
    "QSGD",
    "Cast",
    "ConvergenceMonitor",
    "DirichletPartitioner",
    "ErrorFeedback",
    "GradientSpaceCallback",
    "IIDPartitioner",
    "LBGMCallback",
    "LBGMFederated",
    "LayerRecycling",
    "LookBack",
    "NaturalPartitioner",
    "PathologicalPartitioner",
    "PowerSGD",
    "Predict",
    "RandK",
    "SignSGD",
    "TargetSavings",
    "TopK",
    "__version__",
]

_twin_import.when_imported(LBGMFederated, [LBGMCallback, ConvergenceMonitor, GradientSpaceCallback])
