"""Several fits in one launch, for test_world.py: ``python processes_script.py DEVICES FOLDER [CHECKPOINT]``.

Rank r writes ``FOLDER/rank{r}.pt``: for each fit what came of it on that rank.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torchmetrics
from conftest import Recorder, TinyModule, build_trainer, flat_params, make_data
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lbgm import (
    DIANA,
    QSGD,
    ClientEvaluation,
    ConvergenceMonitor,
    DirichletPartitioner,
    Dropout,
    ErrorFeedback,
    LBGMFederated,
    LookBack,
    NetworkClock,
    PartitionReport,
    PowerOfChoice,
    TargetSavings,
    TopK,
)


class NoisyModule(TinyModule):
    """BatchNorm, dropout, momentum, all kinds of logged values, and state of all kinds that a step may change."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        super().__init__(lr=0.1, net=net, momentum=0.9)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.encoder = nn.Linear(6, 2).requires_grad_(False)  # like a momentum encoder
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("lowest", torch.full((6,), float("inf")))
        self.register_buffer("hidden", torch.zeros(6), persistent=False)
        self.register_buffer("made", None, persistent=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        mean = x.mean(0)
        self.encoder.weight.data = 0.9 * self.encoder.weight.data + 0.1 * mean
        self.steps += 1
        self.lowest = torch.minimum(self.lowest, x.amin(0))
        self.hidden.add_(mean)
        self.made = mean if self.made is None else 0.5 * (self.made + mean)
        self.accuracy(self(x), y)
        self.log("train/acc", self.accuracy, on_step=False, on_epoch=True)
        self.log("train/examples", float(len(y)), reduce_fx="sum", on_step=True)
        self.log("train/last_step", batch_idx, reduce_fx="max", sync_dist=True)
        if batch_idx == 2:
            self.log("train/third_step", x.mean())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        self.log("val/loss", nn.functional.cross_entropy(output, y), sync_dist=True)
        self.log("val/acc", (output.argmax(1) == y).float().mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return len(batch[0])


class Evaluated(NoisyModule):
    """Validates with metrics that would be computed over all processes, if these did not evaluate clients apart."""

    def validation_step(self, batch, batch_idx):
        self.trainer.strategy.barrier()
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("val/metric", self.accuracy)
        super().validation_step(batch, batch_idx)


class RareMetric(TinyModule):
    """Logs a metric for one client's batches only, the one with the largest first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        if bool((batch[0][:, 0] > 50).any()):
            self.rare(batch[0][:, 0].max())
            self.log("rare", self.rare, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


class NoisyStream(IterableDataset):
    """One client's examples with noise, which does not say how many there are; it counts how often it was begun."""

    def __init__(self, size: int) -> None:
        self.data, self.passes = make_data(size, seed=size), 0

    def __iter__(self):
        self.passes += 1
        for x, y in zip(*self.data.tensors):
            yield x + 0.1 * torch.rand(()) + 0.1 * random.random(), y


def summary(trainer: pl.Trainer, module: pl.LightningModule, recorder: Recorder) -> dict:
    strategy = trainer.strategy
    return {
        "params": flat_params(module),
        "buffers": dict(module.named_buffers()),
        "frozen": {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad},
        "cohorts": [[c.client_id for c in r.clients] for r in recorder.reports],
        "dropped": [[(c.client_id, c.downlink_bits) for c in r.dropped] for r in recorder.reports],
        "outcomes": [[c.outcome for c in r.clients] for r in recorder.reports],
        "errors": torch.tensor([c.lbp_error for r in recorder.reports for c in r.clients]),
        "ledger": strategy.ledger.state_dict(),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "round_metrics": recorder.callback_metrics,
        "rounds": trainer.global_step,
        "own_clients": sorted(strategy._federation.clients),
    }


def run(
    root: Path, devices: int, module: pl.LightningModule, strategy, dataset=None, ckpt_path=None, loader=None, **kwargs
) -> dict:
    recorder = Recorder()
    monitor = ConvergenceMonitor(bound=1e-3, lr=1.0)
    report = PartitionReport(figures=kwargs.pop("figures", False))
    callbacks = [monitor, recorder, report, *kwargs.pop("callbacks", [])]
    trainer = build_trainer(root, strategy, devices=devices, callbacks=callbacks, **kwargs)
    dataset = make_data(120) if dataset is None else dataset
    loader = DataLoader(dataset, batch_size=8, shuffle=True) if loader is None else loader
    trainer.fit(module, loader, DataLoader(make_data(40, seed=1), batch_size=10), ckpt_path=ckpt_path)
    return {**summary(trainer, module, recorder), "trainer": trainer}


def noisy_strategy(folder: Path) -> LBGMFederated:
    return LBGMFederated(
        num_clients=9,
        partitioner=DirichletPartitioner(0.5),
        clients_per_round=5,
        local_steps=3,
        uplink=[ErrorFeedback(TopK(0.5)), LookBack(0.6)],
        client_store=str(folder / "store"),
        client_capacity=6,
        server_optimizer=lambda params: torch.optim.SGD(params, lr=0.9, momentum=0.5),
    )


def resume(devices: int, folder: Path, source: Path) -> dict:
    results = run(folder, devices, NoisyModule(), noisy_strategy(folder), max_epochs=8, ckpt_path=source)
    results.pop("trainer")
    return results


def main(devices: int, folder: Path, source: Path | None = None) -> None:
    results = {}
    rank = int(os.environ.get("LOCAL_RANK", 0))

    # Seeded apart: rank 0's parameters and seed count.
    pl.seed_everything(5)
    module = NoisyModule()
    if rank:
        torch.manual_seed(99)
        module = NoisyModule()
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    settings = {"callbacks": [checkpoint], "enable_checkpointing": True, "figures": True}
    noisy = run(folder, devices, module, noisy_strategy(folder), max_epochs=8, **settings)
    trainer = noisy.pop("trainer")
    results["threads"] = torch.get_num_threads()
    results["noisy"] = noisy
    results["rank"] = (trainer.global_rank, trainer.world_size, trainer.is_global_zero)
    results["logged"] = sorted(trainer.logged_metrics)
    sizes = trainer.predict(module, DataLoader(make_data(41, seed=2), batch_size=10))
    results["predicted"] = sum(sizes)
    results["tested"] = trainer.validate(module, DataLoader(make_data(40, seed=1), batch_size=10), verbose=False)[0]

    if source is not None:
        results["resumed"] = resume(devices, folder, source)

    # A steered threshold and DIANA, more ranks than clients in a round, and early stopping that all agree on.
    torch.manual_seed(3)
    strategy = LBGMFederated(
        num_clients=4, clients_per_round=1, uplink=[LookBack(TargetSavings(0.5), "layer")], local_epochs=2, seed=1
    )
    stopping = EarlyStopping("val/loss", patience=1, min_delta=10.0)
    results["alone"] = run(folder, devices, TinyModule(), strategy, max_epochs=9, callbacks=[stopping])
    results["alone"].pop("trainer")
    torch.manual_seed(3)
    strategy = LBGMFederated(num_clients=5, uplink=[DIANA(QSGD(7))], weighting="uniform", seed=2)
    results["diana"] = run(folder, devices, TinyModule(), strategy, max_epochs=4)
    results["diana"].pop("trainer")

    # One client is left out, and one logs a metric that no other does.
    x, y = make_data(60).tensors
    x[7, 0], x[31, 1] = 60.0, float("nan")
    torch.manual_seed(3)
    dataset = torch.utils.data.TensorDataset(x, y)
    results["rare"] = run(folder, devices, RareMetric(), LBGMFederated(num_clients=4, seed=0), dataset, max_epochs=2)
    results["rare"].pop("trainer")

    # What clients hold, and who has heard what, is the same on all ranks.
    torch.manual_seed(3)
    down = [TopK(0.3), LookBack(0.6)]
    strategy = LBGMFederated(num_clients=5, clients_per_round=3, uplink=[TopK(0.5)], downlink=down, seed=2)
    results["downlink"] = run(folder, devices, NoisyModule(), strategy, max_epochs=6)
    results["downlink"].pop("trainer")

    # Who takes part: more ranks than clients, and rounds without any; what the sampler learns is the same on all ranks,
    # and what a function says is the first one's.
    torch.manual_seed(3)
    strategy = LBGMFederated(
        num_clients=7, partitioner=DirichletPartitioner(0.5), clients_per_round=3, uplink=[TopK(0.5), LookBack(0.6)],
        downlink=[TopK(0.3)], sampler=PowerOfChoice(5), over_select=1.4, dropout=Dropout(0.1, 0.3), seed=2,
        availability=lambda round_index, client_id: 0.7 * (round_index not in (2, 3)) + 0.01 * rank,
    )  # fmt: skip
    results["turnout"] = run(folder, devices, TinyModule(), strategy, max_epochs=8)
    results["turnout"].pop("trainer")
    results["sampling"] = strategy._federation.sampling

    # What rounds take on a network, and who is in time there, is the same on all ranks.
    torch.manual_seed(3)
    strategy = LBGMFederated(
        num_clients=7, partitioner=DirichletPartitioner(0.5), clients_per_round=3, uplink=[TopK(0.5), LookBack(0.6)],
        over_select=1.4, deadline="3 s", dropout=0.2, seed=2,
        network=NetworkClock("1 kB/s", "2 kB/s", latency="40 ms", compute="0.2 s", spread=0.5),
    )  # fmt: skip
    results["network"] = run(folder, devices, TinyModule(), strategy, max_epochs=5)
    results["network"].pop("trainer")

    # Each rank evaluates its own clients, some of which have not had a turn yet, with the buffers that they keep.
    torch.manual_seed(3)
    strategy = LBGMFederated(num_clients=7, clients_per_round=2, buffers="client", uplink=[TopK(0.5)], seed=2)
    evaluation = ClientEvaluation(every_n_rounds=2, fine_tune_steps=2, figure=False)
    results["evaluated"] = run(folder, devices, Evaluated(), strategy, max_epochs=4, callbacks=[evaluation])
    results["evaluated"].pop("trainer")
    results["evaluation"] = evaluation.state_dict()

    # A loader for each client, one of them with a worker.
    torch.manual_seed(3)
    streams = {f"client {n}": NoisyStream(n) for n in (11, 25, 16, 40, 9)}
    loaders = {name: DataLoader(stream, batch_size=8) for name, stream in streams.items()}
    loaders["shuffled"] = DataLoader(make_data(20), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
    strategy = LBGMFederated(num_clients=None, clients_per_round=5, uplink=[TopK(0.3), LookBack(0.5)], seed=4)
    results["loaders"] = run(folder, devices, TinyModule(), strategy, loader=loaders, max_epochs=3)
    results["loaders"].pop("trainer")
    results["passes"] = [stream.passes for stream in streams.values()]
    torch.save(results, folder / f"rank{rank}.pt")
    trainer.strategy.barrier()  # rank 0 ends last, for who waits for it reads all files


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(Path, sys.argv[2:]))
