"""Rounds as Lightning's training batches: the hooks that run clients and the server's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lbgm._compat import loop_progress
from lightning_lbgm._compat.lightning import (
    LOG_ARGUMENTS,
    batch_transfer,
    collect_train_loaders,
    extend_learning_rate_trial,
    know_round_sizes,
    pass_rounds_through,
    resume_within_epoch,
    watch_optimizer_step,
)
from lightning_lbgm.callbacks.base import FederatedCallback
from lightning_lbgm.callbacks.communication import LBGMCallback
from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.clients.objective_turn import ObjectiveTurn
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.rounds import Round, RoundLoader
from lightning_lbgm.reports.reports import ClientReport, RoundReport
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.batch_hooks import watch_batch_hooks
from lightning_lbgm.strategy.checks import (
    check_finders,
    check_fit,
    check_limits,
    check_personal_steps,
    warn_of_own_buffers,
    warn_of_unaveraged,
    warn_of_untrained_personal,
)
from lightning_lbgm.strategy.client_models import ClientModelsStrategy
from lightning_lbgm.strategy.data_checks import check_same_data
from lightning_lbgm.strategy.execution import Execution
from lightning_lbgm.strategy.feed import make_rounds
from lightning_lbgm.strategy.lazy import has_lazy_parameters, initialize_lazy
from lightning_lbgm.strategy.local_counts import count_local_batches
from lightning_lbgm.strategy.local_outputs import LocalOutput, noted_extra_outputs
from lightning_lbgm.strategy.local_step import local_step
from lightning_lbgm.strategy.log_capture import LogCapture, captured_log
from lightning_lbgm.strategy.round_checks import check_round_begins, check_round_ends, refuse_missing_step
from lightning_lbgm.strategy.schedules import is_zero_rate, warn_of_long_schedules, warn_of_zero_rate
from lightning_lbgm.strategy.session import Session
from lightning_lbgm.strategy.settings import describe_changes

__all__ = ["RoundsStrategy"]

_LIGHTNING_LOG_EVERY_N_STEPS = 50


class RoundsStrategy(ClientModelsStrategy):
    """Run a communication round for each training batch of Lightning's fit loop.

    Args:
        session: The settings and what belongs to the fits of a Trainer.

    Attributes:
        last_report: Of the last round; None before the first.
        measure_errors: Set by a callback's ``setup`` if the error of compression is to be measured in this fit.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.execution = Execution(session.settings.execution, session.settings.vectorized_chunk)
        self.last_report: RoundReport | None = None
        self.measure_errors = False
        self._undo_collecting: Callable[[], None] | None = None

    @property
    def _federation(self) -> Federation | None:
        return self.session.federation

    # Environment

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        if model.trainer.state.fn == TrainerFn.FITTING and self._undo_collecting is None:
            # Here already, because a hook such as `setup` may ask for `trainer.estimated_stepping_batches`.
            self._undo_collecting = collect_train_loaders(model.trainer)
        callbacks: list[pl.Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, LBGMCallback) for callback in callbacks):
            callbacks.insert(0, LBGMCallback())

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        fits, session = trainer.state.fn == TrainerFn.FITTING, self.session
        if fits:
            check_fit(trainer, self._module())
            check_limits(trainer, session.settings.rounds_per_epoch)
            check_finders(trainer)
            if trainer.log_every_n_steps == _LIGHTNING_LOG_EVERY_N_STEPS:  # type: ignore[attr-defined]
                trainer.log_every_n_steps = 1  # type: ignore[attr-defined]
            session.seed_of_fit = self.world.broadcast(session.seed)
        super().setup(trainer)
        if fits and self.optimizers:  # new now: a checkpoint's state comes later
            session.start_of(self.optimizers[0])
        if fits and not session.is_patched:
            session.local_counts, undo_counts = count_local_batches(trainer.callbacks)  # type: ignore[attr-defined]
            session.patch(
                undo_counts,
                pass_rounds_through(self._module()),
                watch_optimizer_step(self._module(), self._check_stepped),
                watch_batch_hooks(trainer, self._module()),
            )

    # Data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Turn the training DataLoader into a loader of rounds; each process gets its share of others."""
        if not isinstance(dataloader, TrainLoaders):
            return super().process_dataloader(dataloader)
        return make_rounds(self.session, dataloader, self._trainer(), lambda: self.world, self.world_size)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        # A round's local batches are moved as they are drawn.
        if isinstance(batch, Round):
            self.session.begin_round(self._trainer(), self._module())
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    # A round

    @override
    def on_train_start(self) -> None:
        # The last hook before the first round: callbacks have frozen what they freeze, the trainer's state is restored.
        trainer, module, session = self._trainer(), self._module(), self.session
        loop_progress.start_next_epoch(trainer)
        know_round_sizes(trainer)
        loader = trainer.train_dataloader
        assert isinstance(loader, RoundLoader)
        session.feed = feed = loader.feed
        feed.prepare(self.world)
        if has_lazy_parameters(module):
            transfer = batch_transfer(trainer, module, super().batch_to_device)
            with captured_log(module, LogCapture(LOG_ARGUMENTS)):
                initialize_lazy(module, feed, session.seed, self.root_device, transfer)
        if self.world.size > 1:
            check_same_data(self.world.gather(feed.fingerprint(), "the partition"))
        session.settings.participation.check(feed, loader.cohort_size)
        federation = session.begin(trainer, module, self.world)
        if session.settings.buffers == "client":
            warn_of_own_buffers(federation.buffers.names)
        personal = session.settings.personal
        if personal is not None and personal.steps is not None:
            check_personal_steps(personal.steps, [feed.num_steps(k) for k in range(feed.num_clients)])
        if trainer.enable_validation:
            warn_of_untrained_personal(list(federation.buffers.personal()))
        session.begin_trial(extend_learning_rate_trial(trainer))
        rank_zero_info(f"Federated training: {describe_changes(self.settings())}.")
        warn_of_long_schedules(trainer)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        counts = self.session.local_counts
        for count in counts:
            count.begin_round()
        batch.observers = tuple(count.observe for count in counts)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the client phase of a round and return the cohort's mean loss, detached."""
        round_, takes_index = args[0], len(args) > 1
        module, trainer, session = self._module(), self._trainer(), self.session
        federation = session.current(module, self.world)
        check_round_begins(module, round_.index, federation.round_index, federation.in_round)
        optimizer = self.optimizers[0]
        if is_zero_rate(optimizer) and not session.warned_of_zero_rate:
            session.warned_of_zero_rate = True
            warn_of_zero_rate(round_.index)
        transfer = batch_transfer(trainer, module, super().batch_to_device)
        wanted = session.settings.objective
        objective = None if wanted is None else ObjectiveTurn(wanted, federation.flat.parameters, optimizer)
        alternation = session.alternation()
        step = local_step(trainer, module, optimizer, takes_index, transfer, super().backward, objective, alternation)
        capture = LogCapture(LOG_ARGUMENTS)  # one a round: a round that broke off leaves nothing behind
        with captured_log(module, capture), noted_extra_outputs() as extra:
            local_loop = LocalLoop(optimizer, step, capture, session.start_of(optimizer), objective, alternation)
            clients = self.execution.client_trainer(trainer, module, federation, local_loop, takes_index, transfer)
            loss = federation.run_clients(round_, clients, self._client_observer(), self.measure_errors)
        # The processes agree on the values already; a sum over the ranks would count them again.
        capture.flush(module.log, **({"sync_dist": False} if self.world.size > 1 else {}))
        return {"loss": loss, **{name: LocalOutput(name) for name in extra}} if extra else loss

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Do nothing: the clients have gone backward already."""
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the client phase, which is the closure, then the server's step."""
        try:
            loss = closure()
            federation = self.session.require()
            check_round_ends(self._module(), federation.round_index, federation.in_round)
            self.last_report = federation.finish_round()
        except BaseException:
            self.session.roll_back()
            raise
        notes = federation.buffers.take_notes()
        if notes:
            warn_of_unaveraged(notes)
        return loss

    def _check_stepped(self) -> None:
        """Take back and refuse a round that the module's own ``optimizer_step`` has left without the server's step."""
        federation = self.session.require()
        if federation.in_round:
            index = federation.round_index
            self.session.roll_back()
            refuse_missing_step(self._module(), index)

    def _client_observer(self) -> Callable[[ClientReport, int, int], None]:
        """Return what is told each client's report, and how many clients are done of how many."""
        trainer, module = self._trainer(), self._module()
        callbacks = [c for c in trainer.callbacks if isinstance(c, FederatedCallback)]  # type: ignore[attr-defined]

        def observe(report: ClientReport, done: int, total: int) -> None:
            for callback in callbacks:
                callback.on_client_end(trainer, module, report)
                callback.on_client_progress(trainer, done, total)

        return observe

    @override
    def _in_step(self) -> bool:
        return super()._in_step() and not (self._federation is not None and self._federation.in_round)

    # The end of a fit

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.session.roll_back()
        if self.session.take_broken():
            resume_within_epoch(self._trainer())  # now, because the loops on the way here have reset it
        super().on_exception(exception)

    @override
    def on_validation_start(self) -> None:
        self.session.commit()
        super().on_validation_start()

    @override
    def on_train_end(self) -> None:
        self.session.end()
        super().on_train_end()

    @override
    def teardown(self) -> None:
        if self._undo_collecting is not None:
            self._undo_collecting()
            self._undo_collecting = None
        self.session.close()
        self.measure_errors = False
        super().teardown()

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings as plain values, for loggers."""
        return self.session.settings.describe(self.session.feed, self._federation, self.session.seed)

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _trainer(self) -> pl.Trainer:
        return self._module().trainer
