"""One rank of two ends in the middle of a round, for test_world.py: ``python processes_death.py FOLDER``.

What happens, and to which rank, is ``killed1`` or, for an exception in a process that then lives on, ``lives0``. All
that may happen does so at once, in a folder each. Rank r writes ``rank{r}.txt``, and its exit code is in codes.json.
Lightning starts rank 1 of ``killed1``, and watches it: ``python processes_death.py FOLDER killed1``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import TinyModule, build_trainer, make_data
from forked import is_rank, one_process_each
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated

LAUNCHED = "killed1"
FORKED = ("lives0", "lives1", "killed0")
CASES = [(LAUNCHED, 0), *((how, rank) for how in FORKED for rank in range(2))]  # in the order of codes.json


class Dying(TinyModule):
    def __init__(self, how: str, rank: int) -> None:
        super().__init__()
        self.how, self.dies = how, how.endswith(str(rank))

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2 and self.dies:
            if self.how.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a mistake in training_step")
        return super().training_step(batch, batch_idx)


def main(folder: Path, how: str, rank: int) -> None:
    torch.manual_seed(0)
    trainer = build_trainer(
        folder,
        LBGMFederated(num_clients=4, seed=0),
        devices=2,
        callbacks=[OnExceptionCheckpoint(str(folder))],
        max_epochs=50,
        enable_checkpointing=True,
    )
    assert trainer.global_rank == rank
    try:
        trainer.fit(Dying(how, rank), DataLoader(make_data(), batch_size=8))
    except BaseException as error:
        if how == LAUNCHED and rank == 0:
            time.sleep(7)  # Lightning looks for failed processes every 5 seconds: there must be time to save things
        report = folder / f"rank{rank}.txt"
        report.with_suffix(".part").write_text(f"{type(error).__name__}: {error}")
        report.with_suffix(".part").rename(report)
        lives_on = how.startswith("lives") and how.endswith(str(rank))
        while lives_on and not (folder / f"rank{1 - rank}.txt").exists():
            time.sleep(0.1)  # a process that lives on does not keep the other one waiting
        raise


def one_of_all(folder: Path) -> tuple[str, int]:
    """Return what happens to which rank of it in this process."""
    ports = {how: find_free_network_port() for how in FORKED}
    for how in (LAUNCHED, *FORKED):
        (folder / how).mkdir()
    how, rank = one_process_each(CASES, folder / "codes.json")
    if how == LAUNCHED:
        sys.argv.append(how)  # with which Lightning starts the other one
    else:
        is_rank(rank, ports[how])
    return how, rank


if __name__ == "__main__":
    root = Path(sys.argv[1])
    case = one_of_all(root) if len(sys.argv) == 2 else (sys.argv[2], int(os.environ["LOCAL_RANK"]))
    main(root / case[0], *case)
