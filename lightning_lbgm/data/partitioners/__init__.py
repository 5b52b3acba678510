"""Partitioners: the rules by which the examples of a dataset are dealt to clients."""

from lightning_lbgm.data.partitioners.base import Partitioner, make_partitions
from lightning_lbgm.data.partitioners.dirichlet import DirichletPartitioner
from lightning_lbgm.data.partitioners.features import FeaturePartitioner
from lightning_lbgm.data.partitioners.iid import IIDPartitioner
from lightning_lbgm.data.partitioners.natural import NaturalPartitioner
from lightning_lbgm.data.partitioners.pathological import PathologicalPartitioner
from lightning_lbgm.data.partitioners.quantity import QuantityPartitioner
from lightning_lbgm.data.partitioners.shards import ShardPartitioner

__all__ = [
    "DirichletPartitioner",
    "FeaturePartitioner",
    "IIDPartitioner",
    "NaturalPartitioner",
    "Partitioner",
    "PathologicalPartitioner",
    "QuantityPartitioner",
    "ShardPartitioner",
    "make_partitions",
]
