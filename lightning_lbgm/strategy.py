"""The strategy: Lightning's hooks, connected to the federation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_lbgm import _lightning
from lightning_lbgm.buffers import Buffers
from lightning_lbgm.callback import LBGMCallback
from lightning_lbgm.clients import LocalTrainer, LogCapture
from lightning_lbgm.data import (
    ClientFeed,
    IIDPartitioner,
    Partitioner,
    Round,
    RoundLoader,
    has_plain_sampler,
    make_partitions,
    plan_from_loader,
    resolve_cohort_size,
)
from lightning_lbgm.federation import Federation
from lightning_lbgm.flat import FlatParameters
from lightning_lbgm.ledger import Ledger, RoundReport
from lightning_lbgm.server import Server
from lightning_lbgm.uplink import LookBack, Stage, as_chain

__all__ = ["LBGMFederated"]

log = logging.getLogger(__name__)

_CHECKPOINT_KEY = "lightning_lbgm"
_LIGHTNING_LOG_EVERY_N_STEPS = 50


class LBGMFederated(SingleDeviceStrategy):
    """Train a LightningModule as a federation of many clients, simulated in this process.

    Your module, your DataModule and the rest of your ``Trainer`` stay as they are. One Lightning training batch is
    one communication round: ``max_epochs``, ``max_steps``, ``val_check_interval``, ``log_every_n_steps`` and learning
    rate schedules count rounds, ``configure_optimizers`` makes the clients' optimizer, and validation, test and
    checkpoints see the global model. A strategy object belongs to one ``Trainer``.

    ``log_every_n_steps`` is 1 here where the ``Trainer`` has Lightning's default of 50.

    Args:
        num_clients: K, clients that the training data is dealt to.
        partitioner: Deals the examples to the clients. None: ``IIDPartitioner()``.
        uplink: Stages that an update passes on its way to the server. None: ``[LookBack(threshold=0.2)]``; ``[]``:
            plain FedAvg; ``[TopK(0.1), LookBack(0.2)]``: stacked.
        clients_per_round: Size of a round's cohort. None: all; an int: a count; a float in (0, 1]: a share.
        local_epochs: Passes of a client over its examples in a round.
        local_steps: Optimizer steps of a client in a round (tau). At most one of the two; neither: one local epoch.
        server_optimizer: Called with the global parameters, returns a ``torch.optim.Optimizer`` that is stepped with
            the mean update as the gradient. None: ``SGD(lr=1.0)``, which is FedAvg.
        weighting: Client weights omega_k: ``"examples"``, n_k over the cohort's sum; or ``"uniform"``.
        buffers: What becomes of float buffers such as BatchNorm's: ``"average"`` (sent and averaged), ``"server"``
            (the server's stay as they are) or ``"client"`` (each client keeps its own; the global model's stay as they
            are, so do not judge a BatchNorm model by its validation then).
        rounds_per_epoch: Rounds in a Lightning epoch.
        seed: Seed of partition, cohorts, batch order and the clients' randomness. None: that of ``seed_everything``,
            else torch's.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or both ``local_epochs`` and ``local_steps`` are given.
        MisconfigurationException: At fit start, where the Trainer or the module asks for what a federation cannot do.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lbgm import LBGMFederated, LookBack, PathologicalPartitioner
        >>> strategy = LBGMFederated(
        ...     num_clients=100, partitioner=PathologicalPartitioner(3), uplink=[LookBack(threshold=0.2)]
        ... )
        >>> trainer = Trainer(strategy=strategy, max_epochs=100, accelerator="cpu", logger=False)
    """

    strategy_name = "lbgm_federated"

    # Filled by the Trainer because they exist.
    parallel_devices: list[torch.device] | None = None
    num_nodes = 1
    _layer_sync: Any = None

    def __init__(
        self,
        num_clients: int = 10,
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
    ) -> None:
        super().__init__()
        _check_positive("num_clients", num_clients)
        _check_positive("rounds_per_epoch", rounds_per_epoch)
        for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
            if value is not None:
                _check_positive(name, value)
        if local_epochs is not None and local_steps is not None:
            raise ValueError(
                f"`local_epochs={local_epochs}` and `local_steps={local_steps}` both say how long a client trains in a"
                " round: pass one of them."
            )
        if partitioner is not None and not isinstance(partitioner, Partitioner):
            raise TypeError(
                f"`partitioner` must be a `Partitioner` such as `PathologicalPartitioner(3)`; got {partitioner!r}."
            )
        if server_optimizer is not None and (isinstance(server_optimizer, Optimizer) or not callable(server_optimizer)):
            raise TypeError(
                "`server_optimizer` must be a callable that takes parameters and returns a `torch.optim.Optimizer`,"
                f" such as `lambda params: torch.optim.Adam(params, lr=0.01)`; got {server_optimizer!r}."
            )
        if weighting not in ("examples", "uniform"):
            raise ValueError(f"`weighting` must be 'examples' or 'uniform'; got {weighting!r}.")
        if buffers not in ("average", "server", "client"):
            raise ValueError(f"`buffers` must be 'average', 'server' or 'client'; got {buffers!r}.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"`seed` must be an int or None; got {seed!r}.")
        self.num_clients = num_clients
        self.partitioner = partitioner or IIDPartitioner()
        self.uplink = as_chain([LookBack(threshold=0.2)] if uplink is None else uplink)
        self.cohort_size = resolve_cohort_size(num_clients, clients_per_round)
        self.local_epochs = local_epochs or (1 if local_steps is None else None)
        self.local_steps = local_steps
        self.server_optimizer = server_optimizer
        self.weighting = weighting
        self.buffers = buffers
        self.rounds_per_epoch = rounds_per_epoch
        self.seed = seed
        self.last_report: RoundReport | None = None
        self._federation: Federation | None = None
        self._capture = LogCapture()
        self._restored: dict[str, Any] | None = None
        self._fit_trainer: pl.Trainer | None = None
        self._undo_patch: Callable[[], None] | None = None
        self._run_seed: int | None = None
        self._warned_of_rejection = False

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        fedavg: list[Stage] = []
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="Federated training with LBGM")
        if "fedavg" not in strategy_registry:
            strategy_registry.register("fedavg", cls, description="Federated averaging", uplink=fedavg)

    # What users and the callback read

    @property
    def round_index(self) -> int:
        """Rounds done, which is the index of the round to come."""
        if self._restored is not None:
            return int(self._restored["round_index"])
        return self._federation.round_index if self._federation is not None else 0

    @property
    def ledger(self) -> Ledger:
        """The account of bits sent so far."""
        return self._federation.ledger if self._federation is not None else Ledger()

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings as plain values, for loggers."""
        resolved: dict[str, Any] = {
            "num_clients": self.num_clients,
            "partitioner": repr(self.partitioner),
            "uplink": repr(self.uplink),
            "clients_per_round": self.cohort_size,
            "local_epochs": self.local_epochs,
            "local_steps": self.local_steps,
            "server_optimizer": _describe(self.server_optimizer) if self.server_optimizer else "SGD(lr=1.0)",
            "weighting": self.weighting,
            "buffers": self.buffers,
            "rounds_per_epoch": self.rounds_per_epoch,
            "seed": self._resolve_seed(),
        }
        if self._federation is not None:
            resolved["num_parameters"] = self._federation.flat.num_parameters
        return resolved

    # Device and environment

    @property
    @override
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    @override
    def setup_environment(self) -> None:
        trainer = self._trainer()
        num_devices = len(self.parallel_devices or [])
        if num_devices > 1 and not _lightning.devices_are_automatic(trainer):
            raise MisconfigurationException(
                f"`Trainer(devices={num_devices}, strategy=LBGMFederated(...))` is not supported yet: all clients are"
                " simulated on one device. Use `devices=1`."
            )
        if num_devices > 1:
            rank_zero_warn(f"LBGMFederated simulates on one device: {self.root_device} of {num_devices} is used.")
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"`Trainer(num_nodes={self.num_nodes}, strategy=LBGMFederated(...))` is not supported yet: use"
                " `num_nodes=1`."
            )
        if self._layer_sync is not None:
            raise MisconfigurationException(
                "`Trainer(sync_batchnorm=True)` has no meaning for federated clients, which train apart. Remove it, and"
                " choose what becomes of BatchNorm's statistics with `LBGMFederated(buffers=...)`."
            )
        super().setup_environment()

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        callbacks: list[pl.Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, LBGMCallback) for callback in callbacks):
            callbacks.insert(0, LBGMCallback())

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_fit(trainer)
            if trainer.log_every_n_steps == _LIGHTNING_LOG_EVERY_N_STEPS:  # type: ignore[attr-defined]
                trainer.log_every_n_steps = 1  # type: ignore[attr-defined]
            self._run_seed = self._resolve_seed()
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._undo_patch is None:
            self._undo_patch = _lightning.pass_rounds_through(self._module())

    def _check_fit(self, trainer: pl.Trainer) -> None:
        module = self._module()
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"`{type(module).__name__}.training_step(dataloader_iter)` cannot be federated: the clients' batches"
                " are drawn for it. Use `training_step(batch, batch_idx)`."
            )
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"`{type(module).__name__}.automatic_optimization = False` cannot be federated: LBGMFederated runs the"
                " clients' optimizer steps itself. Use automatic optimization."
            )
        scheduled = any(
            isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        )
        if trainer.accumulate_grad_batches != 1 or scheduled:
            setting = (
                "`GradientAccumulationScheduler`"
                if scheduled
                else f"`Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})`"
            )
            raise MisconfigurationException(
                f"{setting} would skip rounds, for a batch is a round here. Use 1 (or drop the callback), and a larger"
                " batch size in the DataLoader for larger local steps."
            )

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
        )
        restored, self._restored = self._restored, None
        if restored is not None:
            expected = {
                "num_clients": self.num_clients,
                "partitioner": repr(self.partitioner),
                "uplink": repr(self.uplink),
                "server_optimizer": type(federation.server.optimizer).__name__,
                "seed": federation.seed,
                "num_parameters": flat.num_parameters,
            }
            for name, value in expected.items():
                if restored[name] != value:
                    raise MisconfigurationException(
                        f"The checkpoint's federation has `{name}={restored[name]}`, this one `{name}={value}`: what"
                        " its clients keep does not fit. Resume with the same settings, or start anew from its weights"
                        " with `load_from_checkpoint`."
                    )
            federation.load_state_dict(restored)
        return federation

    # Data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Turn the training DataLoader into a loader of rounds; others pass."""
        if not self._trainer().training:
            return dataloader
        if not isinstance(dataloader, DataLoader):
            raise _needs_one_loader(f"an object of type {type(dataloader).__name__}")
        if isinstance(dataloader.dataset, IterableDataset):
            raise MisconfigurationException(
                f"The training dataset {type(dataloader.dataset).__name__} is an `IterableDataset`: its examples cannot"
                " be dealt to clients. Use a map-style dataset, or one for each client in a `ConcatDataset` with"
                " `partitioner=NaturalPartitioner()`."
            )
        if not has_plain_sampler(dataloader):
            rank_zero_warn(
                f"The training DataLoader's {type(dataloader.sampler).__name__} is replaced: each client shuffles its"
                " own examples."
            )
        plan = plan_from_loader(dataloader, self.local_epochs, self.local_steps)
        partitions = make_partitions(dataloader.dataset, self.num_clients, self.partitioner, self._resolve_seed())
        feed = ClientFeed(dataloader, plan, partitions, self._resolve_seed())
        return RoundLoader(feed, self.cohort_size, self.rounds_per_epoch, lambda: self.round_index)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        # A round's local batches are moved as they are drawn.
        if isinstance(batch, Round):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    # A round

    @override
    def on_train_start(self) -> None:
        # The last hook before the first round: callbacks have frozen what they freeze, the trainer's state is restored.
        trainer, module = self._trainer(), self._module()
        if not isinstance(trainer.train_dataloader, RoundLoader):
            raise _needs_one_loader(f"a {type(trainer.train_dataloader).__name__} of loaders")
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
        self._warned_of_rejection = False
        if self.buffers == "client" and self._federation.buffers.names:
            rank_zero_warn(
                "`LBGMFederated(buffers='client')`: each client keeps its own buffers (such as"
                f" {self._federation.buffers.names[0]!r}) and the global model's are never trained, so its validation"
                " in eval mode says little."
            )
        settings = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        rank_zero_info(f"Federated training: {settings}")

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        _lightning.set_round_size(self._trainer(), sum(batch.num_examples))

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the client phase of a round and return the cohort's mean loss, detached."""
        round_, takes_index = args[0], len(args) > 1
        module, trainer = self._module(), self._trainer()
        federation = self._current_federation()
        optimizer = self.optimizers[0]
        transfer = _lightning.batch_transfer(trainer, module, super().batch_to_device)
        step = _lightning.local_step(trainer, module, optimizer, takes_index, transfer, super().backward)
        with _lightning.captured_log(module, self._capture):
            local_trainer = LocalTrainer(optimizer, step, self._capture)
            loss = federation.run_clients(round_, local_trainer, self._on_client_end)
        self._capture.flush(module.log)
        return loss

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Do nothing: the clients have gone backward already."""
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the client phase, which is the closure, then the server's step."""
        loss = closure()
        report = self._require_federation().finish_round()
        self.last_report = report
        if report.num_rejected and not self._warned_of_rejection:
            self._warned_of_rejection = True
            rejected = [client.client_id for client in report.clients if client.rejected]
            rank_zero_warn(
                f"Round {report.round_index}: the update of client {rejected[0]}"
                + (f" and {len(rejected) - 1} more" if len(rejected) > 1 else "")
                + " is not finite and was left out. `fl/rejected_clients` counts them from now on. A smaller client"
                " learning rate or `gradient_clip_val` usually helps."
            )
        return loss

    def _current_federation(self) -> Federation:
        """Return the federation, made anew where a callback has frozen or unfrozen parameters."""
        federation = self._require_federation()
        module = self._module()
        if not federation.flat.is_current(module):
            fresh = self._make_federation()
            if federation.round_index:
                rank_zero_warn(
                    f"The trainable parameters changed before round {federation.round_index}, from"
                    f" {federation.flat.num_parameters} to {fresh.flat.num_parameters}: look-back gradients and"
                    " residuals are dropped, and the server optimizer starts afresh."
                )
            fresh.round_index, fresh.ledger, fresh.seed = federation.round_index, federation.ledger, federation.seed
            self._federation = federation = fresh
        return federation

    def _on_client_end(self, done: int, total: int) -> None:
        trainer = self._trainer()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LBGMCallback):
                callback.on_client_end(trainer, done, total)

    # Checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the global model, also where a client is being trained."""
        if self._federation is None:
            return super().lightning_module_state_dict()
        with self._federation.global_model():
            return {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in super().lightning_module_state_dict().items()
            }

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # A weights-only checkpoint has no optimizer states, and gets no federation's state either.
        if self._federation is not None and "optimizer_states" in checkpoint:
            state = {
                "num_clients": self.num_clients,
                "partitioner": repr(self.partitioner),
                **self._federation.state_dict(),
            }
            checkpoint = {**checkpoint, _CHECKPOINT_KEY: state}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self._trainer().state.fn == TrainerFn.FITTING:
            # Kept until `setup`, when the optimizers exist.
            self._restored = checkpoint.get(_CHECKPOINT_KEY)
        return checkpoint

    @override
    def teardown(self) -> None:
        if self._undo_patch is not None:
            self._undo_patch()
            self._undo_patch = None
        self._restored = None
        self._run_seed = None
        super().teardown()

    def _resolve_seed(self) -> int:
        if self._run_seed is not None:
            return self._run_seed
        if self.seed is not None:
            return self.seed
        if self._restored is not None:
            return int(self._restored["seed"])
        if self._federation is not None:
            return self._federation.seed
        return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % 2**32)

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _trainer(self) -> pl.Trainer:
        return self._module().trainer

    def _require_federation(self) -> Federation:
        assert self._federation is not None
        return self._federation


def _needs_one_loader(found: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"LBGMFederated needs one training `DataLoader`, whose dataset it deals to the clients; got {found}. If each"
        " client has a dataset of its own, use `DataLoader(ConcatDataset(datasets), ...)` with"
        " `partitioner=NaturalPartitioner()`."
    )


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")


def _describe(factory: Callable[..., Any]) -> str:
    """Name a callable without its memory address."""
    function, settings = getattr(factory, "func", factory), getattr(factory, "keywords", {})
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


LBGMFederated.register_strategies(StrategyRegistry)
