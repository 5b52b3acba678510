"""Convergence monitor: the compression error of each round against the bound of the paper's convergence result."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lbgm.callbacks.base import strategy_of
from lightning_lbgm.callbacks.outputs import writes_files
from lightning_lbgm.callbacks.run_outputs import log_round, outputs_of
from lightning_lbgm.callbacks.writing import WritingCallback
from lightning_lbgm.figures.convergence import draw_convergence
from lightning_lbgm.reports.history import Curves, Merge
from lightning_lbgm.reports.metrics import convergence_metrics
from lightning_lbgm.reports.reports import RoundReport

__all__ = ["ConvergenceMonitor"]

_FIGURE = "convergence.png"
_BINS: tuple[Merge, ...] = ("last", "mean", "max", "mean")  # of round, mean and max sent error, relative gap


class ConvergenceMonitor(WritingCallback):
    r"""Log what the paper's convergence result is about, and draw it.

    Theorem 1 of Azam et al. (ICLR 2022, arXiv 2202.00280) assumes that in every round, for every client k,

        |d_k|^2 sin^2(alpha_k) <= Delta^2

    where ``d_k`` is the mean of the client's tau stochastic gradients in the round and ``alpha_k`` its angle to the
    look-back gradient. ``Delta^2`` then stands in the bound on the squared gradient of the global loss, and it must be
    of the order of the learning rate eta for FedAvg's rate to hold. What is logged for it, as
    ``convergence/sent_error_mean`` and ``_max`` over the cohort, is measured, not computed from the LBP error:

        |g_k - g~_k|^2 / (eta tau_k)^2

    - **The same quantity.** The left side of the assumption is the squared distance of ``d_k`` from its projection on
      the look-back gradient, that is from what the server uses. So it is 0 if an update goes in full. With
      ``granularity="layer"`` it is the sum of ``|d_kl|^2 sin^2(alpha_kl)`` over the recycled parameter tensors l, with
      ``rank`` above 1 the angle is that to the span, and with other stages it is all that is lost on the way.
    - **The paper's scale.** An update here is ``g_k = theta - theta_k``, shape ``(M,)``; with plain SGD it is eta times
      the sum of the tau gradients, so ``g_k / (eta tau) = d_k``. With another optimizer it is the mean step for each
      unit of learning rate. eta is read off the optimizer at the start of each round, schedules included, and tau_k is
      what each client did. ``lr=1`` leaves eta out.
    - **Beyond the theorem.** Stages before ``LookBack`` add their own error. In ``ErrorFeedback`` the residual of
      earlier rounds is sent too and counts here as an error of this one, although it makes up for theirs.

    Besides, ``convergence/update_norm_mean``, ``_min`` and ``_max`` of ``|g_k|`` over the cohort, and how far the mean
    update that the server used is from the exact one, the weighted mean of the ``g_k`` before compression:
    ``convergence/gap_norm``, ``gap_relative`` and ``gap_cosine``. Clients that were rejected are left out of all. They
    go where ``LBGMCallback`` puts its metrics, and at the end ``figures/convergence.png`` to the same places as its
    figures.

    It costs two vectors of shape ``(M,)`` and a few passes over each update; without a monitor nothing is measured. It
    has no effect on training.

    Args:
        bound: Delta^2, positive, in the scale above. Logs the share of the clients above it as
            ``convergence/over_bound_fraction``, warns the first time that there is one, and marks it in the figure.
            None: no bound.
        lr: eta, the clients' learning rate. None: the optimizer's; if its parameter groups have different ones,
            nothing can be divided by it and the ``sent_error`` metrics are NaN.
        figure: Whether to draw the figure.

    Raises:
        ValueError: If ``bound`` or ``lr`` is not a positive number.
        MisconfigurationException: At fit start, if the Trainer's strategy is not ``LBGMFederated``.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import ConvergenceMonitor, LBGMFederated
        >>> trainer = Trainer(
        ...     strategy=LBGMFederated(), callbacks=[ConvergenceMonitor(bound=0.1)], accelerator="cpu", logger=False
        ... )
    """

    def __init__(self, bound: float | None = None, lr: float | None = None, figure: bool = True) -> None:
        self.bound = _check_positive("bound", bound)
        self.lr = _check_positive("lr", lr)
        self.figure = figure
        self._round_lr = math.nan
        self._history = Curves(_BINS)
        self._warned: set[str] = set()
        self._fitting = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            strategy_of(trainer).measure_errors = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._history = Curves(_BINS)
        self._warned = set()
        self._fitting = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Now, because at the batch's end a schedule has stepped on.
        self._round_lr = self._read_lr(trainer) if self.lr is None else self.lr

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        report = strategy_of(trainer).last_report
        assert report is not None
        metrics = convergence_metrics(report, self._round_lr, self.bound)
        log_round(trainer, pl_module, metrics, report.round_index)
        names = ("sent_error_mean", "sent_error_max", "gap_relative")
        mean, largest, gap = (metrics[f"convergence/{name}"] for name in names)
        if self.figure and writes_files(trainer):
            self._history.append((report.round_index, mean, largest, gap))
        if self.bound is not None and largest > self.bound:
            self._warn_of_bound(report, metrics)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history.state_dict()} if self.figure else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.figure:
            self._history.load_state_dict(state_dict["history"])

    def _read_lr(self, trainer: pl.Trainer) -> float:
        """Return the learning rate of all parameter groups; NaN if they differ."""
        rates = {float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if len(rates) == 1:
            return rates.pop()
        self._warn(
            "lr",
            f"The optimizer's parameter groups have different learning rates, {sorted(rates)}, so"
            " `convergence/sent_error_mean` and `_max` are NaN. Pass the one to divide by:"
            " `ConvergenceMonitor(lr=...)`.",
        )
        return math.nan

    def _warn_of_bound(self, report: RoundReport, metrics: dict[str, float]) -> None:
        self._warn(
            "bound",
            f"Round {report.round_index}: the largest sent error, {metrics['convergence/sent_error_max']:.3g}, is above"
            f" `ConvergenceMonitor(bound={self.bound:g})`; so are {metrics['convergence/over_bound_fraction']:.0%} of"
            " the round's clients. `convergence/over_bound_fraction` counts them from now on. A lower threshold of"
            " `LookBack` lowers the error.",
        )

    def _warn(self, topic: str, message: str) -> None:
        """Warn once a fit."""
        if topic not in self._warned:
            self._warned.add(topic)
            rank_zero_warn(message)

    def _finish(self, trainer: pl.Trainer) -> None:
        fitting, self._fitting = self._fitting, False
        outputs = outputs_of(trainer)
        try:
            if fitting and self.figure and len(self._history) and writes_files(trainer):
                rounds, means, maxima, gaps = zip(*self._history.points())
                draw = partial(draw_convergence, rounds, means, maxima, gaps, self.bound)
                outputs.write_figures(trainer, {_FIGURE: draw})
        finally:
            outputs.finish()


def _check_positive(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`ConvergenceMonitor({name}=...)` must be a positive number or None; got {value!r}.")
    return float(value)
