"""Local training of a cohort's clients."""

from lightning_lbgm.clients.capture import LogCapture
from lightning_lbgm.clients.direct_step import direct_step
from lightning_lbgm.clients.sequential import LocalTrainer, SequentialTrainer
from lightning_lbgm.clients.trainer import ClientTrainer, ClientUpdate, LocalResult, RoundStart

__all__ = [
    "ClientTrainer",
    "ClientUpdate",
    "LocalResult",
    "LocalTrainer",
    "LogCapture",
    "RoundStart",
    "SequentialTrainer",
    "direct_step",
]
