"""Contestants that take turns, round by round, so that a noisy machine troubles them alike."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger

from benchmarks import device


class MemoryLogger(Logger):
    """Keep what is logged in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Fit(pl.Callback):
    """A ``Trainer.fit`` that makes one epoch at each ``next``: it runs in a thread of its own, which waits its turn.

    Logging and the progress bar are on, as they are for a user; the bar writes to wherever standard output goes.

    Args:
        make: Returns the module and its DataLoader.
        **trainer_settings: Of the ``Trainer``.
    """

    def __init__(self, make: Callable[[], tuple[pl.LightningModule, Any]], **trainer_settings: Any) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._make = make
        self._settings = trainer_settings
        self._folder = tempfile.TemporaryDirectory()
        self._closing = False
        self._error: BaseException | None = None
        self.losses: list[float] = []
        self.trainer: pl.Trainer | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        if self._closing:
            return
        try:
            module, loader = self._make()
            self.trainer = pl.Trainer(
                **{
                    **device.trainer_settings(),
                    "max_epochs": 1_000_000,
                    "logger": MemoryLogger(),
                    "enable_checkpointing": False,
                    "enable_model_summary": False,
                    "default_root_dir": self._folder.name,  # for the callback's table of clients
                    **self._settings,
                    "callbacks": [*self._settings.get("callbacks", ()), self, TQDMProgressBar()],
                }
            )
            self.trainer.fit(module, loader)
        except BaseException as error:
            self._error = error
        self._done.release()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self._done.release()
        self._go.acquire()
        if self._closing:
            trainer.should_stop = True

    def __iter__(self) -> Iterator[float]:
        """Return itself."""
        return self

    def __next__(self) -> float:
        """Make one epoch."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self.losses[-1] if self.losses else float("nan")

    def close(self) -> None:
        """End the fit."""
        self._closing = True
        self._go.release()
        self._thread.join()
        self._folder.cleanup()


class InThread:
    """Run an iterator in a thread of its own, as a ``Fit`` does: memory is given out by other rules in the main one.

    Args:
        iterator: The iterator.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Make one step."""
        return self._thread.submit(next, self._iterator).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Send what Lightning prints, the progress bar included, to nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def take_turns(
    contestants: Mapping[str, Callable[[], Iterator[Any]]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Let each contestant make a round in turn, ``rounds`` times after ``warmup`` more.

    Args:
        contestants: Each makes an iterator, whose ``next`` makes one round.
        rounds: Measured rounds.
        warmup: Rounds before them.

    Returns:
        Seconds of each measured round, by contestant; equal places were measured one after the other.
    """
    names = list(contestants)
    running: dict[str, Any] = {name: iter(make()) for name, make in contestants.items()}
    for name, iterator in running.items():
        if not isinstance(iterator, Fit):
            running[name] = InThread(iterator)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    torch.set_num_threads(1)
    try:
        with silent():
            for turn in range(warmup + rounds):
                shift = turn % len(names)  # who comes first finds other caches than who comes last
                for name in names[shift:] + names[:shift]:
                    begin = time.perf_counter()
                    next(running[name])
                    device.synchronize()
                    if turn >= warmup:
                        seconds[name].append(time.perf_counter() - begin)
    finally:
        for iterator in running.values():
            close = getattr(iterator, "close", None)
            if close is not None:
                with silent():
                    close()
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str, minus: str | None = None) -> float:
    """Return the median over the turns of ``name`` / ``base``, or of (``name`` - ``minus``) / ``base``."""
    lower = seconds[minus] if minus else [0.0] * len(seconds[name])
    return statistics.median((a - m) / b for a, b, m in zip(seconds[name], seconds[base], lower))


def median(seconds: list[float]) -> float:
    """Return the median."""
    return statistics.median(seconds)
