"""A round's time by the number of clients and of parameters, with local training so small that the rest shows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.look_back import bandwidth
from benchmarks.rounds import sequential
from benchmarks.timing import Fit, median, take_turns
from lightning_lbgm import LBGMFederated, LookBack

Row = dict[str, Any]

# Vectors that must pass through memory. For each client: parameters copied in (2), update taken (3), its norm (1),
# look-back test (2), aggregation (3). For each round: parameters read (2), sum cleared (1), its norm (1), the server's
# step (3), parameters written (2).
PASSES_PER_CLIENT, PASSES_PER_ROUND = 11, 9
WIDTH = 8


class Table(pl.LightningModule):
    """Many parameters of which a step touches few: an embedding with sparse gradients."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_parameters // WIDTH, WIDTH, sparse=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.table(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(num_clients: int, cohort_size: int, num_parameters: int) -> Fit:
    """Return a fit with one local step of four examples."""

    def make() -> tuple[pl.LightningModule, Any]:
        rows = torch.randint(num_parameters // WIDTH, (4 * num_clients,))
        return Table(num_parameters), DataLoader(TensorDataset(rows), batch_size=4, shuffle=True)

    strategy = LBGMFederated(
        num_clients=num_clients,
        clients_per_round=cohort_size,
        local_steps=1,
        uplink=[LookBack(1.0)],  # after its first time every client is recycled
        seed=0,
        **sequential(),
    )
    return Fit(make, strategy=strategy)


def scaling(quick: bool) -> Iterator[Row]:
    """Yield a round's seconds by clients (10,000 parameters) and by parameters (4 clients)."""
    for num_clients in (10, 100, 1000) if quick else (10, 100, 1000, 10_000):
        for cohort, size in (("all", num_clients), ("100 a round", min(100, num_clients))):
            if cohort != "all" and num_clients < 100:
                continue
            rounds = 3 if size > 1000 else 5
            seconds = take_turns({"ours": partial(fit, num_clients, size, 10_000)}, rounds, warmup=1)
            yield {
                "table": "scaling_clients",
                "what": cohort,
                "clients": num_clients,
                "seconds": median(seconds["ours"]),
                "us_per_client": 1e6 * median(seconds["ours"]) / size,
            }
    for num_parameters in (10_000, 100_000, 1_000_000) if quick else (10**4, 10**5, 10**6, 10**7, 10**8):
        num_clients = 4
        seconds = take_turns({"ours": partial(fit, num_clients, num_clients, num_parameters)}, rounds=5, warmup=2)
        passes = num_clients * PASSES_PER_CLIENT + PASSES_PER_ROUND
        yield {
            "table": "scaling_parameters",
            "parameters": num_parameters,
            "clients": num_clients,
            "seconds": median(seconds["ours"]),
            "bound_s": passes * 4 * num_parameters / bandwidth(3),
        }
