"""A fit with personal parameters and buffers, for test_world.py: ``python personal_script.py DEVICES FOLDER``.

Rank r writes ``FOLDER/rank{r}.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from conftest import TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import ModelCheckpoint
from objective_script import Homes
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated, LookBack


class Unfreeze(pl.Callback):
    """Let a part of the body be trained from the sixth round on: M changes, and what is personal stays."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[0].requires_grad_(batch.index >= 5)


def main(devices: int, folder: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 3))
    module, homes = TinyModule(lr=0.1, net=net, momentum=0.9), Homes()
    strategy = LBGMFederated(
        num_clients=5,
        clients_per_round=2,
        local_steps=3,
        uplink=[LookBack(0.5)],
        client_store=str(folder / "store"),
        personal=["net.3.*", "net.1.*"],
        personal_steps=1,
        seed=0,
    )
    checkpoint = ModelCheckpoint(folder, filename="last")
    trainer = build_trainer(
        folder,
        strategy,
        devices=devices,
        max_epochs=8,
        callbacks=[homes, Unfreeze(), checkpoint],
        enable_checkpointing=True,
    )
    trainer.fit(module, DataLoader(make_data(), batch_size=4))
    clients = strategy._federation.clients
    states = {client: {name: t.clone() for name, t in clients[client]["personal"].items()} for client in clients}
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.save({"params": flat_params(module), "states": states, "homes": homes.seen}, folder / f"rank{rank}.pt")
    trainer.strategy.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
