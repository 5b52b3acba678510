"""Loop counters in Lightning's checkpoints, normalised to a point between two rounds before a resume.

A second file of names that Lightning does not document as public, beside ``lightning.py``. Seen in Lightning 2.6.6.

Lightning guesses from the counters in which hook a checkpoint was made, and counts on from there. It counts an epoch
twice when a run is resumed a second time from a checkpoint made after an epoch's last batch; with ``max_steps`` it runs
an epoch past its end. Its epochs are long, so that this is rare. Here an epoch is one round by default, and every
checkpoint is made after an epoch's last batch. So a checkpoint is made to look as if it had been made between two
rounds, of which Lightning knows two kinds that it resumes from exactly: after an epoch, and within one.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

__all__ = ["between_rounds", "start_at", "start_next_epoch"]

_EPOCH, _BATCH = "epoch_progress", "epoch_loop.batch_progress"
_VALIDATION, _STEPS = "epoch_loop.val_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress"


def between_rounds(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with the counters of a run that stopped between two rounds.

    A round whose training was over counts as done, with its epoch if it was the last one; a round that was not over
    is made again from its start. What Lightning would have done after the round (validation, hooks at the epoch's end)
    is not caught up on, as in Lightning.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if not all(name in loops for name in (_EPOCH, _BATCH, _STEPS)):
        return checkpoint
    epoch, batch = loops[_EPOCH]["current"], loops[_BATCH]["current"]
    epochs_done, batches_done = epoch["processed"], batch["processed"]
    # A batch that a hook has skipped was not started.
    in_hook_after_batch = batch["completed"] < batches_done == batch["ready"] == batch["started"]
    # The last two: within an epoch, but `ready` lags in a run that Lightning itself has resumed.
    within_epoch = epoch["started"] > epochs_done or (in_hook_after_batch and epoch["started"] == epochs_done)
    if within_epoch and loops[_BATCH]["is_last_batch"] and batches_done == batch["ready"]:
        epochs_done, within_epoch = epochs_done + 1, False
    within_epoch = within_epoch and batches_done > 0
    batches = batches_done if within_epoch else 0
    epoch_lead = epochs_done - epoch["processed"] + loops[_EPOCH]["total"]["processed"]
    loops = {
        **loops,
        _EPOCH: {
            "total": _counters(epoch_lead, started=epoch_lead + within_epoch),
            "current": _counters(epochs_done, started=epochs_done + within_epoch),
        },
        # Lightning completes the last batch of an epoch that it goes on with, and counts its step for the loggers.
        _BATCH: {
            "total": _counters(loops[_BATCH]["total"]["processed"], lag=within_epoch),
            "current": _counters(batches, lag=within_epoch),
            "is_last_batch": False,
        },
        _VALIDATION: {"total": _counters(0), "current": _counters(0), "is_last_batch": False},
    }
    steps = loops[_STEPS]["optimizer"]["step"]["total"]["completed"]
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": steps - within_epoch}
    return {**checkpoint, "loops": {**checkpoint["loops"], "fit_loop": loops}}


def _counters(done: int, started: int | None = None, lag: int = 0) -> dict[str, int]:
    started = done if started is None else started
    return {"ready": started, "started": started, "processed": done, "completed": done - lag}


def start_next_epoch(trainer: pl.Trainer) -> None:
    """Let a resumed run that is between two epochs start the next one: with ``max_steps`` Lightning would not."""
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    if epoch.ready != epoch.processed:
        return
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._restarting = False
        part.reset_restart_stage()


def start_at(trainer: pl.Trainer, steps: int, epochs: int) -> None:
    """Let a new Trainer count on from so many rounds and epochs, which others have made."""
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress
    done = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = steps
    for counters in (epoch.total, epoch.current):
        counters.ready = counters.started = counters.processed = counters.completed = epochs
    loop.epoch_loop._batches_that_stepped = steps  # the loggers' step
