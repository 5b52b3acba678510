"""What is compared: settings of the federation, and for each the chains of the uplink and the downlink."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_lbgm import DIANA, QSGD, Cast, ErrorFeedback, LookBack, Relax, SignSGD, TargetSavings, Ternary, TopK
from lightning_lbgm.compression import Chain, Stage

__all__ = ["DATASETS", "NUM_CLIENTS", "SETTINGS", "Setting", "Variant", "variants"]

NUM_CLIENTS = 100
DATASETS = ("MNIST", "FashionMNIST")


@dataclass(frozen=True)
class Setting:
    """How the clients train.

    Attributes:
        title: In words.
        hidden: Width of the hidden layer; None: a linear model.
        batch_size: Examples in a local batch; 60,000 makes full-batch steps.
        local_steps: Steps of a client in a round; None: a pass over its examples.
        clients_per_round: Size of the cohort; None: all clients.
        rounds: Rounds of a run.
    """

    title: str
    hidden: int | None
    batch_size: int
    local_steps: int | None
    clients_per_round: int | None
    rounds: int


SETTINGS = {
    "paper": Setting("Linear model, full-batch steps, all clients (the paper's setting)", None, 60_000, None, None, 60),
    "noisy": Setting("MLP, 5 local steps of batch 32, all clients", 128, 32, 5, None, 60),
    "cohorts": Setting("MLP, 5 local steps of batch 32, 10 of 100 clients a round", 128, 32, 5, 10, 120),
}


@dataclass(frozen=True)
class Variant:
    """Chains to compare.

    Attributes:
        uplink: Stages of the uplink; none: updates in full.
        downlink: Stages of the downlink; none: the model in full.
        group: In the figure: ``"FedAvg"``, ``"paper"`` (LBGM as published), ``"stateful"``, ``"stateless"`` or
            ``"both directions"``.
    """

    group: str
    uplink: list[Stage] = field(default_factory=list)
    downlink: list[Stage] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The chains in short, such as ``EF(TopK(0.03) + SignSGD())``; with a downlink both, with an arrow each."""
        up = " + ".join(map(_short, self.uplink)) or "full"
        if not self.downlink:
            return up if self.uplink else "FedAvg"
        return f"↑ {up} ↓ {' + '.join(map(_short, self.downlink))}"


def one_then_two(round_index: int) -> int:
    """Return the levels of a quantizer that is finer in the last quarter of 120 rounds."""
    return 1 if round_index < 90 else 2


def variants(setting: str) -> list[Variant]:
    """Return what is compared in a setting, FedAvg first."""
    sparse_signs: list[Stage] = [TopK(0.03), SignSGD()]
    far_signs: list[Stage] = [TopK(0.05), SignSGD(), Relax(1.5)]
    by_row = LookBack(0.9, rank=8, rowwise=True)
    found = [
        Variant("FedAvg"),
        Variant("paper", [LookBack(0.2)]),
        Variant("paper", [TopK(0.1), LookBack(0.2)]),
        Variant("stateful", [ErrorFeedback(sparse_signs)]),
        Variant("stateful", [ErrorFeedback(DIANA(sparse_signs))]),
        Variant("stateful", [ErrorFeedback([Cast(torch.bfloat16), by_row])]),
        Variant("stateless", [QSGD(7, bucket_size=512)]),
        Variant("stateless", [Ternary()]),
        Variant("both directions", [Ternary()], sparse_signs),
    ]
    if setting == "paper":
        found += [
            Variant("paper", [SignSGD(), LookBack(0.2)]),
            Variant("stateful", [LookBack(0.06, rank=4, rowwise=True)]),
            Variant("both directions", [LookBack(0.2)], [LookBack(0.2)]),
        ]
    if setting == "noisy":
        found.append(Variant("both directions", [ErrorFeedback(DIANA(sparse_signs))], sparse_signs))
    if setting == "cohorts":
        found += [
            Variant("stateless", [QSGD(one_then_two)]),
            Variant("both directions", [Ternary()], far_signs),
            Variant("both directions", [QSGD(one_then_two)], far_signs),
        ]
    return found


def _short(value: Any) -> str:
    """Name a stage by its settings, without those that are at their default and say little."""
    if isinstance(value, Chain):
        return " + ".join(map(_short, value.stages))
    if isinstance(value, ErrorFeedback):
        return f"EF({_short(value.stage)})"
    if inspect.isfunction(value):
        return str(value.__name__)
    if not isinstance(value, (Stage, TargetSavings)):
        return str(value).removeprefix("torch.")
    settings = []
    for name, parameter in inspect.signature(type(value)).parameters.items():
        if not hasattr(value, name):
            continue
        always = name in ("threshold", "levels", "factor") or (name == "dtype" and parameter.default is not None)
        plain = parameter.default is parameter.empty or always
        if plain or getattr(value, name) != parameter.default:
            settings.append(_short(getattr(value, name)) if plain else f"{name}={getattr(value, name)!r}")
    return f"{type(value).__name__}({', '.join(settings)})"
