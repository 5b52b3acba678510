"""The uplink: stages that encode a client's update into a message and decode it on the server."""

from lightning_lbgm.uplink.error_feedback import ErrorFeedback
from lightning_lbgm.uplink.lookback import LookBack, lbp_error
from lightning_lbgm.uplink.message import Message
from lightning_lbgm.uplink.payload import Blocks, Coefficients, Dense, Payload, Scaled, Signs, Sparse
from lightning_lbgm.uplink.sign import SignSGD
from lightning_lbgm.uplink.stage import Chain, Decision, Encoded, Stage, State, as_chain
from lightning_lbgm.uplink.topk import TopK

__all__ = [
    "Blocks",
    "Chain",
    "Coefficients",
    "Decision",
    "Dense",
    "Encoded",
    "ErrorFeedback",
    "LookBack",
    "Message",
    "Payload",
    "Scaled",
    "SignSGD",
    "Signs",
    "Sparse",
    "Stage",
    "State",
    "TopK",
    "as_chain",
    "lbp_error",
]
