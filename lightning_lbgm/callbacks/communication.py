"""``LBGMCallback``: logs the metrics, the client table and the figures of each round, without an effect on training."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lbgm._compat.progress_bar import ClientProgress
from lightning_lbgm.callbacks.advice import Advice
from lightning_lbgm.callbacks.base import FederatedStrategy, strategy_of
from lightning_lbgm.callbacks.outputs import MetricCurve, writes_files
from lightning_lbgm.callbacks.run_outputs import log_round, outputs_of
from lightning_lbgm.callbacks.writing import WritingCallback
from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.methods.error_feedback import ErrorFeedback
from lightning_lbgm.compression.methods.lookback import LookBack
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.figures.communication import (
    draw_lbp_errors,
    draw_metric_against_time,
    draw_metric_against_total,
    draw_metric_against_uplink,
)
from lightning_lbgm.reports.history import ErrorMap
from lightning_lbgm.reports.metrics import client_rows, round_metrics
from lightning_lbgm.reports.reports import RoundReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LBGMCallback"]

_PROGRESS_SECONDS = 0.2
_IN_PROGRESS_BAR = ("comm/savings", "lbgm/recycled_fraction")


class LBGMCallback(WritingCallback):
    """Log what a federation sends, and draw it. ``LBGMFederated`` adds one if you pass none.

    Every round, in every logger with the round as the step, and in ``trainer.callback_metrics`` (so that
    ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them): the ``comm/``, ``lbgm/`` and ``fl/`` metrics that
    docs/metrics.md lists. Savings and recycled fraction stand in the progress bar, with stages on the downlink also the
    savings of both directions, and in a long round the number of clients done.

    With an ``MLFlowLogger``: the resolved settings as params ``federated/...``, the table
    ``federated/clients.json`` with one row for each client and round, and at the end the figures
    ``figures/metric_vs_uplink.png``, ``figures/metric_vs_total.png`` (both directions), ``figures/lbp_error.png``, and
    with a ``NetworkClock`` ``figures/metric_vs_hours.png``.
    With another logger the table (``clients.csv``) and the figures go to the run's folder, and with none the figures go
    to ``trainer.default_root_dir``.

    A round does not wait for MLflow: a thread sends the metrics of half a second in one batch, and the table once a
    minute. What a logger or a disk does not take does not stop training: it is kept in a folder ``unsent`` of the run,
    and there is one warning.

    Args:
        monitor: Metric of the figure against uplink bytes. None: that of ``ModelCheckpoint`` or ``EarlyStopping``, else
            the validation accuracy or loss, if one is logged.
        client_table: Whether to write the table, if there is a logger.
        figures: Whether to draw the figures, for which at most 16 bytes a client and round are kept, and 1.3 MB in all.

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
        self._curve = MetricCurve(monitor)  # over uplink bytes so far
        self._total_curve = MetricCurve(monitor)  # over those of both directions
        self._time_curve = MetricCurve(monitor)  # over the seconds of a clock
        self._errors = ErrorMap()
        self._advice = Advice()
        self._warned_of_rejection = False
        self._progress: ClientProgress | None = None
        self._progress_at = 0.0

    # Hooks

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._curve, self._total_curve = MetricCurve(self.monitor), MetricCurve(self.monitor)
            self._time_curve = MetricCurve(self.monitor)
            self._errors = ErrorMap()
        self._warned_of_rejection = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:  # the first round of a fit
            self._progress = ClientProgress(trainer)
            strategy = strategy_of(trainer)
            self._advice.begin(strategy.uplink, strategy.settings(), anew=trainer.global_step == 0)
            outputs_of(trainer).log_settings(trainer, strategy.settings())
        self._progress_at = time.monotonic()

    @override
    def on_client_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        """Show the clients done in the progress bar."""
        now = time.monotonic()
        if self._progress is not None and now - self._progress_at >= _PROGRESS_SECONDS and self._progress.is_shown:
            self._progress.show(done, total)
            self._progress_at = now

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = strategy_of(trainer)
        report = strategy.last_report
        assert report is not None
        if self._progress is not None and self._progress.is_shown:
            self._progress.restore()
        self._warn_of_rejection(report)
        metrics = {**round_metrics(report, strategy.ledger), **self._advice.observe(report)}
        in_bar = _IN_PROGRESS_BAR if report.broadcast is None else (*_IN_PROGRESS_BAR, "comm/total_savings")
        log_round(trainer, pl_module, metrics, report.round_index, in_bar=in_bar)
        if self._draws(trainer):
            self._errors.add(report.round_index, ((c.client_id, c.lbp_error) for c in report.clients if c.decision))
        if self.client_table and trainer.loggers and writes_files(trainer):
            rows, starts = list(client_rows(report)), report.round_index == 0
            outputs_of(trainer).add_rows(trainer, rows, "federated/clients.json", "clients.csv", starts=starts)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add_point(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add_point(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self.figures:
            return self._advice.state_dict()
        curves = {**self._curve.state_dict(), "total": self._total_curve.state_dict()}
        if self._time_curve.metric is not None:
            curves["time"] = self._time_curve.state_dict()
        return {**self._advice.state_dict(), **curves, "lbp_errors": self._errors.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._advice.load_state_dict(state_dict)
        if not self.figures or not state_dict.keys() - {"last_rounds"}:  # saved without figures
            return
        self._curve.load_state_dict(state_dict)
        if "total" in state_dict:  # not in checkpoints of earlier versions
            self._total_curve.load_state_dict(state_dict["total"])
        if "time" in state_dict:
            self._time_curve.load_state_dict(state_dict["time"])
        if "lbp_errors" in state_dict:
            self._errors.load_state_dict(state_dict["lbp_errors"])
        else:  # a checkpoint of version 0.1
            self._errors.load_tests(*(state_dict[name] for name in ("rounds", "clients", "errors")))

    # Outputs

    def _warn_of_rejection(self, report: RoundReport) -> None:
        """Warn the first time that a client is left out."""
        rejected = [client for client in report.clients if client.rejected]
        if not rejected or self._warned_of_rejection:
            return
        self._warned_of_rejection = True
        first, more = rejected[0], f" and {len(rejected) - 1} more" if len(rejected) > 1 else ""
        if first.missing:
            rank_zero_warn(
                f"Round {report.round_index}: the update of client {first.client_id}{more} is missing."
                f" {first.missing.rstrip('.')}. `fl/rejected_clients` counts them from now on."
            )
            return
        rank_zero_warn(
            f"Round {report.round_index}: the update of client {first.client_id}{more} is not finite and was left out."
            " `fl/rejected_clients` counts them from now on. A smaller client learning rate or `gradient_clip_val`"
            " usually helps."
        )

    def _draws(self, trainer: pl.Trainer) -> bool:
        return self.figures and writes_files(trainer)

    def _add_point(self, trainer: pl.Trainer) -> None:
        if self._draws(trainer):
            ledger = strategy_of(trainer).ledger
            self._curve.add(trainer, ledger.uplink_bits / 8)
            self._total_curve.add(trainer, ledger.total_bits / 8)
            report = strategy_of(trainer).last_report
            if report is not None and report.time is not None:
                self._time_curve.add(trainer, ledger.seconds)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Draw, and send all that is waiting, of a fit that has begun a round."""
        begun, self._progress = self._progress is not None, None
        outputs = outputs_of(trainer)
        try:
            if begun and self._draws(trainer):
                outputs.write_figures(trainer, self._drawings(_threshold(strategy_of(trainer))))
        finally:
            outputs.finish()

    def _drawings(self, threshold: float | None) -> dict[str, Callable[[], Figure]]:
        drawings: dict[str, Callable[[], Figure]] = {}
        points, metric = self._curve.points(), self._curve.metric or self._time_curve.metric
        if points and metric is not None:
            totals = self._total_curve.points()
            drawings["metric_vs_uplink.png"] = lambda: draw_metric_against_uplink({"run": points}, metric)
            drawings["metric_vs_total.png"] = lambda: draw_metric_against_total({"run": totals}, metric)
        if times := self._time_curve.points():
            drawings["metric_vs_hours.png"] = lambda: draw_metric_against_time({"run": times}, str(metric))
        if len(self._errors):
            cell = (self._errors.round_stride, self._errors.client_stride)
            drawings["lbp_error.png"] = partial(draw_lbp_errors, *self._errors.cells(), threshold, cell=cell)
        return drawings


def _threshold(strategy: FederatedStrategy) -> float | None:
    stage: Stage = strategy.uplink
    while isinstance(stage, ErrorFeedback) or (isinstance(stage, Chain) and stage.stages):
        stage = stage.stage if isinstance(stage, ErrorFeedback) else stage.stages[-1]
    # One that changes has no place on the colour bar.
    return stage.threshold if isinstance(stage, LookBack) and isinstance(stage.threshold, float) else None
