"""Deprecated names of ``lightning_lbgm.uplink``: they are in ``compression``, ``payloads`` and ``protocol`` now."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_ROOMS = {
    "compression": (
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
        "RoundResult",
        "SignSGD",
        "Signs",
        "Stage",
        "State",
        "TargetSavings",
        "TopK",
        "as_chain",
        "lbp_error",
    ),
    "payloads": (
        "Blocks",
        "Coefficients",
        "Combination",
        "Dense",
        "Layout",
        "LowRank",
        "MessageError",
        "Payload",
        "Rounded",
        "Scaled",
        "Sparse",
    ),
    "protocol": (
        "HEADER_BYTES",
        "ClientEnd",
        "Message",
        "Received",
        "Rejection",
        "ServerEnd",
    ),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = f"lightning_lbgm.{_HOMES[name]}"
    warnings.warn(
        f"`lightning_lbgm.uplink` goes in the next version: import `{name}` from `{room}`.",
        FutureWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(room), name)
