"""Workers of an engine that has made two, for test_engines.py: ``python engine_script.py FOLDER HOW ...``.

Each HOW names, joined by ``+``, what is so: ``group``, the engine has made torch's process group, and a first Trainer
is not told of the engine; ``twin``, the Trainer is that of ``pytorch_lightning``; ``raises``, rank 1 fails in its third
round. ``devices`` is no engine, but ``Trainer(devices=2)``, which starts rank 1: ``python engine_script.py FOLDER
devices``. All are so at once. Rank r writes ``FOLDER/HOW/rank{r}.pt``; exit codes are in ``FOLDER/codes.json``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import conftest
import lightning.pytorch as pl
import torch
from forked import one_process_each
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import distributed
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated, LookBack


def this_process() -> tuple[str, int, int, Path]:
    """Return what is so for this process, its rank, the port and the folder; and make the others."""
    root, cases = Path(sys.argv[1]), sys.argv[2:]
    if "LOCAL_RANK" in os.environ:
        return "devices", 1, 0, root / "devices"
    ports = {how: find_free_network_port() for how in cases}
    for how in cases:
        (root / how).mkdir()
    ranks = [(how, rank) for how in cases for rank in range(1 if how == "devices" else 2)]
    how, rank = one_process_each(ranks, root / "codes.json")
    sys.argv[2:] = [how]  # with which Lightning starts the other one
    return how, rank, ports[how], root / how


NAME, RANK, PORT, FOLDER = this_process()
HOW = NAME.split("+")

if "twin" in HOW:
    import pytorch_lightning as pl  # type: ignore[no-redef]
    from pytorch_lightning.loggers import CSVLogger
    from pytorch_lightning.plugins.environments import LightningEnvironment


class Engine(LightningEnvironment):
    """As Ray Train's: it knows the ranks and the world, and is not told them."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = PORT

    def world_size(self):
        return 2

    def global_rank(self):
        return RANK

    def local_rank(self):
        return RANK

    def node_rank(self):
        return 0

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass

    def teardown(self):
        pass


class Module(conftest.TinyModule):
    seen = 0

    def training_step(self, batch, batch_idx):
        if "raises" in HOW and RANK == 1 and self.trainer.global_step == 2:
            raise KeyError("a mistake in training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        self.log("val/loss", self.loss(batch), sync_dist=True)


def make_trainer(**processes):
    return pl.Trainer(
        strategy=LBGMFederated(num_clients=5, uplink=[LookBack(0.3)], seed=0, execution="sequential"),
        accelerator="cpu",
        max_epochs=4,
        logger=CSVLogger(FOLDER, name="log", version=0),
        default_root_dir=FOLDER,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **processes,
    )


def fit(trainer, module) -> str | None:
    """Return the error that the fit ended with."""
    try:
        val_loader = DataLoader(conftest.make_data(41, seed=1), batch_size=10)
        trainer.fit(module, DataLoader(conftest.make_data(), batch_size=8), val_loader)
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"
    return None


def main() -> None:
    torch.manual_seed(0 if "devices" in HOW else RANK)  # rank 0's parameters count
    module, refused = Module(), None
    if "group" in HOW:
        distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=RANK, world_size=2)
        refused = fit(make_trainer(), module)
    trainer = make_trainer(**({"devices": 2} if "devices" in HOW else {"plugins": [Engine()]}))
    rank, error = trainer.global_rank, fit(trainer, module)
    alive = None
    if "group" in HOW and error is None:
        alive = torch.ones(1)
        distributed.all_reduce(alive)
    result = {
        "place": (rank, trainer.world_size, trainer.is_global_zero),
        "rounds": trainer.global_step,
        "params": conftest.flat_params(module),
        "clients": sorted(getattr(trainer.strategy._federation, "clients", ())),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "seen": module.seen,
        "error": error,
        "refused": refused,
        "group_sum": None if alive is None else float(alive),
        "has_group": distributed.is_initialized(),
    }
    torch.save(result, FOLDER / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
