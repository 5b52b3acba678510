"""A federation in the processes that Ray Train makes: ``python -m recipes.ray.mnist``.

Ray starts two workers, on this machine or on the machines of its cluster, and each trains its share of a round's
clients. The data are MNIST if ``LBGM_DATA`` (or ``--data``) names a folder that holds ``MNIST/raw``, else
scikit-learn's digits. ``--without-ray`` trains the same with ``Trainer(devices=2)``. It needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_lbgm import LBGMFederated, LookBack, PathologicalPartitioner
from recipes.gradient_space import Classifier, load_data


def fit(settings: dict[str, Any], **processes: Any) -> dict[str, float]:
    """Train in this process, which is one of several; return what the last round measured.

    Args:
        settings: The command's arguments.
        processes: The Trainer's arguments that say which processes there are.
    """
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(settings["seed"], verbose=False)
    train, val = load_data(settings["data"], settings["examples"])
    output = Path(settings["output"])
    trainer = pl.Trainer(
        strategy=LBGMFederated(
            num_clients=settings["clients"],
            partitioner=PathologicalPartitioner(classes_per_client=3),
            uplink=[LookBack(threshold=0.2)],
        ),
        max_epochs=settings["rounds"],
        accelerator="cpu",
        logger=CSVLogger(output, name="", version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=output,
        **processes,
    )
    module = Classifier("fcn", side=train.tensors[0].shape[-1], lr=settings["lr"])
    trainer.fit(module, DataLoader(train, batch_size=len(train)), DataLoader(val, batch_size=2000))
    metrics = {name: float(trainer.callback_metrics[name]) for name in ("val/acc", "comm/savings")}
    if trainer.is_global_zero:
        torch.save(module.state_dict(), output / "module.pt")
        print(f"{trainer.world_size} processes: validation accuracy {metrics['val/acc']:.3f},", end=" ")
        print(f"{metrics['comm/savings']:.1%} of FedAvg's uplink saved", flush=True)
    return metrics


def fit_with_ray(settings: dict[str, Any], num_workers: int) -> None:
    """Let Ray Train make the workers, and fit in each."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train_in_worker,
        train_loop_config=settings,
        # A worker is a process with one core. On several machines `--output` must be a folder that all of them see.
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="ray", storage_path=settings["output"]),
    ).fit()


def train_in_worker(settings: dict[str, Any]) -> None:
    """Fit in one worker of Ray Train, whose environment tells the Trainer of the others."""
    import ray.train
    from ray.train.lightning import RayLightningEnvironment

    metrics = fit(settings, devices="auto", plugins=[RayLightningEnvironment()])
    ray.train.report(metrics)


def main() -> None:
    """Train a federation in several processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("LBGM_DATA") or None, help="folder that holds MNIST/raw")
    parser.add_argument("--examples", type=int, default=60_000, help="training examples of MNIST")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.2, help="the clients' learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that train the clients")
    parser.add_argument("--without-ray", action="store_true", help="let Lightning make the processes")
    parser.add_argument("--output", type=Path, default=Path("ray_mnist"), help="folder of what is written")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # Workers have a working directory of their own.
    data = None if args.data is None else str(Path(args.data).resolve())
    settings = {**vars(args), "data": data, "output": str(args.output.resolve())}
    if args.without_ray:
        fit(settings, devices=args.workers)
    else:
        fit_with_ray(settings, args.workers)


if __name__ == "__main__":
    main()
