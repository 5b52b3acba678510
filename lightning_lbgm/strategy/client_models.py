"""Clients' models for callbacks: put into the module, validated, and trained further without a trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from typing_extensions import override

from lightning_lbgm._compat.lightning import LOG_ARGUMENTS, batch_transfer
from lightning_lbgm.clients.local import LocalLoop
from lightning_lbgm.core.rng import derive_seed, seed_global_rng
from lightning_lbgm.data.evaluation import given_data
from lightning_lbgm.data.feed import EvaluationData, Feed, LocalBatch
from lightning_lbgm.data.label_table import LabelTable, label_table
from lightning_lbgm.data.partitioners import IIDPartitioner
from lightning_lbgm.simulation.federation import Federation
from lightning_lbgm.strategy.aside import aside
from lightning_lbgm.strategy.checkpoints import CheckpointingStrategy
from lightning_lbgm.strategy.local_outputs import noted_extra_outputs
from lightning_lbgm.strategy.local_step import local_step
from lightning_lbgm.strategy.log_capture import LogCapture, captured_log
from lightning_lbgm.strategy.validation import validate

__all__ = ["ClientModelsStrategy"]


class ClientModelsStrategy(CheckpointingStrategy):
    """Let callbacks look at the models of single clients between rounds, and at the end of a client's turn.

    Nothing of it has an effect on training. The processes need not be in step meanwhile.
    """

    _is_aside = False

    @property
    def feed(self) -> Feed:
        """The clients' training data, of a fit that has begun."""
        assert self.session.feed is not None
        return self.session.feed

    def evaluation_data(self, data: Any, keys: Any) -> EvaluationData | None:
        """Return what clients are evaluated on: the given data, else what was held out, None if nothing was.

        Args:
            data: As for ``ClientEvaluation``.
            keys: As for ``ClientEvaluation``.

        Raises:
            ValueError: If the data does not go with the clients.
            TypeError: If it is of another type.
        """
        if data is None:
            return self.feed.held_out
        partitioner = self.session.settings.partitioner or IIDPartitioner()
        return given_data(data, keys, self.feed, partitioner, self.session.seed)

    def label_table(self, labels: Any = None) -> LabelTable:
        """Return how many training examples of each label each client has, read without loading examples.

        Args:
            labels: One label for each example of the DataLoader's dataset. None: those that the partitioner was given,
                else those that the dataset shows.

        Raises:
            ValueError: If ``labels`` are given, and are not one class for each example.
        """
        return label_table(self.feed, self.session.settings.split(self.feed), labels)

    def gather(self, value: Any, purpose: str) -> list[Any]:
        """Return every process's value, in order of rank, in every process; all of them must call it.

        Args:
            value: Anything that can be pickled, without tensors on an accelerator.
            purpose: What is gathered, the same in every process.
        """
        return self.world.gather(value, purpose)

    def share_of(self, client_ids: Sequence[int]) -> list[int]:
        """Return which clients this process is to look at: those whose state it holds, and of the others every N-th."""
        return self.session.require().share_of(client_ids)

    def client_model(self, client_id: int) -> AbstractContextManager[None]:
        """Put the global model as a client uses it into the module for a while, where ``share_of`` says."""
        return self.session.require().client_model(client_id)

    def local_model(self) -> AbstractContextManager[None]:
        """Put the local model of the client whose turn ends into the module for a while, within ``on_client_end``."""
        return self.session.require().local_model()

    def validate_client(self, client_id: int, batches: Iterable[LocalBatch]) -> tuple[int, dict[str, float]]:
        """Run the module's validation, with what the module holds, on examples of a client.

        Random numbers drawn meanwhile are a pure function of seed, round and client.

        Returns:
            The number of examples, and what was logged, by name.
        """
        trainer, module, federation = self._whole()
        with self._work_aside(), aside(trainer, module):
            seed = derive_seed(self.session.seed, "evaluation", federation.round_index, client_id)
            seed_global_rng(seed, federation.flat.device)
            transfer = batch_transfer(trainer, module, super().batch_to_device)
            return validate(trainer, module, batches, transfer)

    def fine_tune(self, client_id: int, num_steps: int) -> None:
        """Train what the module holds further, by ordinary local steps on a client's training examples.

        The batches are those of the client's next turn. The client's optimizer starts afresh, and the objective is not
        used. Call it within ``client_model``, which undoes the training.

        Args:
            client_id: The client.
            num_steps: Local steps.
        """
        trainer, module, federation = self._whole()
        optimizer, session = self.optimizers[0], self.session
        with self._work_aside(), aside(trainer, module):
            seed_global_rng(
                derive_seed(session.seed, "fine tuning", federation.round_index, client_id), self.root_device
            )
            transfer = batch_transfer(trainer, module, super().batch_to_device)
            takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
            step = local_step(trainer, module, optimizer, takes_index, transfer, super().backward)
            capture = LogCapture(LOG_ARGUMENTS)
            with captured_log(module, capture), noted_extra_outputs():
                loop = LocalLoop(optimizer, step, capture, session.start_of(optimizer))
                loop.train(itertools.islice(self._batches(client_id, federation.round_index), num_steps))
                loop.reset_optimizer()

    def _batches(self, client_id: int, round_index: int) -> Iterator[LocalBatch]:
        """Yield the batches of a client's turns from a round on, as many as are asked for."""
        for index in itertools.count(round_index):
            yield from self.feed.turn(index, client_id)

    def _whole(self) -> tuple[pl.Trainer, pl.LightningModule, Federation]:
        assert self.lightning_module is not None
        return self.lightning_module.trainer, self.lightning_module, self.session.require()

    @contextmanager
    def _work_aside(self) -> Iterator[None]:
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    @override
    def _in_step(self) -> bool:
        return super()._in_step() and not self._is_aside
