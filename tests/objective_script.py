"""Fits with local objectives that keep a state, for test_world.py: ``python objective_script.py DEVICES FOLDER``.

Rank r writes ``FOLDER/rank{r}.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from torch.utils.data import DataLoader

from lightning_lbgm import SCAFFOLD, FedDyn, LBGMFederated
from lightning_lbgm.clients import LocalObjective


class Variate(LocalObjective):
    """A control variate of each client."""

    def init(self, start):
        return {"control": [torch.zeros_like(s) for s in start], "rounds": 0}

    def correct(self, gradients, parameters, start, state):
        torch._foreach_sub_(gradients, state["control"], alpha=0.5)

    def end_turn(self, parameters, start, state, num_steps):
        state["control"] = [c + s - p for c, s, p in zip(state["control"], start, parameters)]
        state["rounds"] += 1


class Homes(pl.Callback):
    """Which process has each client's state, after each round."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(dict(trainer.strategy._federation.placement))


def main(devices: int, folder: Path) -> None:
    torch.manual_seed(0)
    first, homes = TinyModule(), Homes()
    strategy = LBGMFederated(num_clients=5, clients_per_round=2, local_steps=3, uplink=[], seed=0, objective=Variate())
    trainer = build_trainer(folder, strategy, devices=devices, max_epochs=8, callbacks=[homes])
    trainer.fit(first, DataLoader(make_data(), batch_size=4))
    clients = strategy._federation.clients
    states = {client: state["objective"] for client, state in clients.items() if "objective" in state}
    rank = int(os.environ.get("LOCAL_RANK", 0))
    shared = {}
    for objective in (SCAFFOLD(), FedDyn(0.3)):
        torch.manual_seed(0)
        module = TinyModule(lr=0.1)
        strategy = LBGMFederated(
            num_clients=5, clients_per_round=3, local_steps=3, uplink=[], seed=0, objective=objective
        )
        trainer = build_trainer(folder, strategy, devices=devices, max_epochs=6)
        trainer.fit(module, DataLoader(make_data(), batch_size=4))
        federation = strategy._federation
        kept = {k: state["objective"] for k, state in federation.clients.items() if "objective" in state}
        results = {"params": flat_params(module), "server": federation.objective.state, "clients": kept}
        shared[repr(objective)] = {**results, "ledger": strategy.ledger.state_dict()}
    results = {"params": flat_params(first), "states": states, "homes": homes.seen, "shared": shared}
    results["rank"] = (trainer.global_rank, trainer.world_size, trainer.is_global_zero)
    torch.save(results, folder / f"rank{rank}.pt")
    trainer.strategy.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
