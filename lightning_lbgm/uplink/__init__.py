"""The uplink: stages that encode a client's update into a message and decode it on the server."""

from lightning_lbgm.uplink.atomo import ATOMO
from lightning_lbgm.uplink.blocks import Blocks
from lightning_lbgm.uplink.cast import Cast, Rounded
from lightning_lbgm.uplink.coefficients import Coefficients, Combination
from lightning_lbgm.uplink.context import NO_CONTEXT, Context, Decision, RoundResult, State
from lightning_lbgm.uplink.diana import DIANA
from lightning_lbgm.uplink.ends import ClientEnd, Received, Rejection, ServerEnd
from lightning_lbgm.uplink.error_feedback import ErrorFeedback
from lightning_lbgm.uplink.layout import Layout
from lightning_lbgm.uplink.lookback import LookBack
from lightning_lbgm.uplink.lowrank import LowRank
from lightning_lbgm.uplink.message import HEADER_BYTES, Message, MessageError
from lightning_lbgm.uplink.payload import Dense, Payload
from lightning_lbgm.uplink.powersgd import PowerSGD
from lightning_lbgm.uplink.predict import Predict, Predicted
from lightning_lbgm.uplink.qsgd import QSGD, Quantized
from lightning_lbgm.uplink.randk import RandK, RandomSparse
from lightning_lbgm.uplink.recycling import LayerRecycling, Omitted
from lightning_lbgm.uplink.scaled import Scaled
from lightning_lbgm.uplink.sign import Signs, SignSGD
from lightning_lbgm.uplink.sparse import Sparse
from lightning_lbgm.uplink.stage import Chain, Encoded, Stage, as_chain
from lightning_lbgm.uplink.subspace import lbp_error
from lightning_lbgm.uplink.threshold import TargetSavings
from lightning_lbgm.uplink.topk import TopK

__all__ = [
    "ATOMO",
    "DIANA",
    "HEADER_BYTES",
    "NO_CONTEXT",
    "QSGD",
    "Blocks",
    "Cast",
    "Chain",
    "ClientEnd",
    "Coefficients",
    "Combination",
    "Context",
    "Decision",
    "Dense",
    "Encoded",
    "ErrorFeedback",
    "LayerRecycling",
    "Layout",
    "LookBack",
    "LowRank",
    "Message",
    "MessageError",
    "Omitted",
    "Payload",
    "PowerSGD",
    "Predict",
    "Predicted",
    "Quantized",
    "RandK",
    "RandomSparse",
    "Received",
    "Rejection",
    "RoundResult",
    "Rounded",
    "Scaled",
    "ServerEnd",
    "SignSGD",
    "Signs",
    "Sparse",
    "Stage",
    "State",
    "TargetSavings",
    "TopK",
    "as_chain",
    "lbp_error",
]
