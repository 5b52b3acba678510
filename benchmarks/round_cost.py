"""What a round costs beside a hand-written PyTorch FedAvg loop: ``python -m benchmarks.round_cost``.

Both train the same clients on the same batches, in one process and run, one thread, taking turns round by round so
that a noisy machine troubles them alike. FCN 784-128-10, batch 32, 5 local steps, 100 clients of 600 examples; ours
with LookBack and ``self.log`` on. The result is the ratio of the median times of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lbgm import LBGMFederated, LookBack

BATCH_SIZE, LOCAL_STEPS, LEARNING_RATE, EXAMPLES_PER_CLIENT = 32, 5, 0.1, 600


def make_net() -> nn.Module:
    """FCN 784-128-10, the same weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


class Classifier(pl.LightningModule):
    """An ordinary LightningModule, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def handwritten_rounds(
    inputs: torch.Tensor, targets: torch.Tensor, num_clients: int, seed: int
) -> Iterator[tuple[float, float]]:
    """FedAvg as one writes it in PyTorch, clients of consecutive examples; yields (seconds, loss) of each round."""
    net = make_net()
    parameters = list(net.parameters())
    server = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    while True:
        begin = time.perf_counter()
        sums = [torch.zeros_like(p) for p in server]
        loss_sum = torch.zeros(())
        for client in range(num_clients):
            with torch.no_grad():
                for p, s in zip(parameters, server):
                    p.copy_(s)
            optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
            order = torch.randperm(EXAMPLES_PER_CLIENT, generator=generator) + client * EXAMPLES_PER_CLIENT
            for batch in order.split(BATCH_SIZE)[:LOCAL_STEPS]:
                loss = nn.functional.cross_entropy(net(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
            with torch.no_grad():
                for total, p in zip(sums, parameters):
                    total.add_(p, alpha=1 / num_clients)
        server = sums
        yield time.perf_counter() - begin, float(loss_sum) / (num_clients * LOCAL_STEPS)


class TakeTurns(pl.Callback):
    """Time our rounds, and run a hand-written round after each."""

    def __init__(self, handwritten: Iterator[tuple[float, float]]) -> None:
        self.handwritten = handwritten
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.losses = (0.0, 0.0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ours.append(time.perf_counter() - self._begin)
        seconds, loss = next(self.handwritten)
        self.theirs.append(seconds)
        self.losses = (float(trainer.callback_metrics["train/loss"]), loss)


def measure(num_clients: int, rounds: int, warmup: int, uplink: list[LookBack]) -> tuple[float, float, TakeTurns]:
    """Return the median seconds of a round, ours and hand-written, and the raw measurements."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_clients * EXAMPLES_PER_CLIENT, 784, generator=generator)
    targets = (inputs[:, :10] + 0.5 * torch.randn(len(inputs), 10, generator=generator)).argmax(1)
    turns = TakeTurns(handwritten_rounds(inputs, targets, num_clients, seed=0))
    trainer = pl.Trainer(
        strategy=LBGMFederated(num_clients=num_clients, local_steps=LOCAL_STEPS, uplink=uplink, seed=0),
        max_epochs=warmup + rounds,
        callbacks=[turns],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, targets), batch_size=BATCH_SIZE, shuffle=True))
    return statistics.median(turns.ours[warmup:]), statistics.median(turns.theirs[warmup:]), turns


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the measured ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"FCN 784-128-10, {args.clients} clients, batch {BATCH_SIZE}, {LOCAL_STEPS} local steps, one thread")
    print(f"{'uplink':<20}{'ours, ms':>10}{'loop, ms':>10}{'ratio':>8}{'loss, ours':>12}{'loop':>8}")
    for name, uplink in (("[]", []), ("[LookBack(0.2)]", [LookBack(0.2)])):
        ours, theirs, turns = measure(args.clients, args.rounds, args.warmup, uplink)
        print(
            f"{name:<20}{ours * 1e3:>10.1f}{theirs * 1e3:>10.1f}{ours / theirs:>8.2f}"
            f"{turns.losses[0]:>12.4f}{turns.losses[1]:>8.4f}"
        )


if __name__ == "__main__":
    main()
