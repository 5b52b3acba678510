"""Flower engine: the same module on machines that are far apart. Needs ``pip install 'lightning-lbgm[flower]'``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lbgm.flower.client_app import federated_client_app
    from lightning_lbgm.flower.server_strategy import LBGMStrategy

__all__ = ["LBGMStrategy", "federated_client_app"]

_FILES = {"LBGMStrategy": "server_strategy", "federated_client_app": "client_app"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "flwr":
            raise
        raise ModuleNotFoundError(
            f"`{name}` needs Flower's message API: pip install 'lightning-lbgm[flower]', with Python 3.11 or later.",
            name=error.name,
        ) from error
