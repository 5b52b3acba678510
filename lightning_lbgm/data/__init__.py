"""Data partitioning over clients, and the rounds drawn from the partition."""

from lightning_lbgm.data.availability import Availability
from lightning_lbgm.data.batches import BatchPlan
from lightning_lbgm.data.bulk import bulk_reader
from lightning_lbgm.data.client_loaders import LoaderFeed
from lightning_lbgm.data.cohort import resolve_cohort_size, sample_cohort
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.dropout import Dropout
from lightning_lbgm.data.feed import ClientFeed, Feed, LocalBatch
from lightning_lbgm.data.heterogeneity import count_labels, heterogeneity
from lightning_lbgm.data.label_table import LabelTable
from lightning_lbgm.data.labels import find_labels
from lightning_lbgm.data.participation import Participation, Turnout
from lightning_lbgm.data.partitioners import (
    DirichletPartitioner,
    FeaturePartitioner,
    IIDPartitioner,
    NaturalPartitioner,
    Partitioner,
    PathologicalPartitioner,
    QuantityPartitioner,
    ShardPartitioner,
    make_partitions,
)
from lightning_lbgm.data.rounds import Round, RoundLoader
from lightning_lbgm.data.samplers import Draw, PowerOfChoice, Sampler, SamplerState, SizeSampler, UniformSampler
from lightning_lbgm.data.sampling import iterates_by_itself, plan_from_loader, read_loader
from lightning_lbgm.data.subset import SampledSubset

__all__ = [
    "Availability",
    "BatchPlan",
    "ClientFeed",
    "DirichletPartitioner",
    "Draw",
    "Dropout",
    "FeaturePartitioner",
    "Feed",
    "IIDPartitioner",
    "LabelTable",
    "LoaderFeed",
    "LocalBatch",
    "NaturalPartitioner",
    "Participation",
    "Partitioner",
    "PathologicalPartitioner",
    "PowerOfChoice",
    "QuantityPartitioner",
    "Round",
    "RoundLoader",
    "SampledSubset",
    "Sampler",
    "SamplerState",
    "ShardPartitioner",
    "SizeSampler",
    "TrainLoaders",
    "Turnout",
    "UniformSampler",
    "bulk_reader",
    "count_labels",
    "find_labels",
    "heterogeneity",
    "iterates_by_itself",
    "make_partitions",
    "plan_from_loader",
    "read_loader",
    "resolve_cohort_size",
    "sample_cohort",
]
