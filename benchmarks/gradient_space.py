"""What the analysis of the gradient space costs: ``python -m benchmarks.gradient_space``.

Epochs of an ordinary ``Trainer`` with the callback and without it, alternately, on random images; and time, memory and
disk for a model of ``--parameters`` over ``--gradients`` epochs, on random gradients. Each case in its own process.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import GradientSpaceCallback
from lightning_lbgm.gradient_space.space import GradientSpace
from recipes.gradient_space import NETS, Classifier

NUM_TENSORS = 62  # a ResNet-18's
RESNET_SIZES = (64, 65_536)  # of its tensors, small and middling; the rest is dealt evenly


class Clock(pl.Callback):
    """Take the processor time at the end of each epoch: other programs do not disturb it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.times:
            self.times.append(time.process_time())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.times.append(time.process_time())


def seconds_per_epoch(net: str, args: argparse.Namespace, with_callback: bool) -> float:
    """Train and return the median."""
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(args.examples, 1, 28, 28), torch.randint(10, (args.examples,)))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=args.epochs,
            callbacks=[*([GradientSpaceCallback(figures=False)] if with_callback else []), clock],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Classifier(net, 28, 0.01), DataLoader(data, batch_size=args.batch_size))
    return statistics.median(b - a for a, b in zip(clock.times, clock.times[1:]))


def training_case(net: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the epochs' medians with and without the callback, the best of alternating runs each."""
    runs = [(seconds_per_epoch(net, args, False), seconds_per_epoch(net, args, True)) for _ in range(args.repeats)]
    without, with_callback = (min(times) for times in zip(*runs))
    parameters = sum(p.numel() for p in NETS[net](28).parameters())
    return {"parameters": parameters, "without": without, "with": with_callback}


def core_case(args: argparse.Namespace) -> dict[str, float]:
    """Add random gradients and return what the last of them cost, and memory and disk at the end."""
    small = [RESNET_SIZES[i % 2] for i in range(NUM_TENSORS // 2)]
    large = [(args.parameters - sum(small)) // (NUM_TENSORS - len(small))] * (NUM_TENSORS - len(small))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        space = GradientSpace(folder, [*small, *large])
        for k in range(args.gradients):
            gradient = torch.randn(space.layout.size, generator=torch.Generator().manual_seed(k))
            start, start_cpu = time.perf_counter(), time.process_time()
            space.add(gradient)
            added, added_cpu = time.perf_counter() - start, time.process_time() - start_cpu
            start_cpu = time.process_time()
            space.components(0.95)
            decomposed = time.process_time() - start_cpu
        return {
            "parameters": space.layout.size,
            "add": added,
            "add_cpu": added_cpu,
            "components_cpu": decomposed,
            "before_mib": before / 2**10,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            "disk_mib": sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20,
        }


def main() -> None:
    """Run every case in a fresh process and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=11_000_000)
    parser.add_argument("--gradients", type=int, default=50)
    parser.add_argument("--folder", help="where the random gradients lie; default: the system's for temporary files")
    parser.add_argument("--cases", nargs="+", choices=[*NETS, "core"], default=[*NETS, "core"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.case:
        print(json.dumps(core_case(args) if args.case == "core" else training_case(args.case, args)))
        return
    for case in args.cases:
        command = [sys.executable, "-m", "benchmarks.gradient_space", *sys.argv[1:], "--case", case]
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        print(case, {name: round(value, 4) for name, value in row.items()}, flush=True)


if __name__ == "__main__":
    main()
