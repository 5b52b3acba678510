"""Message to all clients: what both ends of a downlink agree on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_lbgm.compression.chain import Chain, as_chain
from lightning_lbgm.compression.context import Context
from lightning_lbgm.compression.methods.error_feedback import ErrorFeedback
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.payloads.base import Payload

__all__ = ["BROADCAST", "Delivery", "as_downlink", "checksum", "downlink_context"]

BROADCAST = 2**32 - 1
"""The ``client_id`` of a message that is for all clients."""

_PATH = (-2,)  # no client's number: what the server draws is independent of what clients do


@dataclass(frozen=True)
class Delivery:
    """What brought one client up to date.

    Attributes:
        bits: Bits that it received, without headers.
        dense_bits: Bits of the whole model and its buffers, as FedAvg sends them.
        whole: Whether it got the whole model.
        missed: Messages of earlier rounds that it got before this round's.
    """

    bits: int
    dense_bits: int = 0
    whole: bool = False
    missed: int = 0


def as_downlink(stages: Sequence[Stage] | Stage) -> Chain:
    """Make the chain of a downlink.

    Raises:
        TypeError: If an element is not a stage.
        ValueError: If a stage has no place in a downlink, or in this order.
    """
    chain = as_chain(stages, "downlink")
    for stage in chain.stages_inside():
        if isinstance(stage, ErrorFeedback):
            raise ValueError(
                f"`downlink={chain!r}` has `ErrorFeedback`, but what a downlink leaves out is in the next round's"
                f" difference anyway, and would be sent twice: write `downlink={stage.stage!r}`."
            )
        if stage.uses_mean:
            raise ValueError(
                f"`downlink={chain!r}` has `{type(stage).__name__}`, which puts in what the server aggregated last:"
                " clients do not know that. Leave it out of the downlink."
            )
    return chain


def downlink_context(context: Context, round_index: int) -> Context:
    """Return the context of a message to all clients: random choices are the same at both ends, whoever reads it."""
    return replace(context, round_index=round_index, shared={}, path=_PATH)


def checksum(payload: Payload, base: int) -> int:
    """Return the version of w^ after a payload, by the one before; never 0, which is no version."""
    return zlib.crc32(payload.to_bytes(), base) or 1
