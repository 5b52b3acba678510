"""What a round costs beside a hand-written loop, and beside other ways to run the same work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.timing import Fit, median, ratio, take_turns
from benchmarks.workloads import BATCH_SIZE, LOCAL_STEPS, Classifier, Workload, cohorts, loop, workloads
from benchmarks.workloads import threads as thread_pool
from benchmarks.workloads import vectorized as vmap_over_clients
from lightning_lbgm import (
    ATOMO,
    DIANA,
    QSGD,
    Cast,
    ErrorFeedback,
    LBGMFederated,
    LookBack,
    PowerSGD,
    Predict,
    RandK,
    SignSGD,
    Ternary,
    TopK,
)

Row = dict[str, Any]


def federation(workload: Workload, uplink: list[Any] | None = None, **options: Any) -> LBGMFederated:
    """Return the strategy for a workload."""
    return LBGMFederated(
        num_clients=workload.num_clients,
        clients_per_round=workload.cohort_size,
        local_steps=LOCAL_STEPS,
        uplink=uplink or [],
        seed=0,
        **options,
    )


def user_code(workload: Workload) -> tuple[pl.LightningModule, DataLoader[Any]]:
    """Return a module and a DataLoader, as a user has them."""
    return (
        Classifier(workload.make_net()),
        DataLoader(TensorDataset(*workload.data()), batch_size=BATCH_SIZE, shuffle=True),
    )


def ours(workload: Workload, uplink: list[Any] | None = None, **options: Any) -> Fit:
    """Return a fit of ours that makes a round at each ``next``."""
    return Fit(partial(user_code, workload), strategy=federation(workload, uplink, **options))


def sequential() -> dict[str, Any]:
    """Return the option that trains one client after the other."""
    return {"execution": "sequential"}


def plain_fit(workload: Workload) -> Fit:
    """Return one ordinary fit, whose epoch has as many steps as a round's clients make in all."""
    return Fit(partial(user_code, workload), limit_train_batches=workload.cohort_size * LOCAL_STEPS)


def fit_per_client(workload: Workload) -> Iterator[None]:
    """FedAvg with a new Trainer and a ``fit`` for each client and round."""
    module = Classifier(workload.make_net())
    parameters = list(module.parameters())
    inputs, targets = workload.data()
    server = [p.detach().clone() for p in parameters]
    for clients in cohorts(workload):
        sums = [torch.zeros_like(p) for p in server]
        for _, batches in clients:
            with torch.no_grad():
                for p, s in zip(parameters, server):
                    p.copy_(s)
            indices = torch.cat(batches)
            trainer = pl.Trainer(
                accelerator="cpu",
                max_steps=LOCAL_STEPS,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            trainer.fit(module, DataLoader(TensorDataset(inputs[indices], targets[indices]), batch_size=BATCH_SIZE))
            with torch.no_grad():
                for total, p in zip(sums, parameters):
                    total.add_(p, alpha=1 / len(clients))
        server = sums
        yield


def round_cost(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round of ours, in hand-written rounds, and LBGM's own part of it."""
    for workload in workloads(quick):
        contestants = {
            "loop": partial(loop, workload),
            "[]": partial(ours, workload, [], **sequential()),
            "[LookBack(0.2)]": partial(ours, workload, [LookBack(0.2)], **sequential()),
        }
        seconds = take_turns(contestants, rounds=3 if quick else 12, warmup=1 if quick else 3)
        row = {"table": "round", "workload": workload.name, "loop_s": median(seconds["loop"])}
        for name in ("[]", "[LookBack(0.2)]"):
            yield {**row, "what": name, "ratio": ratio(seconds, name, "loop")}
        yield {**row, "what": "LBGM's own part", "ratio": ratio(seconds, "[LookBack(0.2)]", "loop", minus="[]")}


def uplink_cost(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round of W1 with each uplink, in hand-written rounds."""
    workload = workloads(quick)[0]
    uplinks: dict[str, list[Any]] = {
        "[]": [],
        "[LookBack(0.2)]": [LookBack(0.2)],
        "[SignSGD()]": [SignSGD()],
        "[RandK(0.1)]": [RandK(0.1)],
        "[Ternary()]": [Ternary()],
        "[QSGD(7)]": [QSGD(7)],
        "[QSGD(7, bucket_size=512)]": [QSGD(7, bucket_size=512)],
        "EF([TopK, SignSGD])": [ErrorFeedback([TopK(0.03), SignSGD()])],
        "EF(DIANA([TopK, SignSGD]))": [ErrorFeedback(DIANA([TopK(0.03), SignSGD()]))],
        "EF([Cast, LookBack(0.9, rank=8, rowwise)])": [ErrorFeedback([Cast(), LookBack(0.9, rank=8, rowwise=True)])],
        "EF(LookBack(0.9, rank=8, rowwise))": [ErrorFeedback(LookBack(0.9, rank=8, rowwise=True))],
        "EF(Predict(8, TopK))": [ErrorFeedback(Predict(8, TopK(0.03)))],
        "EF(PowerSGD(2))": [ErrorFeedback(PowerSGD(2))],
        "EF(ATOMO(2))": [ErrorFeedback(ATOMO(2))],
    }
    contestants: dict[str, Any] = {"loop": partial(loop, workload)}
    contestants |= {name: partial(ours, workload, uplink, **sequential()) for name, uplink in uplinks.items()}
    # Memories of rank 8 are full after eight rounds.
    seconds = take_turns(contestants, rounds=3 if quick else 12, warmup=1 if quick else 9)
    for name in uplinks:
        yield {"table": "uplinks", "workload": workload.name, "what": name, "ratio": ratio(seconds, name, "loop")}


def peers(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round in other ways to run it, in hand-written rounds."""
    for workload in workloads(quick):
        contestants = {
            "loop": partial(loop, workload),
            "loop, two threads": partial(thread_pool, workload),
            "`vmap` over all clients": partial(vmap_over_clients, workload, workload.cohort_size),
            "`vmap` over 10 clients": partial(vmap_over_clients, workload, 10),
            "Lightning, one plain `fit`": partial(plain_fit, workload),
            "Lightning, a `fit` for each client": partial(fit_per_client, workload),
        }
        seconds = take_turns(contestants, rounds=2 if quick else 6, warmup=1)
        for name in list(contestants)[1:]:
            yield {"table": "peers", "workload": workload.name, "what": name, "ratio": ratio(seconds, name, "loop")}


def execution(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round with clients side by side, in rounds with one after the other."""
    for workload in workloads(quick):
        row = {"table": "execution", "workload": workload.name, "what": "vectorized / sequential"}
        contestants = {
            name: partial(ours, workload, [LookBack(0.2)], execution=name)
            for name in ("sequential", "vectorized", "auto")
        }
        seconds = take_turns(contestants, rounds=3 if quick else 10, warmup=1 if quick else 2)
        row["sequential_s"] = median(seconds["sequential"])
        yield {**row, "ratio": ratio(seconds, "vectorized", "sequential")}
        yield {**row, "what": "auto / sequential", "ratio": ratio(seconds, "auto", "sequential")}


def stores(quick: bool) -> Iterator[Row]:
    """Yield the cost of a round by where look-back gradients are kept, in rounds with them in memory."""
    workload = workloads(quick)[0]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, dict[str, Any]] = {
            "in bfloat16": {"uplink": [LookBack(0.2, dtype=torch.bfloat16)]},
            "on disk": {"client_store": folder},
            "at most 50 of 100 clients": {"client_capacity": workload.num_clients // 2},
        }
        contestants = {"in memory": partial(ours, workload, [LookBack(0.2)], **sequential())}
        for name, options in settings.items():
            contestants[name] = partial(ours, workload, **{"uplink": [LookBack(0.2)], **options}, **sequential())
        seconds = take_turns(contestants, rounds=3 if quick else 8, warmup=2)
        for name in settings:
            yield {
                "table": "stores",
                "workload": workload.name,
                "what": name,
                "ratio": ratio(seconds, name, "in memory"),
            }
