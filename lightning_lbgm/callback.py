"""The callback: round reports become metrics, a table and figures. It has no effect on training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lbgm._checks import check_federated
from lightning_lbgm._lightning import ClientProgress
from lightning_lbgm._outputs import can_draw, log_round, metric_to_draw, write_figures, write_table, writes_files
from lightning_lbgm.figures import draw_lbp_errors, draw_metric_against_uplink
from lightning_lbgm.ledger import RoundReport
from lightning_lbgm.metrics import client_rows, round_metrics
from lightning_lbgm.uplink import Chain, ErrorFeedback, LookBack, Stage

if TYPE_CHECKING:
    from lightning_lbgm.strategy import LBGMFederated

__all__ = ["LBGMCallback"]

_PROGRESS_SECONDS = 0.2
_TABLE_SECONDS = 60.0
_IN_PROGRESS_BAR = ("comm/savings", "lbgm/recycled_fraction")


class LBGMCallback(Callback):
    """Log what a federation sends, and draw it. ``LBGMFederated`` adds one where you pass none.

    Every round, in every logger with the round as the step, and in ``trainer.callback_metrics`` (so that
    ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them): the ``comm/``, ``lbgm/`` and ``fl/`` metrics that
    docs/metrics.md lists. Savings and recycled fraction stand in the progress bar, and in a long round the number of
    clients done.

    With an ``MLFlowLogger``: the resolved settings as params ``federated/...``, the table
    ``federated/clients.json`` with one row for each client and round, and at the end the figures
    ``figures/metric_vs_uplink.png`` and ``figures/lbp_error.png``. With another logger the table (``clients.csv``) and
    the figures go to the run's folder, and with none the figures go to ``trainer.default_root_dir``.

    Args:
        monitor: Metric of the figure against uplink bytes. None: that of ``ModelCheckpoint`` or ``EarlyStopping``, else
            the validation accuracy or loss, where one is logged.
        client_table: Whether to write the table, where there is a logger.
        figures: Whether to draw the figures.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import LBGMCallback, LBGMFederated
        >>> trainer = Trainer(
        ...     strategy=LBGMFederated(), callbacks=[LBGMCallback(monitor="val/acc")], accelerator="cpu", logger=False
        ... )
    """

    def __init__(self, monitor: str | None = None, client_table: bool = True, figures: bool = True) -> None:
        self.monitor = monitor
        self.client_table = client_table
        self.figures = figures
        self._metric: str | None = None
        self._curve: list[tuple[float, float]] = []  # (uplink bytes so far, metric)
        self._tests: list[tuple[int, int, float]] = []  # (round, client, LBP error)
        self._rows: list[dict[str, Any]] = []
        self._rows_written_at = 0.0
        self._warned_of_rejection = False
        self._progress: ClientProgress | None = None
        self._progress_at = 0.0

    # Hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_federated(self, trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._curve, self._tests = [], []
        self._rows, self._rows_written_at = [], time.monotonic()
        self._warned_of_rejection = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:  # the first round of a fit
            self._progress = ClientProgress(trainer)
            self._log_settings(trainer)
        self._progress_at = time.monotonic()

    def on_client_end(self, trainer: pl.Trainer, done: int, total: int) -> None:
        """Show the clients done in the progress bar; the strategy calls it after each client."""
        now = time.monotonic()
        if self._progress is not None and now - self._progress_at >= _PROGRESS_SECONDS and self._progress.is_shown:
            self._progress.show(done, total)
            self._progress_at = now

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = _strategy(trainer)
        report = strategy.last_report
        assert report is not None
        if self._progress is not None and self._progress.is_shown:
            self._progress.restore()
        self._warn_of_rejection(report)
        metrics = round_metrics(report, strategy.ledger)
        log_round(trainer, pl_module, metrics, report.round_index, in_bar=_IN_PROGRESS_BAR)
        self._tests.extend(
            (report.round_index, client.client_id, client.lbp_error) for client in report.clients if client.decision
        )
        if self.client_table and trainer.loggers and writes_files(trainer):
            self._rows.extend(client_rows(report))
            if time.monotonic() - self._rows_written_at > _TABLE_SECONDS:
                self._write_table(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add_point(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add_point(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._progress is not None:
            self._finish(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        rounds, clients, errors = zip(*self._tests) if self._tests else ((), (), ())
        return {
            "metric": self._metric,
            "curve": torch.tensor(self._curve, dtype=torch.float64),
            "rounds": torch.tensor(rounds, dtype=torch.int32),
            "clients": torch.tensor(clients, dtype=torch.int32),
            "errors": torch.tensor(errors, dtype=torch.float32),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._metric = state_dict["metric"]
        self._curve = [(x, y) for x, y in state_dict["curve"].tolist()]
        columns = (state_dict[name].tolist() for name in ("rounds", "clients", "errors"))
        self._tests = list(zip(*columns))

    # Outputs

    def _warn_of_rejection(self, report: RoundReport) -> None:
        """Warn the first time that a client is left out."""
        rejected = [client.client_id for client in report.clients if client.rejected]
        if not rejected or self._warned_of_rejection:
            return
        self._warned_of_rejection = True
        more = f" and {len(rejected) - 1} more" if len(rejected) > 1 else ""
        rank_zero_warn(
            f"Round {report.round_index}: the update of client {rejected[0]}{more} is not finite and was left out."
            " `fl/rejected_clients` counts them from now on. A smaller client learning rate or `gradient_clip_val`"
            " usually helps."
        )

    def _log_settings(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams({"federated": _strategy(trainer).settings()})
            except Exception as error:
                # MLflow refuses to change a param: here, a run that is resumed with other settings.
                if not isinstance(logger, MLFlowLogger):
                    raise
                rank_zero_warn(f"The federated settings were not logged to MLflow: {error}")

    def _add_point(self, trainer: pl.Trainer) -> None:
        metrics = trainer.callback_metrics
        if self._metric is None:
            self._metric = metric_to_draw(trainer, self.monitor)
        if self._metric is None or self._metric not in metrics:
            return
        point = (_strategy(trainer).ledger.uplink_bits / 8, float(metrics[self._metric]))
        if self._curve and self._curve[-1][0] == point[0]:  # validation and epoch end of the same round
            self._curve.pop()
        self._curve.append(point)

    def _finish(self, trainer: pl.Trainer) -> None:
        if writes_files(trainer):
            self._write_table(trainer)
            if self.figures and can_draw():
                self._write_figures(trainer)
        self._progress = None

    def _write_figures(self, trainer: pl.Trainer) -> None:
        figures = {}
        if self._curve and self._metric is not None:
            figures["metric_vs_uplink.png"] = draw_metric_against_uplink({"run": self._curve}, self._metric)
        if self._tests:
            rounds, clients, errors = zip(*self._tests)
            threshold = _threshold(_strategy(trainer))
            figures["lbp_error.png"] = draw_lbp_errors(rounds, clients, errors, threshold)
        write_figures(trainer, figures)

    def _write_table(self, trainer: pl.Trainer) -> None:
        rows, self._rows = self._rows, []
        self._rows_written_at = time.monotonic()
        starts = bool(rows) and rows[0]["round"] == 0
        write_table(trainer, rows, "federated/clients.json", "clients.csv", starts=starts)


def _strategy(trainer: pl.Trainer) -> LBGMFederated:
    return trainer.strategy  # type: ignore[return-value]


def _threshold(strategy: LBGMFederated) -> float | None:
    stage: Stage = strategy.uplink
    while isinstance(stage, ErrorFeedback) or (isinstance(stage, Chain) and stage.stages):
        stage = stage.stage if isinstance(stage, ErrorFeedback) else stage.stages[-1]
    # One that changes has no place on the colour bar.
    return stage.threshold if isinstance(stage, LookBack) and isinstance(stage.threshold, float) else None
