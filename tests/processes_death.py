"""One rank of two ends in the middle of a round, for test_processes.py: ``python processes_death.py HOW FOLDER``.

HOW is what happens, and to which rank: ``killed1``, or ``lives0`` for an exception in a process that then lives on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import TinyModule, build_trainer, make_data
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated

RANK = int(os.environ.get("LOCAL_RANK", 0))


HOW = sys.argv[1]


class Dying(TinyModule):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2 and int(HOW[-1]) == RANK:
            if HOW.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a mistake in training_step")
        return super().training_step(batch, batch_idx)


def main(folder: Path) -> None:
    trainer = build_trainer(
        folder,
        LBGMFederated(num_clients=4, seed=0),
        devices=2,
        callbacks=[OnExceptionCheckpoint(str(folder))],
        max_epochs=50,
        enable_checkpointing=True,
    )
    try:
        trainer.fit(Dying(), DataLoader(make_data(), batch_size=8))
    except BaseException as error:
        if HOW == "killed1" and RANK == 0:
            time.sleep(7)  # Lightning looks for failed processes every 5 seconds: there must be time to save things
        report = folder / f"rank{RANK}.txt"
        report.with_suffix(".part").write_text(f"{type(error).__name__}: {error}")
        report.with_suffix(".part").rename(report)
        lives_on = HOW.startswith("lives") and HOW.endswith(str(RANK))
        while lives_on and not (folder / f"rank{1 - RANK}.txt").exists():
            time.sleep(0.1)  # a process that lives on does not keep the other one waiting
        raise


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[2]))
