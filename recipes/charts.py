"""Make runs that go well and runs that do not, to learn to read their charts: ``python -m recipes.charts``.

The digits and the linear classifier of the quickstart, 60 rounds each, about half a minute in all. The runs are kept in
MLflow's experiment ``charts``. ``--images docs/images`` draws the figures of docs/reading-charts.md from that store.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import MLFlowLogger
from mlflow.tracking import MlflowClient
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lbgm import ErrorFeedback, LBGMCallback, LBGMFederated, LookBack, PathologicalPartitioner, PowerSGD
from lightning_lbgm.compression import Stage
from lightning_lbgm.figures.communication import draw_metric_against_uplink
from recipes.quickstart import DigitsClassifier, load_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = [
    "val/acc",
    "comm/savings",
    "lbgm/recycled_fraction",
    "lbgm/lbp_error_mean",
    "fl/update_norm",
    "fl/rejected_clients",
]
DRAWN = ["FedAvg", "healthy", "too noisy", "threshold too high", "broken client"]


@dataclass(frozen=True)
class Case:
    """A run; the defaults are those of the healthy one."""

    uplink: list[Stage] = field(default_factory=lambda: [LookBack(threshold=0.05)])
    batch_size: int = 2000  # more than a client has: full-batch steps
    local_steps: int | None = None
    broken: bool = False  # whether one example of one client is not a number


CASES = {
    "FedAvg": Case(uplink=[]),
    "healthy": Case(),
    "too noisy": Case(batch_size=4, local_steps=1),
    "threshold too high": Case(uplink=[LookBack(threshold=0.95)]),
    "broken client": Case(broken=True),
    "rank too high": Case(uplink=[PowerSGD(rank=10)]),
    # What helps the second and the third:
    "noisy, mended": Case(uplink=[ErrorFeedback(LookBack(threshold=0.7, rank=8))], batch_size=4, local_steps=1),
    "threshold, mended": Case(uplink=[LookBack(threshold=0.5, max_age=10)]),
}


def run(name: str, case: Case, rounds: int, output: Path) -> str:
    """Train one case and return the id of its MLflow run."""
    pl.seed_everything(0, verbose=False)
    train, val = load_data()
    if case.broken:
        images, classes = (tensor.clone() for tensor in train.dataset.tensors)
        images[train.indices[0]] = float("nan")
        train = Subset(TensorDataset(images, classes), train.indices)
    logger = MLFlowLogger(
        "charts",
        run_name=name,
        tracking_uri=f"sqlite:///{output / 'mlflow.db'}",
        artifact_location=(output / "mlruns").resolve().as_uri(),
    )
    trainer = pl.Trainer(
        strategy=LBGMFederated(
            num_clients=20,
            partitioner=PathologicalPartitioner(classes_per_client=3),
            uplink=case.uplink,
            local_steps=case.local_steps,
        ),
        max_epochs=rounds,
        logger=logger,
        callbacks=[LBGMCallback(monitor="val/acc")],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=output,
    )
    loaders = DataLoader(train, batch_size=case.batch_size, shuffle=True), DataLoader(val, batch_size=len(val))
    trainer.fit(DigitsClassifier(lr=0.5), *loaders)
    assert logger.run_id is not None
    return logger.run_id


def draw_rounds(histories: dict[str, dict[str, list[float]]]) -> Figure:
    """Draw each metric of ``PANELS`` against the round, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4), dpi=110, layout="constrained")
    for axes, metric in zip(figure.subplots(2, 3, sharex=True).flat, PANELS):
        for name, history in histories.items():
            # FedAvg's line is thick and pale, and at the back: other lines lie on it.
            width, opacity = (5, 0.3) if name == "FedAvg" else (1.3, 1.0)
            axes.plot(history[metric], label=name, linewidth=width, alpha=opacity)
        axes.set_title(metric, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("round")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def draw(client: MlflowClient, runs: dict[str, str], histories: dict[str, dict[str, list[float]]], to: Path) -> None:
    """Write the figures: accuracy against uplink, the metrics by round, and the runs' own maps of the LBP error."""
    histories = {name: histories[name] for name in DRAWN}
    curves = {name: list(zip(h["comm/uplink_bytes_total"], h["val/acc"])) for name, h in histories.items()}
    draw_metric_against_uplink(curves, "val/acc", log_scale=True).savefig(to / "charts_accuracy.png")
    draw_rounds(histories).savefig(to / "charts_rounds.png")
    for name in DRAWN[1:]:
        figure = client.download_artifacts(runs[name], "figures/lbp_error.png")
        shutil.copyfile(figure, to / f"charts_error_{name.replace(' ', '_')}.png")


def main() -> None:
    """Train every case, print how each ends, and draw the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of mlflow.db")
    parser.add_argument("--images", type=Path, help="folder of the figures; none are drawn without it")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # threads inside such small operations cost more than they give
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)

    runs = {name: run(name, case, args.rounds, args.output) for name, case in CASES.items()}
    client = MlflowClient(tracking_uri=f"sqlite:///{args.output / 'mlflow.db'}")
    histories: dict[str, dict[str, list[float]]] = {
        name: {
            metric: [point.value for point in client.get_metric_history(run_id, metric)]
            for metric in [*PANELS, "comm/uplink_bytes_total"]
        }
        for name, run_id in runs.items()
    }
    print("| run | " + " | ".join(PANELS) + " |")
    print("| --- |" + " --- |" * len(PANELS))
    for name, history in histories.items():
        print(f"| {name} | " + " | ".join(f"{history[metric][-1]:.3g}" for metric in PANELS) + " |")
    if args.images is not None:
        args.images.mkdir(parents=True, exist_ok=True)
        draw(client, runs, histories, args.images)


if __name__ == "__main__":
    main()
