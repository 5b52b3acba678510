"""The server's app."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from digits.task import METHODS, make
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lightning_lbgm.flower import LBGMStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    config = context.run_config
    module, data = make(config, None)
    rounds = Rounds()
    trainer: dict[str, Any] = {"accelerator": "cpu", "callbacks": [rounds]}
    if config["tracking-uri"]:
        from lightning.pytorch.loggers import MLFlowLogger

        trainer["logger"] = MLFlowLogger("flower", tracking_uri=str(config["tracking-uri"]))
    strategy = LBGMStrategy(
        module,
        data,
        **METHODS[str(config["method"])],
        num_clients=int(config["partitions"]),
        local_steps=int(config["local-steps"]),
        seed=int(config["seed"]),
        min_available_nodes=int(config["min-nodes"]),
        fraction_evaluate=float(config["fraction-evaluate"]),
        state_dir=str(config["state-dir"]) or None,
        trainer=trainer,
    )
    result = strategy.start(grid, num_rounds=int(config["rounds"]), timeout=float(config["timeout"]))
    if config["results"]:
        final = {name: array.numpy().tolist() for name, array in result.arrays.items()}
        numbers = {"rounds": rounds.numbers, "refusals": strategy.refusals, "final": final}
        Path(str(config["results"])).write_text(json.dumps(numbers))


class Rounds(pl.Callback):
    """Collects each round's metrics and decisions."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        report = trainer.strategy.last_report
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        outcomes = {client.client_id: client.outcome for client in report.clients}
        self.numbers.append({"round": report.round_index, "time": time.time(), "outcomes": outcomes, **metrics})

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.numbers:
            self.numbers[-1]["val/acc"] = float(trainer.callback_metrics["val/acc"])
