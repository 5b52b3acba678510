"""Downlink, a client's end: turns the server's messages into the parameters that it trains from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lbgm.compression.context import Context, State
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.core.layout import Layout, LayoutLike
from lightning_lbgm.payloads.base import Dense, Payload
from lightning_lbgm.payloads.multiple import Multiple
from lightning_lbgm.payloads.whole import WithState
from lightning_lbgm.protocol.broadcast import BROADCAST, as_downlink, checksum, downlink_context
from lightning_lbgm.protocol.message import Message, MessageError, check_buffers, open_message

__all__ = ["DownlinkClient"]


class DownlinkClient:
    """A client's end of a downlink: holds w^, and takes each message once and in order.

    When the client takes part in a round it tells the server its ``version``, and gets ``DownlinkServer.messages`` of
    it. A message that was lost, repeated or overtaken therefore does no harm: what is held stays as it was, and the
    next messages start from there, or are the whole model.

    Args:
        downlink: The stages, the same at both ends.
        layout: The parameter tensors; ints stand for vectors.
        buffers: The module's buffers that the server may send, by name; their shapes and dtypes count, not their
            values. None: none.
        state: A ``state_dict`` to go on from. None: the client holds nothing.

    Attributes:
        buffers: The buffers received last, by name.

    Examples:
        >>> from lightning_lbgm import TopK
        >>> from lightning_lbgm.protocol import DownlinkServer
        >>> server = DownlinkServer([TopK(0.5)], [2], keep_messages=True)
        >>> client = DownlinkClient([TopK(0.5)], [2])
        >>> for round_index, params in enumerate([[0.0, 0.0], [3.0, 1.0]]):
        ...     context = Context(round_index, seed=1)
        ...     _ = server.begin_round(torch.tensor(params), context)
        ...     for message in server.messages(client.version):
        ...         client.receive(message, context)
        >>> client.held.tolist()
        [3.0, 0.0]
    """

    def __init__(
        self,
        downlink: Sequence[Stage] | Stage,
        layout: LayoutLike,
        buffers: Mapping[str, Tensor] | None = None,
        state: State | None = None,
    ) -> None:
        self.downlink = as_downlink(downlink)
        self.layout = Layout.of(layout)
        self.buffers: dict[str, Tensor] = {}
        self._known_buffers = dict(buffers or {})
        self._state: State = state or {"held": None, "stages": self.downlink.init(), "version": 0}

    @property
    def version(self) -> int:
        """Checksum over all that made what is held; 0: nothing is."""
        return int(self._state["version"])

    @property
    def held(self) -> Tensor | None:
        """w^, shape ``(M,)``, not to be written to; None if no message was taken yet."""
        held: Tensor | None = self._state["held"]
        return held

    @torch.no_grad()
    def receive(self, data: bytes | Message, context: Context) -> None:
        """Take a message in.

        Args:
            data: The message.
            context: A context of the run, of any round, for its seed.

        Raises:
            MessageError: If the bytes are no message, it is not for all clients, is of another size, changes something
                else than what is held, or does not decode. What is held stays as it was.
        """
        message = open_message(data, self.layout)
        if message.client_id != BROADCAST:
            raise MessageError(f"The message is of client {message.client_id}, not of the server.")
        check_buffers(message.buffers, self._known_buffers, "DownlinkClient")
        if message.base_version == 0:
            state = self._whole(message)
        elif message.base_version == self.version:
            state = self._moved(message, downlink_context(context, message.round_index))
        else:
            raise MessageError(
                f"The message changes version {message.base_version} of the model, this client holds {self.version}:"
                " ask for `DownlinkServer.messages` of that."
            )
        self._state = state
        self.buffers.update(message.buffers)

    def _whole(self, message: Message) -> State:
        stages = self.downlink.init()
        payload: Payload = message.payload
        if isinstance(payload, WithState):
            if not isinstance(payload.state, dict) or payload.state.keys() != stages.keys():
                raise MessageError(f"The message has a state that is none of `{self.downlink!r}`.")
            stages, payload = payload.state, payload.body
        if not isinstance(payload, Dense):
            raise MessageError(f"The message has a whole model as a {type(payload).__name__}.")
        return {"held": payload.dense(), "stages": stages, "version": message.state_version}

    def _moved(self, message: Message, context: Context) -> State:
        if checksum(message.payload, message.base_version) != message.state_version:
            raise MessageError("The message does not lead to the version that it names.")
        factor, payload = 1.0, message.payload
        if isinstance(payload, Multiple):
            factor, payload = payload.factor, payload.body
        # On copies: a message that turns out to be none must leave no trace.
        stages, held = copy.deepcopy(self._state["stages"]), self._state["held"].clone()
        try:
            self.downlink.decode(payload, stages, context).add_to(held, factor)
        except (MessageError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise MessageError(f"The message does not decode to a change of the model. {error}") from error
        return {"held": held, "stages": stages, "version": message.state_version}

    def state_dict(self) -> State:
        """Return the state as built-ins and tensors (shared, not copied)."""
        return self._state
