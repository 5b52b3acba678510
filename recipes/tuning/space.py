"""What is searched: the settings that a trial chooses, and how a config says them."""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial

__all__ = ["FIRST", "UPLINKS", "suggest"]

UPLINKS = ("none", "LookBack", "TopK, LookBack", "TopK, SignSGD", "Ternary")
FIRST = ({"uplink": "none", "downlink": False}, {"uplink": "Ternary", "downlink": True, "down_fraction": 0.05})
"""Trials before all others: FedAvg, which shares refer to, and what docs/choosing.md recommends."""


def suggest(trial: BaseTrial, lr: str | None) -> dict[str, Any]:
    """Let Optuna choose settings, and return them as changes of a config.

    Args:
        trial: The trial.
        lr: Where the config has the learning rate; None: it stays.
    """
    kind = trial.suggest_categorical("uplink", UPLINKS)
    top_k = _stage("TopK", fraction=trial.suggest_float("fraction", 0.01, 0.3, log=True)) if "TopK" in kind else None
    look_back = (
        _stage("LookBack", threshold=trial.suggest_float("threshold", 0.02, 0.9)) if "LookBack" in kind else None
    )
    uplink = {
        "none": [],
        "LookBack": [look_back],
        "TopK, LookBack": [_stage("ErrorFeedback", stage=[top_k, look_back])],
        "TopK, SignSGD": [_stage("ErrorFeedback", stage=[top_k, _stage("SignSGD")])],
        "Ternary": [_stage("Ternary")],
    }[kind]
    downlink = []
    if trial.suggest_categorical("downlink", (False, True)):
        fraction = trial.suggest_float("down_fraction", 0.01, 0.3, log=True)
        downlink = [_stage("TopK", fraction=fraction), _stage("SignSGD")]
    init_args = {
        "uplink": uplink,
        "downlink": downlink,
        "local_epochs": None,
        "local_steps": trial.suggest_int("local_steps", 1, 10, log=True),
    }
    changes: dict[str, Any] = {"trainer": {"strategy": {"init_args": init_args}}}
    if lr is not None:
        *parents, last = lr.split(".")
        place = changes
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = trial.suggest_float("lr", 0.01, 1.0, log=True)
    return changes


def _stage(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_lbgm.{name}", **({"init_args": init_args} if init_args else {})}
