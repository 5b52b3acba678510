"""Federated learning for PyTorch Lightning, with its communication compressed, measured and logged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_lbgm.__about__ import __version__
from lightning_lbgm._compat.registration import register_when_imported

if TYPE_CHECKING:
    from lightning_lbgm.callbacks.base import FederatedCallback
    from lightning_lbgm.callbacks.client_evaluation import ClientEvaluation
    from lightning_lbgm.callbacks.communication import LBGMCallback
    from lightning_lbgm.callbacks.convergence import ConvergenceMonitor
    from lightning_lbgm.callbacks.gradient_space import GradientSpaceCallback
    from lightning_lbgm.callbacks.partition import PartitionReport
    from lightning_lbgm.clients import SCAFFOLD, FedDyn, FedProx
    from lightning_lbgm.compression import (
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
        Relax,
        SignSGD,
        TargetSavings,
        Ternary,
        TopK,
    )
    from lightning_lbgm.data import (
        DirichletPartitioner,
        Dropout,
        FeaturePartitioner,
        IIDPartitioner,
        NaturalPartitioner,
        PathologicalPartitioner,
        PowerOfChoice,
        QuantityPartitioner,
        Sampler,
        ShardPartitioner,
        SizeSampler,
        UniformSampler,
    )
    from lightning_lbgm.network import NetworkClock
    from lightning_lbgm.server import CoordinateMedian, FedAdam, FedAvgM, FedYogi, WeightedMean
    from lightning_lbgm.strategy.federated import LBGMFederated

__all__ = [
    "ATOMO",
    "DIANA",
    "QSGD",
    "SCAFFOLD",
    "Cast",
    "ClientEvaluation",
    "ConvergenceMonitor",
    "CoordinateMedian",
    "DirichletPartitioner",
    "Dropout",
    "ErrorFeedback",
    "FeaturePartitioner",
    "FedAdam",
    "FedAvgM",
    "FedDyn",
    "FedProx",
    "FedYogi",
    "FederatedCallback",
    "GradientSpaceCallback",
    "IIDPartitioner",
    "LBGMCallback",
    "LBGMFederated",
    "LayerRecycling",
    "LookBack",
    "NaturalPartitioner",
    "NetworkClock",
    "PartitionReport",
    "PathologicalPartitioner",
    "PowerOfChoice",
    "PowerSGD",
    "Predict",
    "QuantityPartitioner",
    "RandK",
    "Relax",
    "Sampler",
    "ShardPartitioner",
    "SignSGD",
    "SizeSampler",
    "TargetSavings",
    "Ternary",
    "TopK",
    "UniformSampler",
    "WeightedMean",
    "__version__",
]

# Names are resolved when they are asked for (PEP 562), so that the rooms without Lightning can be imported without it.
_ROOMS = {
    "ClientEvaluation": "callbacks.client_evaluation",
    "ConvergenceMonitor": "callbacks.convergence",
    "FederatedCallback": "callbacks.base",
    "GradientSpaceCallback": "callbacks.gradient_space",
    "LBGMCallback": "callbacks.communication",
    "PartitionReport": "callbacks.partition",
    "LBGMFederated": "strategy.federated",
    "NetworkClock": "network",
    **dict.fromkeys(("SCAFFOLD", "FedDyn", "FedProx"), "clients"),
    **dict.fromkeys(("CoordinateMedian", "FedAdam", "FedAvgM", "FedYogi", "WeightedMean"), "server"),
    **dict.fromkeys(
        (
            "DirichletPartitioner",
            "Dropout",
            "FeaturePartitioner",
            "IIDPartitioner",
            "NaturalPartitioner",
            "PathologicalPartitioner",
            "PowerOfChoice",
            "QuantityPartitioner",
            "Sampler",
            "ShardPartitioner",
            "SizeSampler",
            "UniformSampler",
        ),
        "data",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS.get(name, 'compression')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
