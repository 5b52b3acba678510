"""Server: aggregation of decoded updates, the server optimizer, buffers and the error of compression."""

from lightning_lbgm.server.aggregation import Aggregator, WeightedMean
from lightning_lbgm.server.median import CoordinateMedian
from lightning_lbgm.server.presets import FedAdam, FedAvgM, FedYogi, ServerPreset

__all__ = ["Aggregator", "CoordinateMedian", "FedAdam", "FedAvgM", "FedYogi", "ServerPreset", "WeightedMean"]
