"""Payloads: what an update is encoded into, how that decodes, and its bytes."""

from lightning_lbgm.core.layout import Layout
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.codec import MessageError
from lightning_lbgm.payloads.coefficients import Coefficients, Combination
from lightning_lbgm.payloads.levels import Levels
from lightning_lbgm.payloads.low_rank import LowRank
from lightning_lbgm.payloads.rounded import Rounded
from lightning_lbgm.payloads.scaled import Scaled
from lightning_lbgm.payloads.sparse import Sparse

__all__ = [
    "Blocks",
    "Coefficients",
    "Combination",
    "Dense",
    "Layout",
    "Levels",
    "LowRank",
    "MessageError",
    "Payload",
    "Rounded",
    "Scaled",
    "Sparse",
]
