"""Local training of a cohort's clients."""

from lightning_lbgm.clients.capture import LogCapture
from lightning_lbgm.clients.chunk import ELEMENTWISE_OPTIMIZERS, ChunkStep, ChunkTrainer
from lightning_lbgm.clients.direct_step import direct_step
from lightning_lbgm.clients.sequential import LocalTrainer, SequentialTrainer
from lightning_lbgm.clients.trainer import ClientTrainer, ClientUpdate, LocalResult, RoundStart
from lightning_lbgm.clients.vectorized import VectorizedTrainer

__all__ = [
    "ELEMENTWISE_OPTIMIZERS",
    "ChunkStep",
    "ChunkTrainer",
    "ClientTrainer",
    "ClientUpdate",
    "LocalResult",
    "LocalTrainer",
    "LogCapture",
    "RoundStart",
    "SequentialTrainer",
    "VectorizedTrainer",
    "direct_step",
]
