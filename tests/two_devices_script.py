"""Fits on several devices, for test_device_processes.py and test_world.py.

Started as ``python two_devices_script.py ACCELERATOR DEVICES FOLDER``, or as a part of torchrun_script.py.

Rank 0 writes ``FOLDER/results{DEVICES}.pt``: for each fit the parameters, the ledger and the losses of the rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from torch import nn
from torch.utils.data import DataLoader

from lightning_lbgm import CoordinateMedian, ErrorFeedback, LBGMFederated, LookBack, TopK

FITS = {
    "lookback": {"uplink": [ErrorFeedback(TopK(0.5)), LookBack(0.6)]},
    "rowwise on disk": {"uplink": [ErrorFeedback(LookBack(0.6, rank=3, rowwise=True))], "client_store": "store"},
    "median": {"uplink": [], "aggregation": CoordinateMedian()},
    "vectorized": {"uplink": [LookBack(0.6)], "execution": "vectorized"},
}


def main(accelerator: str, devices: int, folder: Path) -> None:
    results = {}
    for name, settings in FITS.items():
        if "client_store" in settings:
            settings = {**settings, "client_store": str(folder / f"store{devices}")}
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        module, recorder = TinyModule(net=net), Recorder()
        strategy = LBGMFederated(
            **{
                "num_clients": 9,
                "clients_per_round": 5,
                "local_steps": 2,
                "seed": 0,
                "execution": "sequential",
                **settings,
            }
        )
        where = {"accelerator": accelerator, "devices": devices}
        trainer = build_trainer(folder, strategy, callbacks=[recorder], max_epochs=6, **where)
        loader = DataLoader(make_data(108), batch_size=6, shuffle=True)
        trainer.fit(module, loader, DataLoader(make_data(40, seed=1), batch_size=10))
        results[name] = {
            "params": flat_params(module).cpu(),
            "ledger": strategy.ledger.state_dict(),
            "losses": [metrics["train/loss"] for metrics in recorder.callback_metrics],
            "backend": torch.distributed.get_backend() if devices > 1 else None,
            "world_size": trainer.world_size,
            "own_clients": len(strategy._federation.clients),
        }
    if trainer.is_global_zero:
        torch.save(results, folder / f"results{devices}.pt")
    trainer.strategy.barrier()


def assert_as_one(one: dict, two: dict, backend: str) -> None:
    """Two devices have trained what one does, up to rounding."""
    assert one.keys() == two.keys() == FITS.keys()
    for name, expected in one.items():
        found = two[name]
        assert found["backend"] == backend
        assert (expected["world_size"], found["world_size"]) == (1, 2)
        assert 0 < found["own_clients"] < expected["own_clients"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
        torch.testing.assert_close(found["params"], expected["params"], rtol=1e-2, atol=1e-3)
        assert found["ledger"] == expected["ledger"]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
