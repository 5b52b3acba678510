"""Local training of a cohort's clients."""

from lightning_lbgm.clients.capture import LogCapture
from lightning_lbgm.clients.chunk import ELEMENTWISE_OPTIMIZERS, ChunkStep, ChunkTrainer
from lightning_lbgm.clients.direct_step import direct_backward, direct_step
from lightning_lbgm.clients.optimizer_start import OptimizerStart
from lightning_lbgm.clients.proof import ComesOutDifferent
from lightning_lbgm.clients.sequential import LocalTrainer, SequentialTrainer
from lightning_lbgm.clients.structure import structure_of
from lightning_lbgm.clients.trainer import ClientTrainer, ClientUpdate, LocalResult, RoundStart
from lightning_lbgm.clients.vectorized import VectorizedTrainer, Wary
from lightning_lbgm.clients.watch import CannotVectorize, has_backward_hooks

__all__ = [
    "ELEMENTWISE_OPTIMIZERS",
    "CannotVectorize",
    "ChunkStep",
    "ChunkTrainer",
    "ClientTrainer",
    "ClientUpdate",
    "ComesOutDifferent",
    "LocalResult",
    "LocalTrainer",
    "LogCapture",
    "OptimizerStart",
    "RoundStart",
    "SequentialTrainer",
    "VectorizedTrainer",
    "Wary",
    "direct_backward",
    "direct_step",
    "has_backward_hooks",
    "structure_of",
]
