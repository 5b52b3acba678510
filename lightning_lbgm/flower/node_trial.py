"""Node's trial: the global model on the node's own validation data, by Lightning's ``Trainer.validate``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_lbgm._compat.lightning import is_overridden_by
from lightning_lbgm._compat.loop_progress import start_at
from lightning_lbgm.clients.personal import PersonalParameters
from lightning_lbgm.compression.chain import Chain
from lightning_lbgm.compression.context import Context
from lightning_lbgm.core.flat import FlatParameters
from lightning_lbgm.core.rng import derive_seed, isolated_rng, seed_global_rng
from lightning_lbgm.data.client_loaders import batch_size_of
from lightning_lbgm.flower.agreement import agreement, digest, float_tensors
from lightning_lbgm.flower.engine import make_trainer, without_notes
from lightning_lbgm.flower.node_session import NodeMemory, Unable, put
from lightning_lbgm.flower.records import Score, Trial
from lightning_lbgm.protocol.broadcast import as_downlink
from lightning_lbgm.protocol.downlink_client import DownlinkClient
from lightning_lbgm.protocol.message import MessageError
from lightning_lbgm.server.buffers import Buffers
from lightning_lbgm.server.server import Server
from lightning_lbgm.simulation.client_models import client_model
from lightning_lbgm.simulation.world import to_device
from lightning_lbgm.strategy.settings import Settings

__all__ = ["rate"]


def rate(
    settings: Settings,
    downlink: Chain,
    memory: NodeMemory,
    trainer: dict[str, Any],
    module: pl.LightningModule,
    data: Any,
    trial: Trial,
) -> Score:
    """Evaluate the global model on a node's validation data, and leave everything as it was.

    Args:
        settings: The client's.
        downlink: The stages of the downlink, for the agreement alone.
        memory: What the node keeps: of it, what is the client's own is put into the model.
        trainer: Arguments of Lightning's Trainer.
        module: The module.
        data: The datamodule.
        trial: What the server asks.

    Raises:
        Unable: If there is nothing to evaluate on, or the model does not fit.
    """
    for hook, owner in (("validation_step", module), ("val_dataloader", data)):
        if not is_overridden_by(hook, owner):
            raise Unable(f"This node has no validation: `{type(owner).__name__}` has no `{hook}`.", lasting=True)
    trying = _Trying(lambda model: _tried(settings, downlink, memory, model, trial))
    with without_notes():
        # Without inference mode, because the module is trained again, and its tensors are written to here.
        lightning = make_trainer({**trainer, "inference_mode": False}, {}, last=[trying])
        start_at(lightning, trial.round_index + 1, trial.round_index // trial.rounds_per_epoch)
        device = lightning.strategy.root_device
        with isolated_rng(device):
            # What is drawn meanwhile is a function of seed, round and client.
            seed_global_rng(derive_seed(trial.seed, "evaluation", trial.round_index + 1, trial.client_id), device)
            found = lightning.validate(module, datamodule=data, verbose=False)
    if not trying.num_examples:
        raise Unable("This node has no validation data.", lasting=True)
    metrics = {name: float(value) for one in found for name, value in one.items()}
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise Unable(f"The metrics {wrong} are not finite on this node's validation data.")
    return Score(trial.round_index, trial.client_id, trying.num_examples, list(metrics), list(metrics.values()))


class _Trying(pl.Callback):
    """Puts a model into the module while it is validated, and counts examples.

    Args:
        model: Returns what puts it in for a while, when the module is on its device and has all its parts.

    Attributes:
        num_examples: Seen so far.
    """

    def __init__(self, model: Any) -> None:
        self.num_examples = 0
        self._model = model
        self._open = ExitStack()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open.enter_context(self._model(pl_module))

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.num_examples += batch_size_of(batch)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()

    @override
    def on_exception(self, *args: Any) -> None:
        self.close()  # while the module is still on its device

    def close(self) -> None:
        """Give the module back as it was."""
        self._open.close()


class _Models:
    """What ``client_model`` asks of a federation: that of one client, of which the server's half is elsewhere."""

    server = cast(Server, None)  # is not asked for, because nothing is being trained
    in_round = False

    def __init__(self, flat: FlatParameters, buffers: Buffers, own: Mapping[str, Tensor]) -> None:
        self.flat, self.buffers = flat, buffers
        self._own = dict(own)

    def own_values(self, client_id: int) -> dict[str, Tensor] | None:
        """Return what the client keeps for itself."""
        return self._own or None


@contextmanager
def _tried(
    settings: Settings, downlink: Chain, memory: NodeMemory, module: pl.LightningModule, trial: Trial
) -> Iterator[None]:
    """Put the global model as the client uses it into the module for a while."""
    try:
        personal = None if settings.personal is None else PersonalParameters(settings.personal, module)
        flat = FlatParameters(module, None if personal is None else personal.includes)
    except ValueError as error:
        raise Unable(f"`{type(module).__name__}` cannot take the model. {error}", lasting=True) from error
    if digest(agreement(settings, downlink, flat.layout)) != trial.settings:
        raise Unable(
            "The settings, or the parameters that are trained, differ from those at the server. They must be known"
            " without training here: freeze parameters in the module, not in a callback.",
            lasting=True,
        )
    end = DownlinkClient(as_downlink([]), flat.layout, float_tensors(module))
    try:
        end.receive(trial.model, Context(trial.round_index, {}, trial.seed))
    except MessageError as error:
        raise Unable(f"The model cannot be read. {error}") from error
    if end.held is None:
        raise Unable("The server sent no whole model.")
    buffers = Buffers(module, settings.buffers, personal)
    kept = memory.get("client", {}) if memory.get("federation") == trial.federation else {}
    own = buffers.own.of(to_device(kept, flat.device)) or {}
    with client_model(_Models(flat, buffers, own), trial.client_id):
        flat.write(end.held.to(flat.device, flat.dtype))
        put(module, end.buffers)
        yield
