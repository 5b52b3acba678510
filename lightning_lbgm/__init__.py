"""Federated learning for PyTorch Lightning, with its communication compressed, measured and logged."""

from lightning_lbgm.__about__ import __version__
from lightning_lbgm.callback import LBGMCallback
from lightning_lbgm.data import DirichletPartitioner, IIDPartitioner, NaturalPartitioner, PathologicalPartitioner
from lightning_lbgm.strategy import LBGMFederated
from lightning_lbgm.uplink import ErrorFeedback, LookBack, SignSGD, TopK

__all__ = [
    "DirichletPartitioner",
    "ErrorFeedback",
    "IIDPartitioner",
    "LBGMCallback",
    "LBGMFederated",
    "LookBack",
    "NaturalPartitioner",
    "PathologicalPartitioner",
    "SignSGD",
    "TopK",
    "__version__",
]
