"""What local objectives, personal parameters, rules of who takes part and evaluations add to a round of W1."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.rounds import federation, user_code
from benchmarks.timing import Fit, ratio, take_turns
from benchmarks.workloads import Classifier, Workload, workloads
from lightning_lbgm import SCAFFOLD, ClientEvaluation, FedDyn, FedProx, PowerOfChoice

Row = dict[str, Any]

METHODS: dict[str, dict[str, Any]] = {
    "`objective=FedProx(0.1)`": {"objective": FedProx(0.1)},
    "`objective=SCAFFOLD()`": {"objective": SCAFFOLD()},
    "`objective=FedDyn(0.03)`": {"objective": FedDyn(0.03)},
    '`personal=["net.2.*"]`': {"personal": ["net.2.*"]},
    "the same with `personal_steps=2`": {"personal": ["net.2.*"], "personal_steps": 2},
    "`sampler=PowerOfChoice(100)`": {"sampler": PowerOfChoice(100)},
}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "the same and evaluated each round": {"every_n_rounds": 1, "own_models": False},
    "the same and each client's own model": {"every_n_rounds": 1},
}
HELD_OUT = "`ClientEvaluation`, a fifth held out, not evaluated"


class Judged(Classifier):
    """The classifier, with a validation step."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log("val/loss", nn.functional.cross_entropy(logits, y))
        self.log("val/acc", (logits.argmax(1) == y).float().mean())


def judged_code(workload: Workload) -> tuple[pl.LightningModule, DataLoader[Any]]:
    """Return a module that can be validated and a DataLoader."""
    module, loader = user_code(workload)
    return Judged(module.net), loader


def fit(workload: Workload, callbacks: tuple[Any, ...] = (), **options: Any) -> Fit:
    """Return a fit of FedAvg with some options, which makes a round at each ``next``."""
    make = partial(judged_code if callbacks else user_code, workload)
    return Fit(make, strategy=federation(workload, [], **options), callbacks=callbacks)


def methods_cost(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round of W1 with each setting, in rounds of FedAvg that is executed in the same way."""
    workload = workloads(quick)[0]
    for execution, label in (("sequential", "one after the other"), ("vectorized", "side by side")):
        contestants: dict[str, Any] = {"FedAvg": partial(fit, workload, execution=execution)}
        contestants |= {
            name: partial(fit, workload, execution=execution, **options) for name, options in METHODS.items()
        }
        never = ClientEvaluation(every_n_rounds=1_000_000, own_models=False)  # but for the first round
        evaluations = {HELD_OUT: never, **{name: ClientEvaluation(**how) for name, how in EVALUATIONS.items()}}
        contestants |= {
            name: partial(fit, workload, (callback,), execution=execution) for name, callback in evaluations.items()
        }
        seconds = take_turns(contestants, rounds=3 if quick else 12, warmup=2 if quick else 3)
        for name in list(contestants)[1:]:
            row = {"table": "methods", "workload": f"{workload.name}, {label}", "what": name}
            yield {**row, "ratio": ratio(seconds, name, "FedAvg")}
