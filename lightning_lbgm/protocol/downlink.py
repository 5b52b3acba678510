"""Downlink, the server's end: what clients hold, what was sent to make them hold it, and who has heard it.

The server keeps the global parameters w, clients hold w^. In each round the server sends C(w - w^) to all, and both set
w^ to w^ + C(w - w^): what C leaves out is in the next difference again, which is error feedback by itself.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lbgm.compression.context import Context, RoundResult, State
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.multiple import Multiple
from lightning_lbgm.payloads.states import has_tensors
from lightning_lbgm.payloads.whole import WithState
from lightning_lbgm.protocol.broadcast import (
    BROADCAST,
    Delivery,
    as_downlink,
    checksum,
    downlink_context,
)
from lightning_lbgm.protocol.message import Message, count_bits
from lightning_lbgm.reports.reports import Broadcast

__all__ = ["Downlink", "DownlinkServer", "WholeModel"]


class Downlink(ABC):
    """The way from the server to the clients of a round.

    Attributes:
        last: What was sent to all clients in the last round; None if each gets the whole model anyway.
    """

    last: Broadcast | None = None

    @abstractmethod
    def begin_round(self, params: Tensor, context: Context, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """Send to all clients what has changed.

        Args:
            params: The global parameters w, shape ``(M,)``.
            context: The round's.
            buffers: Buffers that clients get as they are, by name. None: none.

        Returns:
            What the clients hold now, and train from, shape ``(M,)``. It is not to be written to.
        """

    @abstractmethod
    def deliver(self, client_id: int) -> Delivery:
        """Bring a client of the round up to date."""

    def state_dict(self) -> State:
        """Return the state as built-ins and tensors, shared, not copied: no round changes it after the next begins."""
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027 (a downlink may have none)
        """Go on from ``state_dict``, or back to it."""


class WholeModel(Downlink):
    """A downlink without stages: each client gets the global parameters, and all buffers, in each of its rounds."""

    def __init__(self) -> None:
        self._dense_bits = 0

    def begin_round(self, params: Tensor, context: Context, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        self._dense_bits = _dense_bits(params, buffers or {})
        return params

    def deliver(self, client_id: int) -> Delivery:
        return Delivery(self._dense_bits, self._dense_bits, whole=True)


class DownlinkServer(Downlink):
    """The server's end of a downlink made of stages.

    It is all that a simulation needs: the clients of a round hold the same w^, which is here. A message that adds more
    than it takes away is damped: it goes with the factor ``<x, C(x)> / |C(x)|^2``, x being the difference, for which
    ``|x - factor * C(x)|`` is smallest, and never above ``|x|`` whatever C is. So a quantizer of large variance does
    not diverge here.

    Args:
        downlink: The stages; see ``as_downlink``.
        layout: The parameter tensors; ints stand for vectors.
        keep_messages: Whether ``messages`` will be asked for; else only their sizes are kept.

    Attributes:
        last: What was sent in the last round.

    Examples:
        >>> from lightning_lbgm import TopK
        >>> server = DownlinkServer([TopK(0.5)], layout=[2])
        >>> server.begin_round(torch.tensor([0.0, 0.0]), Context(0)).tolist()
        [0.0, 0.0]
        >>> server.deliver(7).bits  # the whole model: two floats
        64
        >>> server.begin_round(torch.tensor([3.0, 1.0]), Context(1)).tolist()
        [3.0, 0.0]
        >>> server.begin_round(torch.tensor([3.0, 1.0]), Context(2)).tolist()
        [3.0, 1.0]
    """

    def __init__(self, downlink: Sequence[Stage] | Stage, layout: LayoutLike, *, keep_messages: bool = False) -> None:
        self.downlink = as_downlink(downlink)
        self.layout = Layout.of(layout)
        self.last = Broadcast()
        self._keeps_messages = keep_messages
        self._state: State = {
            "held": None,
            "stages": self.downlink.init(),
            "shared": self.downlink.init_shared(),
            "number": 0,  # of the last message
            "round": 0,
            "version": 0,  # checksum over all that w^ is made of, if messages are kept
            "sent": [],  # the last messages, while they are smaller together than the whole model: see `_keep`
            "heard": {},  # the number of the last message that a client has
        }
        self._buffers: dict[str, Tensor] = {}
        self._dense_bits = 0
        self._difference: Tensor | None = None

    @property
    def held(self) -> Tensor | None:
        """w^, what clients hold that are up to date, shape ``(M,)``; None before the first round."""
        held: Tensor | None = self._state["held"]
        return held

    @torch.no_grad()
    def begin_round(self, params: Tensor, context: Context, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        state = self._begin(context.round_index)
        self._buffers = dict(buffers or {})
        self._dense_bits = _dense_bits(params, self._buffers)
        held = state["held"]
        if held is None:
            return self._start_over(params)
        difference = self._difference = torch.sub(params, held, out=self._difference)
        update = Dense(difference, self.layout)
        if not update.is_finite():
            return self._start_over(params)  # nothing can be added to what is not a number
        context = replace(downlink_context(context, context.round_index), shared=state["shared"])
        encoded = self.downlink.encode(update, state["stages"], context)
        seen = encoded.decoded
        factor, error = _damping(update, seen)
        payload = encoded.payload if factor == 1 else Multiple(encoded.payload, factor)
        moved = state["held"] = held.clone()
        seen.add_to(moved, factor)
        bits = self._keep(payload, context.round_index)
        self.last = Broadcast(bits, error, encoded.decision)
        result = RoundResult(self.layout, params, seen.dense(), (bits,), (update.num_bits,), (encoded.decision,))
        self.downlink.end_round(state["shared"], result, context)
        return moved

    def deliver(self, client_id: int) -> Delivery:
        """Bring a client up to date by the messages that it lacks, or by the whole model if that is smaller."""
        state = self._state
        missing = self._since(state["heard"].get(client_id))
        state["heard"][client_id] = state["number"]
        if missing is None:
            return Delivery(count_bits(self._whole().num_bits, self._buffers), self._dense_bits, whole=True)
        if not missing:
            return Delivery(0, self._dense_bits)
        *earlier, last = [sent["bits"] for sent in missing]
        return Delivery(sum(earlier) + count_bits(last, self._buffers), self._dense_bits, missed=len(earlier))

    def messages(self, version: int = 0) -> list[bytes]:
        """Return the messages that bring a client up to date, in order.

        Args:
            version: ``DownlinkClient.version``, which the client tells; 0: it holds nothing.
        """
        state, missing = self._state, self._lacking(version)
        if missing is None:
            numbers = (state["round"], state["number"], 0, state["version"])
            return [Message(BROADCAST, self._whole(), self._buffers, *numbers).to_bytes()]
        return [self._message(sent, self._buffers if sent is missing[-1] else {}) for sent in missing]

    def state_dict(self) -> State:
        return self._state

    def load_state_dict(self, state: State) -> None:
        self._state = state

    def _begin(self, round_index: int) -> State:
        """Return a state that the round may change: of the one before nothing will be changed."""
        before = self._state
        self._state = {
            **before,
            "stages": copy.deepcopy(before["stages"]),
            "shared": copy.deepcopy(before["shared"]),
            "number": before["number"] + 1,
            "round": round_index,
            "sent": list(before["sent"]),
            "heard": dict(before["heard"]),
        }
        return self._state

    def _start_over(self, params: Tensor) -> Tensor:
        """Let everybody get the whole model."""
        held = params.clone()
        version = checksum(Dense(held), 0) if self._keeps_messages else 0
        self._state.update(
            held=held, stages=self.downlink.init(), shared=self.downlink.init_shared(), version=version, sent=[]
        )
        self.last = Broadcast()
        return held

    def _whole(self) -> Payload:
        """Return all that a client needs that has nothing: w^, and what the stages remember of earlier messages."""
        body, stages = Dense(self._state["held"], self.layout), self._state["stages"]
        return WithState(body, stages) if has_tensors(stages) else body

    def _keep(self, payload: Payload, round_index: int) -> int:
        """Add a message to those that clients may lack, and drop the oldest ones that cost more than the whole model.

        Returns:
            The message's bits.
        """
        state, bits = self._state, payload.num_bits
        sent = {"number": state["number"], "round": round_index, "bits": bits}
        if self._keeps_messages:
            base = state["version"]
            state["version"] = checksum(payload, base)
            sent.update(base=base, version=state["version"], payload=payload.to_state(copy=True))
        state["sent"].append(sent)
        most, total = self._whole().num_bits, 0
        for position in reversed(range(len(state["sent"]))):
            total += state["sent"][position]["bits"]
            if total > most:
                del state["sent"][: position + 1]
                break
        return bits

    def _since(self, number: int | None) -> list[dict[str, Any]] | None:
        """Return the messages after one that a client has; None if the whole model is cheaper."""
        if number is None:
            return None
        missing = [sent for sent in self._state["sent"] if sent["number"] > number]
        return missing if len(missing) == self._state["number"] - number else None

    def _lacking(self, version: int) -> list[dict[str, Any]] | None:
        """Return the messages that follow a version; None if the whole model is cheaper, or the version is unknown."""
        if version and version == self._state["version"]:
            return []
        following = [sent["number"] for sent in self._state["sent"] if version and sent["base"] == version]
        return self._since(following[0] - 1 if following else None)

    def _message(self, sent: dict[str, Any], buffers: Mapping[str, Tensor]) -> bytes:
        payload = Payload.from_state(sent["payload"], self.layout)
        numbers = (sent["round"], sent["number"], sent["base"], sent["version"])
        return Message(BROADCAST, payload, dict(buffers), *numbers).to_bytes()


def _dense_bits(params: Tensor, buffers: Mapping[str, Tensor]) -> int:
    return 8 * (params.nbytes + sum(buffer.nbytes for buffer in buffers.values()))


def _damping(difference: Payload, seen: Payload) -> tuple[float, float]:
    """Return the factor that a decoded message is applied with, and the share of the squared difference that it leaves.

    It is 1 unless the difference would grow. What leaves least in this round is not always best in the long run: what
    an unbiased message adds is noise, which cancels over rounds.
    """
    whole, size, product = difference.squared_norm(), seen.squared_norm(), seen.dot(difference)
    if not (whole > 0 and 0 < size < math.inf):
        return 1.0, 0.0 if difference.is_zero() else 1.0
    left = 1 - (2 * product - size) / whole
    factor = Multiple.representable(max(0.0, product / size))
    damped = 1 - factor * (2 * product - factor * size) / whole
    return (1.0, max(0.0, left)) if left <= 1 else (factor, min(1.0, max(0.0, damped)))
