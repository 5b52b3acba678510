"""Agreement of both ends: the settings that a server and its nodes must share, as text that names what differs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.core.layout import Layout
from lightning_lbgm.strategy.identity import identify
from lightning_lbgm.strategy.settings import Settings

__all__ = ["agreement", "difference", "digest", "float_tensors"]

_SHOWN = 300


def agreement(settings: Settings, downlink: Chain, layout: Layout) -> str:
    """Return what both ends must agree on, as JSON.

    Args:
        settings: Either end's.
        downlink: The stages of the downlink.
        layout: The shared parameters.
    """
    personal = None if settings.personal is None else identify(settings.personal.identity)
    agreed = {
        "uplink": identify(settings.uplink),
        "downlink": identify(downlink),
        "buffers": settings.buffers,
        "personal": personal,
        "parameters": [list(shape) for shape in layout.shapes],
    }
    return json.dumps(agreed, sort_keys=True)


def digest(agreed: str) -> str:
    """Return a short hash of an ``agreement``."""
    return hashlib.blake2b(agreed.encode(), digest_size=8).hexdigest()


def difference(server: str, node: str) -> str | None:
    """Return in words what differs between two agreements; None if nothing does."""
    if server == node:
        return None
    try:
        theirs: Any = json.loads(server)
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        return "The server's settings cannot be read."
    ours = json.loads(node)
    names = [name for name in ours if theirs.get(name) != ours[name]]
    shown = "; ".join(
        f"`{name}` is {json.dumps(theirs.get(name))[:_SHOWN]} at the server and {json.dumps(ours[name])[:_SHOWN]} here"
        for name in names
    )
    return f"The settings differ: {shown or 'the server has others besides'}. Pass the same to both apps."


def float_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what may travel besides the shared parameters: float buffers and frozen parameters, by name."""
    frozen = ((name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad)
    named = {**dict(module.named_buffers()), **dict(frozen)}
    return {name: tensor.detach() for name, tensor in named.items() if tensor.is_floating_point()}
