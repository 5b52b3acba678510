"""Local training of a cohort's clients."""

from lightning_lbgm.clients.base import ClientTrainer, ClientUpdate, LocalResult, RoundStart
from lightning_lbgm.clients.direct_step import direct_backward, direct_step
from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.clients.objective_turn import ObjectiveTurn
from lightning_lbgm.clients.objectives import SCAFFOLD, FedDyn, FedProx, LocalObjective, SharedObjective
from lightning_lbgm.clients.optimizer_start import OptimizerStart
from lightning_lbgm.clients.sequential import SequentialTrainer
from lightning_lbgm.clients.vectorized import VectorizedTrainer, Wary
from lightning_lbgm.clients.vmap.chunk import ELEMENTWISE_OPTIMIZERS, ChunkTrainer
from lightning_lbgm.clients.vmap.chunk_parts import ChunkStep
from lightning_lbgm.clients.vmap.guards import CannotVectorize, has_backward_hooks
from lightning_lbgm.clients.vmap.proof import ComesOutDifferent
from lightning_lbgm.clients.vmap.structure import structure_of

__all__ = [
    "ELEMENTWISE_OPTIMIZERS",
    "SCAFFOLD",
    "CannotVectorize",
    "ChunkStep",
    "ChunkTrainer",
    "ClientTrainer",
    "ClientUpdate",
    "ComesOutDifferent",
    "FedDyn",
    "FedProx",
    "LocalLoop",
    "LocalObjective",
    "LocalResult",
    "ObjectiveTurn",
    "OptimizerStart",
    "RoundStart",
    "SequentialTrainer",
    "SharedObjective",
    "VectorizedTrainer",
    "Wary",
    "direct_backward",
    "direct_step",
    "has_backward_hooks",
    "structure_of",
]
