"""``ClientEvaluation``: how good the global model is for each client, and whom it is worse for than their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_lbgm._compat.lightning import is_overridden_by
from lightning_lbgm.callbacks.evaluating import evaluate_clients, evaluating_strategy_of
from lightning_lbgm.callbacks.evaluation_checks import check_clients, check_count, check_split
from lightning_lbgm.callbacks.outputs import writes_files
from lightning_lbgm.callbacks.run_outputs import log_round, outputs_of, show_metrics
from lightning_lbgm.callbacks.writing import WritingCallback
from lightning_lbgm.data.evaluation import choose_clients
from lightning_lbgm.data.feed import EvaluationData
from lightning_lbgm.figures.clients import draw_clients
from lightning_lbgm.reports.client_scores import ClientHistory, ClientScores, Direction, score_rows, summarize
from lightning_lbgm.reports.reports import ClientReport

__all__ = ["ClientEvaluation"]

_FIGURE = "clients.png"
_TABLE = ("federated/client_evaluation.json", "client_evaluation.csv")


class ClientEvaluation(WritingCallback):
    r"""Evaluate the global model on examples of each client, and log how good it is for the mean and the worst of them.

    A part of each client's training examples is held out: the client does not train with them, n_k is without them, and
    resuming with another split is refused as with other data. Or pass validation data as ``data``. On them the module's
    own ``validation_step`` runs client by client (with ``on_validation_epoch_start`` and ``_end`` around it, in eval
    mode, without gradients), after the first round, after every ``every_n_rounds`` rounds and after the last. Training
    is the same with evaluations and without; it is not the same with a split and without.

    For each metric that the module logs there, such as ``val/acc``:

    - ``clients/val/acc_mean``: the mean over the clients, weighted by their numbers of examples,
    - ``clients/val/acc_worst``, ``_p10``: the worst client, and the 10th percentile of the clients from the worse end,
    - ``clients/val/acc_std``: the standard deviation over the clients, each counting once,
    - ``clients/val/acc_worse_than_own``: the share of the clients for which the global model is worse than the model
      that they trained themselves in their last round,
    - ``clients/tuned/val/acc_mean`` and so on: the same after ``fine_tune_steps`` local steps from the global model.

    They stand in every logger and in ``trainer.callback_metrics``, so ``EarlyStopping`` and ``ModelCheckpoint`` can
    monitor them. Between two evaluations the last value stands there. A table with a row for each client and evaluation
    goes beside the clients' table (``federated/client_evaluation.json`` in MLflow, else ``client_evaluation.csv``), and
    at the end ``figures/clients.png`` shows the clients sorted, and each client's metric against the bytes it sent.

    What the dataset does to an example, such as a random crop, is done to held-out examples too, from a fixed seed; so
    pass ``data`` if training examples are augmented. Hooks of callbacks are not called, and what the module logs past
    ``self.log`` is its own business. In several processes each evaluates its clients: no ``all_gather`` in validation.

    Args:
        split: Share of each client's examples to hold out, in (0, 1); at least one example, and one at least is left.
            None: 0.2, or nothing if there is ``data``.
        every_n_rounds: Rounds from one evaluation to the next, as ``check_val_every_n_epoch`` counts epochs. The first
            round is evaluated too, so that callbacks which monitor these metrics find them.
        clients: Whom to evaluate. None: all; an int: as many, drawn once by the run's seed; or a list of ids or names.
        fine_tune_steps: Local steps from the global model, with the client's own optimizer on its training examples,
            for a second evaluation. Nothing is kept of them. 0: none.
        data: Validation data instead of a split: one Dataset or DataLoader that is dealt to the clients as the training
            data was (by ids with ``NaturalPartitioner``; with the label shares of ``PathologicalPartitioner``,
            ``ShardPartitioner`` and ``DirichletPartitioner``); or a list with a Dataset or DataLoader for each client,
            or a dict of them by client id or name.
        keys: With one dataset as ``data``: the client id or label of each example, if the partitioner needs it and the
            dataset does not show it.
        own_models: Whether to evaluate each client's local model at the end of each of its turns, for
            ``_worse_than_own``. It costs one pass over the client's evaluation data.
        lower_is_better: Names of metrics of which lower values are better, or a dict of names with True or False. Of
            others lower is better if the name contains loss, error, mse, mae or perplexity.
        monitor: Metric of the figure, such as ``"val/acc"``. None: the first that is an accuracy, else the first.
        table: Whether to write the table, if there is a logger.
        figure: Whether to draw the figure.

    Raises:
        TypeError: If ``clients`` or ``lower_is_better`` has the wrong type.
        ValueError: If an argument is out of range, or ``split`` and ``data`` are both given; and before the first round
            if the data does not go with the clients.
        MisconfigurationException: At fit start, if the Trainer's strategy is not ``LBGMFederated`` or the module has no
            ``validation_step``.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_lbgm import ClientEvaluation, LBGMFederated
        >>> trainer = Trainer(
        ...     strategy=LBGMFederated(num_clients=20),
        ...     callbacks=[ClientEvaluation(split=0.2), EarlyStopping("clients/val/acc_worst", mode="max")],
        ...     accelerator="cpu",
        ...     logger=False,
        ... )
    """

    def __init__(
        self,
        split: float | None = None,
        every_n_rounds: int = 5,
        clients: int | Sequence[int | str] | None = None,
        fine_tune_steps: int = 0,
        data: Any = None,
        keys: Any = None,
        own_models: bool = True,
        lower_is_better: Sequence[str] | dict[str, bool] | None = None,
        monitor: str | None = None,
        table: bool = True,
        figure: bool = True,
    ) -> None:
        self.split = check_split(split, data, keys)
        self.every_n_rounds = check_count("every_n_rounds", every_n_rounds, 1)
        self.clients = check_clients(clients)
        self.fine_tune_steps = check_count("fine_tune_steps", fine_tune_steps, 0)
        self.data, self.keys = data, keys
        self.own_models = own_models
        self.lower_is_better = lower_is_better
        self.monitor = monitor
        self.table = table
        self.figure = figure
        self.held_out = self.split
        self._direction = Direction(lower_is_better)
        self._history = ClientHistory()
        self._metrics: dict[str, float] = {}  # of the last evaluation
        self._scores: dict[int, ClientScores] = {}
        self._evaluated_at = -1  # the round
        self._data: EvaluationData | None = None  # of a fit that has begun a round
        self._chosen: tuple[int, ...] = ()
        self._own: dict[int, dict[str, float]] = {}  # in the round at hand, of this process's clients

    # Hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._data = None
        if not is_overridden_by("validation_step", pl_module):
            raise MisconfigurationException(
                f"`ClientEvaluation` runs the module's `validation_step` on each client's examples, but"
                f" `{type(pl_module).__name__}` has none. Add one that logs metrics with `self.log`, or drop the"
                " callback."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._history, self._metrics, self._scores, self._evaluated_at = ClientHistory(), {}, {}, -1

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._own = {}
        if self._data is not None:
            return
        strategy = evaluating_strategy_of(trainer)
        data = strategy.evaluation_data(self.data, self.keys)
        assert data is not None, "the strategy holds out what a callback asks for"
        self._chosen = choose_clients(self.clients, data, strategy.feed, strategy.settings()["seed"])
        self._data = data
        # Of a run that goes on: callbacks that monitor them need a value before the next evaluation.
        show_metrics(trainer, pl_module, self._metrics)

    @override
    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: ClientReport) -> None:
        if not self.own_models or report.rejected or report.client_id not in self._chosen:
            return
        assert self._data is not None
        strategy, client_id = evaluating_strategy_of(trainer), report.client_id
        with strategy.local_model():
            _, self._own[client_id] = strategy.validate_client(client_id, self._data.batches(client_id))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = evaluating_strategy_of(trainer)
        report = strategy.last_report
        assert report is not None
        own = self._own
        if self.own_models:
            parts = strategy.gather(own, f"own models of round {report.round_index}")
            own = {client_id: metrics for part in parts for client_id, metrics in part.items()}
        self._history.record(report.round_index, report.clients, own)
        rounds = report.round_index + 1
        if rounds == 1 or rounds % self.every_n_rounds == 0 or _is_last_round(trainer):
            self._evaluate(trainer, report.round_index)
            log_round(trainer, pl_module, self._metrics, report.round_index)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        report = evaluating_strategy_of(trainer).last_report
        if self._data is not None and report is not None and report.round_index > self._evaluated_at:
            # A run that something has ended early. It is too late for `self.log`.
            self._evaluate(trainer, report.round_index)
            outputs_of(trainer).log_metrics(trainer, self._metrics, report.round_index)
        super().on_train_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self._history.state_dict(),
            "metrics": dict(self._metrics),
            "evaluated_at": self._evaluated_at,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history.load_state_dict(state_dict["history"])
        self._metrics, self._evaluated_at = dict(state_dict["metrics"]), state_dict["evaluated_at"]

    # Evaluation

    def _evaluate(self, trainer: pl.Trainer, round_index: int) -> None:
        assert self._data is not None
        self._scores = evaluate_clients(trainer, self._data, self._chosen, self.fine_tune_steps, round_index)
        self._metrics = summarize(self._scores, self._history.own, self._direction)
        first, self._evaluated_at = self._evaluated_at < 0, round_index
        if self.table and trainer.loggers and writes_files(trainer):
            names = evaluating_strategy_of(trainer).feed.client_names
            rows = list(score_rows(round_index, self._scores, self._history, names, self.own_models))
            outputs_of(trainer).add_rows(trainer, rows, *_TABLE, starts=first)

    def _finish(self, trainer: pl.Trainer) -> None:
        begun, self._data = self._data is not None, None
        outputs = outputs_of(trainer)
        try:
            metric = self._metric_to_draw()
            if begun and self.figure and metric is not None and writes_files(trainer):
                sent, lower = self._history.uplink_bytes, self._direction(metric)
                draw = partial(draw_clients, metric, self._models(metric), sent, lower_is_better=lower)
                outputs.write_figures(trainer, {_FIGURE: draw})
        finally:
            outputs.finish()

    def _models(self, metric: str) -> dict[str, dict[int, float]]:
        """Return a metric of each evaluated client under each model that it was evaluated with."""
        scores, own = self._scores, self._history.own
        models = {
            "global model": {k: score.metrics[metric] for k, score in scores.items() if metric in score.metrics},
            "own last model": {k: own[k][metric] for k in scores if metric in own.get(k, {})},
            "tuned": {k: score.tuned[metric] for k, score in scores.items() if metric in score.tuned},
        }
        return {name: values for name, values in models.items() if values}

    def _metric_to_draw(self) -> str | None:
        names = list(dict.fromkeys(name for score in self._scores.values() for name in score.metrics))
        if self.monitor is not None:
            return self.monitor if self.monitor in names else None
        return next((name for name in names if "acc" in name.lower()), names[0] if names else None)


def _is_last_round(trainer: pl.Trainer) -> bool:
    """Whether the Trainer's limits end the fit after this round."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    ends_epoch = trainer.is_last_batch
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return bool(ends_epoch and is_last_epoch)
