"""Node's session: the federation of one client that a node takes part in, made for what the server asks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from typing_extensions import override

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context
from lightning_lbgm.flower.agreement import agreement, difference, digest, float_tensors
from lightning_lbgm.flower.node_ends import NodeChannel, NodeDownlink
from lightning_lbgm.flower.records import Greeting, Introduction, Task
from lightning_lbgm.payloads.codec import Reader
from lightning_lbgm.payloads.states import read_state
from lightning_lbgm.protocol.downlink_client import DownlinkClient
from lightning_lbgm.protocol.message import HEADER_BYTES, Message, MessageError
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.simulation.world import World, to_device
from lightning_lbgm.strategy.session import Session
from lightning_lbgm.strategy.settings import Settings

__all__ = ["Introduced", "NodeMemory", "NodeSession", "Unable", "put"]

NodeMemory = dict[str, Any]
"""What a node keeps between rounds, built-ins and tensors: ``federation``, its name; ``client``, the client's state;
and ``downlink``, what it holds of the global model."""


class Unable(Exception):
    """A node cannot do what it was asked, for a reason that the server is to know.

    Attributes:
        lasting: Whether it could not if it were asked again.
    """

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Introduced(Exception):
    """A fit that was begun for a greeting is over, because all that was asked is known.

    Attributes:
        introduction: The answer.
    """

    def __init__(self, introduction: Introduction) -> None:
        super().__init__("the node has introduced itself")
        self.introduction = introduction


class NodeSession(Session):
    """The federation of a node's one client.

    Args:
        settings: The client's, without a downlink.
        downlink: The stages of the downlink.
        asked: What the server asks.
        memory: What the node keeps; nothing of it is used in another federation.
        client_id: The client.

    Attributes:
        memory: What the node keeps.
        channel: The client's half of the channel.
    """

    def __init__(
        self, settings: Settings, downlink: Chain, asked: Task | Greeting, memory: NodeMemory, client_id: int
    ) -> None:
        super().__init__(settings)
        self.asked = asked
        self.memory = memory if memory.get("federation") == asked.federation else {"federation": asked.federation}
        self.channel = NodeChannel(settings.uplink)
        self.client_id = client_id
        self._downlink = downlink
        self._held: DownlinkClient | None = None

    @override
    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, world: World) -> Federation:
        federation = self.make(module, world)
        asked, feed = self.asked, self.feed
        assert feed is not None
        agreed = agreement(self.settings, self._downlink, federation.flat.layout)
        if isinstance(asked, Greeting):
            reason = difference(asked.settings, agreed)
            if reason is not None:
                raise Unable(reason)
            k = self.client_id
            raise Introduced(Introduction(k, feed.num_examples(k), feed.num_steps(k)))
        if digest(agreed) != asked.settings:
            raise Unable("The settings differ from those at the server: restart the node and the server with the same.")
        self._bring_up_to_date(federation, module, asked)
        self._restore(federation, asked)
        self._trainer = trainer
        return federation

    @property
    def held(self) -> int:
        """Version of the model that the node holds; 0: none."""
        if self._held is not None:
            return self._held.version
        kept: Any = self.memory.get("downlink")
        return 0 if kept is None else int(kept["version"])

    def remember(self) -> NodeMemory:
        """Return what the node is to keep after the round."""
        assert self.federation is not None
        assert self._held is not None
        downlink = {"downlink": self._held.state_dict()} if self._held.version else {}
        client = self.federation.clients.get(self.client_id, {})
        return to_device({"federation": self.asked.federation, "client": client, **downlink}, "cpu")

    def _bring_up_to_date(self, federation: Federation, module: pl.LightningModule, task: Task) -> None:
        """Make the global model out of what the node holds and what the server has sent."""
        flat, context = federation.flat, Context(task.round_index, {}, task.seed)
        kept = to_device(self.memory.get("downlink"), flat.device)
        end = DownlinkClient(self._downlink, flat.layout, float_tensors(module), kept)
        messages = []
        try:
            for data in task.model:
                messages.append(Message.from_bytes(data, flat.layout).to(flat.device))
                end.receive(messages[-1], context)
        except MessageError as error:
            raise Unable(f"The model does not follow from what this node holds. {error}") from error
        if end.held is None:
            raise Unable("The server sent no model, and this node holds none.")
        put(module, end.buffers)
        self._held = end
        bits = sum(8 * (len(data) - HEADER_BYTES) for data in task.model)
        is_whole = any(message.base_version == 0 for message in messages)
        federation.downlink = NodeDownlink(end.held.to(flat.dtype), bits, is_whole)

    def _restore(self, federation: Federation, task: Task) -> None:
        """Go on with the client's state, as far as the server agrees."""
        device = federation.flat.device
        federation.channel = self.channel
        federation.round_index = task.round_index
        try:
            shared = read_state(Reader(memoryview(task.shared), torch.float32))
        except MessageError as error:
            raise Unable(f"What the stages share cannot be read. {error}") from error
        federation.shared = to_device(shared, device)
        state = to_device(self.memory.get("client", {}), device)
        if "uplink" not in state:
            state["uplink"] = self.channel.init()
        self.channel.agree(state["uplink"], task.sequence, task.state_version)
        federation.clients[self.client_id] = state


@torch.no_grad()
def put(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Set buffers and frozen parameters by name."""
    own = float_tensors(module)
    for name, value in values.items():
        own[name].copy_(value)
