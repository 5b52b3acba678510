"""Local training of a cohort's clients."""

from lightning_lbgm.clients.capture import LogCapture
from lightning_lbgm.clients.sequential import LocalResult, LocalTrainer

__all__ = ["LocalResult", "LocalTrainer", "LogCapture"]
