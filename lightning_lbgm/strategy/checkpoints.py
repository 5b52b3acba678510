"""Checkpoints of a federated strategy: the global model, and the federation's state beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_lbgm._compat import loop_progress
from lightning_lbgm.simulation import checkpoint as checkpoints
from lightning_lbgm.simulation.client_store import checkpoint_folder, in_memory, locate, prune, remove_clients
from lightning_lbgm.strategy.processes import ProcessesStrategy
from lightning_lbgm.strategy.session import Session

__all__ = ["CheckpointingStrategy"]

_KEY = "lightning_lbgm"


class CheckpointingStrategy(ProcessesStrategy):
    """Save the federation with Lightning's checkpoints, and find it again.

    Attributes:
        session: Set by the strategy.
    """

    session: Session

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the global model, also while a client is being trained."""
        if self.session.federation is None:
            return super().lightning_module_state_dict()
        with self.session.federation.global_model():
            state = super().lightning_module_state_dict()
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        session = self.session
        # A weights-only checkpoint has no optimizer states, and gets no federation's state either.
        if "optimizer_states" in checkpoint and session.restored is not None:
            # A resumed run that has not begun, as a tuner's trial finds it.
            checkpoint = {**checkpoint, _KEY: in_memory(session.restored)}
        elif "optimizer_states" in checkpoint and session.federation is not None:
            state = checkpoints.save(session.federation, checkpoint_folder(filepath))
            checkpoint = {**checkpoint, _KEY: {"identity": session.identity, **state}}
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if _KEY in checkpoint and self.is_global_zero:  # who alone knows of all clients
            prune(checkpoint[_KEY])

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            remove_clients(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            # Kept until `on_train_start`, when the federation is made. The one there was ends here, because the trainer
            # may be going back to where it was before a tuner's trial.
            session = self.session
            self.on_train_end()
            session.federation = None
            session.restored = checkpoint.get(_KEY)
            if session.restored is not None:
                checkpoints.check(session.restored, checkpoint_path)
                locate(session.restored, checkpoint_path)
                checkpoint = loop_progress.between_rounds(checkpoint)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict=strict)
        if self.session.restored is not None and self.session.is_patched:
            # The fit has begun, so that a tuner goes back to where it was before its trial: its checkpoint is deleted
            # after this, and `on_train_start` may not come again.
            assert self.lightning_module is not None
            self.session.make(self.lightning_module, self.world)
