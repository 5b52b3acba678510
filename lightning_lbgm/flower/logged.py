"""Logged values of a node: packed as JSON for the server, and checked there."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

__all__ = ["pack", "unpack"]

_REDUCTIONS = ("mean", "sum", "min", "max")
_FLAGS = ("prog_bar", "logger", "on_step", "on_epoch")


def pack(entries: list[dict[str, Any]]) -> str:
    """Return the numbers among what a client logged, in the form of ``RoundLog.export``, as JSON."""
    packed = [
        {
            "name": entry["name"],
            "reduction": entry["reduction"],
            "total": entry["total"][0],
            "weight": entry["weight"],
            **{flag: entry["options"][flag] for flag in _FLAGS if isinstance(entry["options"].get(flag), bool)},
        }
        for entry in entries
        if entry["total"] is not None and entry["metric"] is None
    ]
    return json.dumps(packed)


def unpack(text: str) -> list[dict[str, Any]]:
    """Undo ``pack``; what has another form, or is not finite, is left out, because nothing depends on it."""
    try:
        packed = json.loads(text)
    except (ValueError, RecursionError):
        return []
    entries = []
    for one in packed if isinstance(packed, list) else []:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or one.get("reduction") not in _REDUCTIONS:
            continue
        numbers = one.get("total"), one.get("weight")
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            continue
        options = {flag: one[flag] for flag in _FLAGS if isinstance(one.get(flag), bool)}
        entries.append(
            {
                "name": one["name"],
                "options": {**options, "reduce_fx": one["reduction"]},
                "reduction": one["reduction"],
                "total": (float(numbers[0]), torch.float32),  # type: ignore[arg-type]
                "weight": float(numbers[1]),  # type: ignore[arg-type]
                "metric": None,
            }
        )
    return entries
