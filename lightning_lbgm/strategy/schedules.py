"""Learning rate schedules that were meant for batches and now count rounds: warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

__all__ = ["is_zero_rate", "warn_of_long_schedules", "warn_of_zero_rate"]

# Attributes that say after how many steps a schedule has done what it does.
_LENGTHS = ("total_steps", "T_max", "total_iters", "T_0", "step_size")
_KEYWORDS = ("num_training_steps", "num_warmup_steps")  # of a partial in `LambdaLR`, as transformers makes them


def is_zero_rate(optimizer: Optimizer) -> bool:
    """Whether no parameter group has a learning rate other than 0."""
    return all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)


def warn_of_zero_rate(round_index: int) -> None:
    """Warn that a round trains nothing."""
    rank_zero_warn(
        f"Round {round_index}: the client optimizer's learning rate is 0, so the round trains nothing, but its updates"
        " are sent and counted. A warmup over batches that starts at 0 costs a step there and a whole round here: start"
        " it above 0, for instance with `(step + 1) / warmup_steps`."
    )


def warn_of_long_schedules(trainer: pl.Trainer) -> None:
    """Warn of schedules over steps that go on for longer than the run has rounds: they were counted in batches."""
    rounds = float(trainer.estimated_stepping_batches)
    for config in trainer.lr_scheduler_configs:
        ticks = rounds / config.frequency
        if config.interval != "step" or config.reduce_on_plateau or not math.isfinite(ticks):
            continue
        setting, length = max(_lengths(config.scheduler), key=lambda found: found[1], default=("", 0))
        if length > ticks:
            rank_zero_warn(
                f"The learning rate schedule {type(config.scheduler).__name__} with `interval='step'` and"
                f" `{setting}={length:g}` ticks once a round, {int(ticks)} times in this run, and does not get to its"
                " end. If it was counted in batches, count rounds: `self.trainer.estimated_stepping_batches` in"
                " `configure_optimizers` is the number of rounds."
            )


def _lengths(scheduler: Any) -> Iterator[tuple[str, float]]:
    for name in _LENGTHS:
        value = getattr(scheduler, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value
    for function in getattr(scheduler, "lr_lambdas", ()):
        keywords = getattr(function, "keywords", None) or {}
        for name in _KEYWORDS:
            if isinstance(keywords.get(name), (int, float)):
                yield name, keywords[name]
    inner = getattr(scheduler, "_schedulers", ())  # of `SequentialLR` and `ChainedScheduler`
    before = [0, *getattr(scheduler, "_milestones", [])]
    for position, part in enumerate(inner):
        start = before[position] if len(before) == len(inner) else 0
        for name, value in _lengths(part):
            yield name, start + value
