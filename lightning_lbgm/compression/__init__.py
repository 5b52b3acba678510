"""Compression: stages that encode a client's update and decode it on the server, and chains of them."""

from lightning_lbgm.compression.chain import Chain, as_chain
from lightning_lbgm.compression.context import NO_CONTEXT, Context, Decision, RoundResult, State
from lightning_lbgm.compression.methods.atomo import ATOMO
from lightning_lbgm.compression.methods.cast import Cast
from lightning_lbgm.compression.methods.diana import DIANA
from lightning_lbgm.compression.methods.error_feedback import ErrorFeedback
from lightning_lbgm.compression.methods.layer_recycling import LayerRecycling, Omitted
from lightning_lbgm.compression.methods.lookback import LookBack
from lightning_lbgm.compression.methods.powersgd import PowerSGD
from lightning_lbgm.compression.methods.predict import Predict, Predicted
from lightning_lbgm.compression.methods.qsgd import QSGD, Quantized
from lightning_lbgm.compression.methods.randk import RandK, RandomSparse
from lightning_lbgm.compression.methods.relax import Relax
from lightning_lbgm.compression.methods.sign import Signs, SignSGD
from lightning_lbgm.compression.methods.target_savings import TargetSavings
from lightning_lbgm.compression.methods.ternary import Ternary
from lightning_lbgm.compression.methods.topk import TopK
from lightning_lbgm.compression.span import lbp_error
from lightning_lbgm.compression.stage import Encoded, Stage

__all__ = [
    "ATOMO",
    "DIANA",
    "NO_CONTEXT",
    "QSGD",
    "Cast",
    "Chain",
    "Context",
    "Decision",
    "Encoded",
    "ErrorFeedback",
    "LayerRecycling",
    "LookBack",
    "Omitted",
    "PowerSGD",
    "Predict",
    "Predicted",
    "Quantized",
    "RandK",
    "RandomSparse",
    "Relax",
    "RoundResult",
    "SignSGD",
    "Signs",
    "Stage",
    "State",
    "TargetSavings",
    "Ternary",
    "TopK",
    "as_chain",
    "lbp_error",
]
