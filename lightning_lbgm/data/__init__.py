"""Partitioning a dataset over clients, and the rounds drawn from it."""

from lightning_lbgm.data.batches import BatchPlan, bulk_reader
from lightning_lbgm.data.cohort import resolve_cohort_size, sample_cohort
from lightning_lbgm.data.deal import deal
from lightning_lbgm.data.feed import ClientFeed, LocalBatch, has_plain_sampler, plan_from_loader
from lightning_lbgm.data.labels import find_labels
from lightning_lbgm.data.loader import Round, RoundLoader
from lightning_lbgm.data.partition import (
    DirichletPartitioner,
    IIDPartitioner,
    NaturalPartitioner,
    Partitioner,
    PathologicalPartitioner,
    make_partitions,
)

__all__ = [
    "BatchPlan",
    "ClientFeed",
    "DirichletPartitioner",
    "IIDPartitioner",
    "LocalBatch",
    "NaturalPartitioner",
    "Partitioner",
    "PathologicalPartitioner",
    "Round",
    "RoundLoader",
    "bulk_reader",
    "deal",
    "find_labels",
    "has_plain_sampler",
    "make_partitions",
    "plan_from_loader",
    "resolve_cohort_size",
    "sample_cohort",
]
