"""The strategy: Lightning's hooks, connected to the federation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
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
from lightning_lbgm.callbacks.communication import LBGMCallback
from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.clients.objective_turn import ObjectiveTurn
from lightning_lbgm.clients.objectives import LocalObjective
from lightning_lbgm.clients.optimizer_start import OptimizerStart
from lightning_lbgm.compression.chain import as_chain
from lightning_lbgm.compression.methods.lookback import LookBack
from lightning_lbgm.compression.stage import Stage
from lightning_lbgm.core.describe import describe, describe_callable, describe_optimizer
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.data.cohort import resolve_cohort_size
from lightning_lbgm.data.collection import TrainLoaders
from lightning_lbgm.data.feed import Feed
from lightning_lbgm.data.partitioners import IIDPartitioner, Partitioner
from lightning_lbgm.data.rounds import Round, RoundLoader
from lightning_lbgm.reports.ledger import Ledger
from lightning_lbgm.reports.reports import RoundReport
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.server import Server
from lightning_lbgm.simulation import checkpoint as snapshot
from lightning_lbgm.simulation.client_store import checkpoint_folder, in_memory, locate, prune, remove_clients
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.batch_hooks import watch_batch_hooks
from lightning_lbgm.strategy.checks import (
    check_finders,
    check_fit,
    check_limits,
    warn_of_changed_parameters,
    warn_of_own_buffers,
    warn_of_unaveraged,
)
from lightning_lbgm.strategy.data_checks import check_same_data
from lightning_lbgm.strategy.execution import Execution, ExecutionMode
from lightning_lbgm.strategy.feed import FeedSettings
from lightning_lbgm.strategy.lazy import has_lazy_parameters, initialize_lazy
from lightning_lbgm.strategy.local_counts import LocalCount, count_local_batches
from lightning_lbgm.strategy.local_outputs import LocalOutput, noted_extra_outputs
from lightning_lbgm.strategy.local_step import local_step
from lightning_lbgm.strategy.log_capture import LogCapture, captured_log
from lightning_lbgm.strategy.processes import ProcessesStrategy
from lightning_lbgm.strategy.resuming import identify_run, resume
from lightning_lbgm.strategy.round_checks import check_round_begins, check_round_ends, refuse_missing_step
from lightning_lbgm.strategy.schedules import is_zero_rate, warn_of_long_schedules, warn_of_zero_rate
from lightning_lbgm.strategy.settings import check_settings, describe_changes, with_hints
from lightning_lbgm.strategy.transaction import RoundTransaction

__all__ = ["LBGMFederated"]

_CHECKPOINT_KEY = "lightning_lbgm"
_LIGHTNING_LOG_EVERY_N_STEPS = 50


class LBGMFederated(ProcessesStrategy):
    """Train a LightningModule as a federation of many clients, simulated on one device or dealt to several.

    Your module, your DataModule and the rest of your ``Trainer`` stay as they are. One Lightning training batch is
    one communication round: ``max_epochs``, ``max_steps``, ``val_check_interval``, ``log_every_n_steps`` and learning
    rate schedules count rounds, ``configure_optimizers`` makes the clients' optimizer, and validation, test and
    checkpoints see the global model. A strategy object belongs to one ``Trainer``.

    ``log_every_n_steps`` is 1 here where the ``Trainer`` has Lightning's default of 50.

    Args:
        num_clients: K, clients that the training data is dealt to. None: each loader of the list or dict given to
            ``fit`` (or returned by ``train_dataloader``) is a client, and its batches are taken as they come.
        partitioner: Deals the examples to the clients. None: ``IIDPartitioner()``. Not with ``num_clients=None``.
        uplink: Stages that an update passes on its way to the server. None: ``[LookBack(threshold=0.2)]``; ``[]``:
            plain FedAvg; ``[TopK(0.1), LookBack(0.2)]``: stacked.
        clients_per_round: Size of a round's cohort. None: all; an int: a count; a float in (0, 1]: a share.
        local_epochs: Passes of a client over its examples in a round.
        local_steps: Optimizer steps of a client in a round (tau). At most one of the two; neither: one local epoch.
        server_optimizer: Called with the global parameters, returns a ``torch.optim.Optimizer`` that is stepped with
            the mean update as the gradient. None: ``SGD(lr=1.0)``, which is FedAvg.
        weighting: Client weights omega_k: ``"examples"``, n_k over the cohort's sum; or ``"uniform"``.
        buffers: What becomes of all that training changes besides the trainable parameters: BatchNorm's statistics,
            other buffers, frozen parameters that the step moves (a momentum encoder). ``"average"``: float ones are
            sent and averaged, others stay the server's; ``"server"``: the server's stay as they are; ``"client"``:
            each client keeps its own, of every kind, and the global model's stay as they are, so do not judge a
            BatchNorm model by its validation then.
        rounds_per_epoch: Rounds in a Lightning epoch.
        seed: Seed of partition, cohorts, batch order and the clients' randomness. None: that of ``seed_everything``,
            else torch's.
        execution: How clients are simulated: ``"sequential"``, one after the other; ``"vectorized"``, in chunks that
            take their local steps at once, which must be possible; ``"auto"``, vectorised if that is likely to be
            faster (small modules without convolutions or dropout on a CPU, all on a GPU) and was seen to come to the
            same: some clients are trained alone too and compared.
        vectorized_chunk: Most clients in a chunk. None: 20 on a CPU, as many as 4 GiB of parameters allow on a GPU.
        objective: What clients minimise besides the module's loss, such as ``FedProx(mu=0.1)``. None: nothing.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or both ``local_epochs`` and ``local_steps`` are given.
        MisconfigurationException: At fit start, where the Trainer or the module asks for what a federation cannot do.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import LBGMFederated, LookBack, PathologicalPartitioner
        >>> strategy = LBGMFederated(
        ...     num_clients=100, partitioner=PathologicalPartitioner(3), uplink=[LookBack(threshold=0.2)]
        ... )
        >>> trainer = Trainer(strategy=strategy, max_epochs=100, accelerator="cpu", logger=False)
    """

    strategy_name = "lbgm_federated"

    @with_hints
    def __init__(
        self,
        num_clients: int | None = 10,
        partitioner: Partitioner | None = None,
        uplink: list[Stage] | Stage | None = None,
        clients_per_round: int | float | None = None,
        local_epochs: int | None = None,
        local_steps: int | None = None,
        server_optimizer: Callable[[Iterable[Parameter]], Optimizer] | None = None,
        weighting: Literal["examples", "uniform"] = "examples",
        buffers: Literal["average", "server", "client"] = "average",
        rounds_per_epoch: int = 1,
        seed: int | None = None,
        execution: ExecutionMode = "auto",
        vectorized_chunk: int | None = None,
        objective: LocalObjective | None = None,
    ) -> None:
        super().__init__()
        check_settings(
            num_clients=num_clients,
            partitioner=partitioner,
            local_epochs=local_epochs,
            local_steps=local_steps,
            server_optimizer=server_optimizer,
            weighting=weighting,
            buffers=buffers,
            rounds_per_epoch=rounds_per_epoch,
            seed=seed,
            execution=execution,
            vectorized_chunk=vectorized_chunk,
            objective=objective,
        )
        self.num_clients = num_clients
        self.partitioner = partitioner or IIDPartitioner()
        self.uplink = as_chain([LookBack(threshold=0.2)] if uplink is None else uplink)
        self.client_names: tuple[str, ...] | None = None  # where each has a loader of its own
        self.cohort_size = resolve_cohort_size(num_clients, clients_per_round)
        self._clients_per_round = clients_per_round
        self.local_epochs = local_epochs or (1 if local_steps is None else None)
        self.local_steps = local_steps
        self._feed_settings = FeedSettings(num_clients, partitioner, self.local_epochs, local_steps)
        self.server_optimizer = server_optimizer
        self.weighting = weighting
        self.buffers = buffers
        self.rounds_per_epoch = rounds_per_epoch
        self.seed = seed
        self.execution = Execution(execution, vectorized_chunk)
        self.objective = objective
        self.last_report: RoundReport | None = None
        self.measure_errors = False  # set by a callback's `setup`, for the fit that it belongs to
        self._federation: Federation | None = None
        self._restored: dict[str, Any] | None = None  # until the first round: a finished run that is resumed has none
        self._identity: dict[str, Any] = {}  # what a checkpoint must agree with
        self._fit_trainer: pl.Trainer | None = None
        self._undo_patches: list[Callable[[], None]] = []
        self._undo_collecting: Callable[[], None] | None = None
        self._end_trial: Callable[[], None] | None = None
        self._local_counts: list[LocalCount] = []  # what callbacks ask of each local batch
        self._warned_of_zero_rate = False
        self._run_seed: int | None = None
        self._transaction: RoundTransaction | None = None
        self._broke_off = False  # whether a round was taken back whose error is still on its way
        self._optimizer_start: tuple[Optimizer, OptimizerStart] | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        fedavg: list[Stage] = []
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="Federated training with LBGM")
        if "fedavg" not in strategy_registry:
            strategy_registry.register("fedavg", cls, description="Federated averaging", uplink=fedavg)

    @property
    def round_index(self) -> int:
        """Rounds done, which is the index of the round to come."""
        if self._restored is not None:
            return int(self._restored["round_index"])
        return self._federation.round_index if self._federation is not None else 0

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""
        if self._restored is not None:
            return Ledger(**self._restored["ledger"])
        return self._federation.ledger if self._federation is not None else Ledger()

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings as plain values, for loggers."""
        resolved: dict[str, Any] = {
            "num_clients": self.num_clients,
            "partitioner": str(self.split),
            "uplink": repr(self.uplink),
            "clients_per_round": self.cohort_size,
            "local_epochs": self.local_epochs,
            "local_steps": self.local_steps,
            "server_optimizer": self._describe_server_optimizer(),
            "weighting": self.weighting,
            "buffers": self.buffers,
            "rounds_per_epoch": self.rounds_per_epoch,
            "seed": self._resolve_seed(),
            "execution": self.execution.mode,
            "vectorized_chunk": self.execution.chunk_size,
        }
        if self.objective is not None:
            resolved["objective"] = describe(self.objective)
        if self._federation is not None:
            resolved["num_parameters"] = self._federation.flat.num_parameters
        return resolved

    @property
    def split(self) -> Partitioner | str:
        """What deals the examples to the clients: the partitioner, or in words that each has a loader of its own."""
        each_loader = self._feed_settings.num_clients is None or self.client_names is not None
        return "a loader for each client" if each_loader else self.partitioner

    def _describe_server_optimizer(self) -> str:
        if self._federation is not None:
            return describe_optimizer(self._federation.server.optimizer)
        return describe_callable(self.server_optimizer) if self.server_optimizer else "SGD(lr=1.0)"

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
        if trainer.state.fn == TrainerFn.FITTING:
            check_fit(trainer, self._module())
            check_limits(trainer, self.rounds_per_epoch)
            check_finders(trainer)
            if trainer.log_every_n_steps == _LIGHTNING_LOG_EVERY_N_STEPS:  # type: ignore[attr-defined]
                trainer.log_every_n_steps = 1  # type: ignore[attr-defined]
            self._run_seed = self.world.broadcast(self._resolve_seed())
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            if self.optimizers:  # new now: a checkpoint's state comes later
                self._start_of(self.optimizers[0])
            if not self._undo_patches:
                self._local_counts, undo_counts = count_local_batches(trainer.callbacks)  # type: ignore[attr-defined]
                self._undo_patches = [
                    undo_counts,
                    pass_rounds_through(self._module()),
                    watch_optimizer_step(self._module(), self._check_stepped),
                    watch_batch_hooks(trainer, self._module()),
                ]

    def _make_federation(self) -> Federation:
        module = self._module()
        try:
            flat = FlatParameters(module)
        except ValueError as error:
            raise MisconfigurationException(f"`{type(module).__name__}` cannot be federated. {error}") from error
        federation = Federation(
            flat,
            self.uplink,
            Server(flat, self.server_optimizer),
            Buffers(module, self.buffers),
            self.weighting,
            self._resolve_seed(),
            self.world,
        )
        feed = self._round_loader().feed
        self._identity = identify_run(self, federation, feed)
        restored, self._restored = self._restored, None
        if restored is not None:
            resume(self, federation, feed, restored)
        return federation

    # Data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Turn the training DataLoader into a loader of rounds; each process gets its share of others."""
        if not isinstance(dataloader, TrainLoaders):
            return super().process_dataloader(dataloader)
        in_use = self.num_clients if self._trainer().global_step > 0 else None
        feed, loader = self._feed_settings.make_feed(dataloader, self._resolve_seed(), self.world_size, in_use)
        self.num_clients, self.client_names = feed.num_clients, feed.client_names
        self.cohort_size = resolve_cohort_size(self.num_clients, self._clients_per_round)
        assert self.cohort_size is not None
        return RoundLoader(
            feed,
            self.cohort_size,
            self.rounds_per_epoch,
            next_round=lambda: self.round_index,
            prepare=lambda: feed.prepare(self.world),
            loader=loader,
            collection=dataloader.source if dataloader.is_collection else None,
        )

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        # A round's local batches are moved as they are drawn.
        if isinstance(batch, Round):
            self._begin_round()
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    # A round

    @override
    def on_train_start(self) -> None:
        # The last hook before the first round: callbacks have frozen what they freeze, the trainer's state is restored.
        trainer, module = self._trainer(), self._module()
        loop_progress.start_next_epoch(trainer)
        know_round_sizes(trainer)
        feed = self._round_loader().feed
        feed.prepare(self.world)
        if has_lazy_parameters(module):
            self._initialize_lazy(feed)
        if self.world.size > 1:
            check_same_data(self.world.gather(feed.fingerprint(), "the partition"))
        continues = self._fit_trainer is trainer and trainer.global_step > 0 and self._restored is None
        if self._federation is None or not continues or not self._federation.flat.is_current(module):
            self._federation = self._make_federation()
        if self._federation.round_index == 0 and trainer.global_step > 0:
            rank_zero_warn(
                "The checkpoint has no federation's state: clients start without look-back gradients and the account of"
                " bytes starts at zero."
            )
            self._federation.round_index = trainer.global_step
        self._fit_trainer = trainer
        if self.buffers == "client":
            warn_of_own_buffers(self._federation.buffers.names)
        self._end_trial = extend_learning_rate_trial(trainer)
        rank_zero_info(f"Federated training: {describe_changes(self.settings())}.")
        warn_of_long_schedules(trainer)
        self._warned_of_zero_rate = False

    def _begin_round(self) -> None:
        """Make the round before final; from here on what happens can be taken back."""
        if self._federation is not None:
            self._federation.commit()
        self._transaction = RoundTransaction(self._trainer(), self._module())

    def roll_back(self) -> None:
        """Leave module, clients, ledger and loop counters as they were before the round that broke off, if one did."""
        transaction, self._transaction = self._transaction, None
        if transaction is None or not transaction.is_open:
            return
        self._broke_off = True
        lost = self._federation.roll_back() if self._federation is not None else 0
        transaction.undo()
        if lost:
            rank_zero_warn(
                f"The round that broke off was taken back. What {lost} of its clients had kept was too large to be held"
                " twice: their next updates go in full."
            )

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for count in self._local_counts:
            count.begin_round()
        batch.observers = tuple(count.observe for count in self._local_counts)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the client phase of a round and return the cohort's mean loss, detached."""
        round_, takes_index = args[0], len(args) > 1
        module, trainer = self._module(), self._trainer()
        federation = self._current_federation()
        check_round_begins(module, round_.index, federation.round_index, federation.in_round)
        optimizer = self.optimizers[0]
        if is_zero_rate(optimizer) and not self._warned_of_zero_rate:
            self._warned_of_zero_rate = True
            warn_of_zero_rate(round_.index)
        transfer = batch_transfer(trainer, module, super().batch_to_device)
        objective = None if self.objective is None else ObjectiveTurn(self.objective, federation.flat.parameters)
        step = local_step(trainer, module, optimizer, takes_index, transfer, super().backward, objective)
        capture = LogCapture(LOG_ARGUMENTS)  # one a round: a round that broke off leaves nothing behind
        with captured_log(module, capture), noted_extra_outputs() as extra:
            local_loop = LocalLoop(optimizer, step, capture, self._start_of(optimizer), objective)
            clients = self.execution.client_trainer(trainer, module, federation, local_loop, takes_index, transfer)
            loss = federation.run_clients(round_, clients, self._on_client_end, self.measure_errors)
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
            federation = self._require_federation()
            check_round_ends(self._module(), federation.round_index, federation.in_round)
            self.last_report = federation.finish_round()
        except BaseException:
            self.roll_back()
            raise
        self._warn_of_unaveraged()
        return loss

    def _check_stepped(self) -> None:
        """Take back and refuse a round that the module's own ``optimizer_step`` has left without the server's step."""
        federation = self._require_federation()
        if federation.in_round:
            index = federation.round_index
            self.roll_back()
            refuse_missing_step(self._module(), index)

    def _warn_of_unaveraged(self) -> None:
        notes = self._require_federation().buffers.take_notes()
        if notes:
            warn_of_unaveraged(notes)

    def _start_of(self, optimizer: Optimizer) -> OptimizerStart:
        """Return the state that the optimizer was made with."""
        if self._optimizer_start is None or self._optimizer_start[0] is not optimizer:
            self._optimizer_start = optimizer, OptimizerStart(optimizer)
        return self._optimizer_start[1]

    def _current_federation(self) -> Federation:
        """Return the federation, made anew where a callback has frozen or unfrozen parameters."""
        federation = self._require_federation()
        module = self._module()
        if not federation.flat.is_current(module):
            fresh = self._make_federation()
            if federation.round_index:
                sizes = federation.flat.num_parameters, fresh.flat.num_parameters
                warn_of_changed_parameters(federation.round_index, *sizes)
            fresh.round_index, fresh.ledger, fresh.seed = federation.round_index, federation.ledger, federation.seed
            self._federation = federation = fresh
        return federation

    def _initialize_lazy(self, feed: Feed) -> None:
        trainer, module = self._trainer(), self._module()
        transfer = batch_transfer(trainer, module, super().batch_to_device)
        with captured_log(module, LogCapture(LOG_ARGUMENTS)):
            initialize_lazy(module, feed, self._resolve_seed(), self.root_device, transfer)

    def _round_loader(self) -> RoundLoader:
        loader = self._trainer().train_dataloader
        assert isinstance(loader, RoundLoader)
        return loader

    @override
    def _in_step(self) -> bool:
        return super()._in_step() and not (self._federation is not None and self._federation.in_round)

    def _on_client_end(self, done: int, total: int) -> None:
        trainer = self._trainer()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LBGMCallback):
                callback.on_client_end(trainer, done, total)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.roll_back()
        if self._broke_off:
            self._broke_off = False
            resume_within_epoch(self._trainer())  # now, for the loops on the way here have reset it
        super().on_exception(exception)

    @override
    def on_validation_start(self) -> None:
        if self._federation is not None:
            self._federation.commit()
        super().on_validation_start()

    @override
    def on_train_end(self) -> None:
        if self._federation is not None:
            self._federation.commit()
        if self._end_trial is not None:
            self._end_trial()
            self._end_trial = None
        super().on_train_end()

    # Checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the global model, also where a client is being trained."""
        if self._federation is None:
            return super().lightning_module_state_dict()
        with self._federation.global_model():
            state = super().lightning_module_state_dict()
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # A weights-only checkpoint has no optimizer states, and gets no federation's state either.
        if "optimizer_states" in checkpoint and self._restored is not None:
            # A resumed run that has not begun, as a tuner's trial finds it.
            checkpoint = {**checkpoint, _CHECKPOINT_KEY: in_memory(self._restored)}
        elif "optimizer_states" in checkpoint and self._federation is not None:
            state = {"identity": self._identity, **self._federation.state_dict(checkpoint_folder(filepath))}
            checkpoint = {**checkpoint, _CHECKPOINT_KEY: state}
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if _CHECKPOINT_KEY in checkpoint and self.is_global_zero:  # who alone knows of all clients
            prune(checkpoint[_CHECKPOINT_KEY])

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            remove_clients(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self._trainer().state.fn == TrainerFn.FITTING:
            # Kept until `on_train_start`, when the federation is made. The one there was ends here, because the trainer
            # may be going back to where it was before a tuner's trial.
            self.on_train_end()
            self._federation = None
            self._restored = checkpoint.get(_CHECKPOINT_KEY)
            if self._restored is not None:
                snapshot.check(self._restored, checkpoint_path)
                locate(self._restored, checkpoint_path)
                checkpoint = loop_progress.between_rounds(checkpoint)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._restored is not None and self._undo_patches:
            # The fit has begun, so that a tuner goes back to where it was before its trial: its checkpoint is deleted
            # after this, and `on_train_start` may not come again.
            self._federation = self._make_federation()

    @override
    def teardown(self) -> None:
        if self._undo_collecting is not None:
            self._undo_collecting()
            self._undo_collecting = None
        for undo in self._undo_patches:
            undo()
        self._undo_patches = []
        self._run_seed = None
        self._transaction = None
        self.measure_errors = False
        super().teardown()

    def _resolve_seed(self) -> int:
        restored = None if self._restored is None else int(self._restored["seed"])
        federated = None if self._federation is None else self._federation.seed
        for seed in (self._run_seed, self.seed, restored, federated):
            if seed is not None:
                return seed
        return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % 2**32)

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _trainer(self) -> pl.Trainer:
        return self._module().trainer

    def _require_federation(self) -> Federation:
        assert self._federation is not None
        return self._federation


LBGMFederated.register_strategies(StrategyRegistry)
