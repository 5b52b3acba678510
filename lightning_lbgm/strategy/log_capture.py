"""Log capture: values logged in a training step, reduced over the cohort and handed on once a round."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lbgm._compat.lightning import is_compiled
from lightning_lbgm.clients.log import ChunkLog, LogEntry, reduction_name, weight_of

__all__ = ["LogCapture", "captured_log"]


@dataclass
class LogCapture:
    """Stand in for ``self.log`` while clients train.

    Each name becomes one value a round: by default the mean over all local steps of the cohort, weighted by batch
    size; the sum, minimum or maximum if ``reduce_fx`` says so. What a client logged counts once ``accept``
    is called, so that a client that is left out leaves no trace, except in the state of a ``torchmetrics.Metric``.

    Attributes:
        argument_names: The arguments of ``self.log`` after name and value, in order.
        batch_size: Examples in the local batch at hand, the weight of what is logged now.
    """

    argument_names: tuple[str, ...] = ()
    batch_size: int = 1
    _client: dict[str, LogEntry] = field(default_factory=dict)
    _round: dict[str, LogEntry] = field(default_factory=dict)

    def record(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Take one value: a number, a tensor with one element or a ``torchmetrics.Metric``.

        Args:
            name: The key.
            value: The value.
            *args: The first of the other arguments, named by ``argument_names``.
            **options: The other arguments of ``LightningModule.log``, kept for ``flush``. ``batch_size``, if
                given, is the weight.
        """
        if args:
            options.update(zip(self.argument_names, args))
        entry = self._client.get(name)
        if entry is not None and entry.takes(value) and options.get("batch_size") is None:
            # What a round does thousands of times, in as few operations as there are.
            entry.weight += self.batch_size
            entry.total.add_(value.detach(), alpha=self.batch_size)  # type: ignore[union-attr]
            return
        if entry is None:
            entry = self._client[name] = LogEntry(options, reduction_name(options.get("reduce_fx", "mean")))
        weight = weight_of(options, self.batch_size)
        if isinstance(value, Tensor):
            self._record_tensor(entry, value, weight)
        elif isinstance(value, Metric):
            entry.last = value
            if isinstance(value._forward_cache, Tensor):
                self._record_tensor(entry, value._forward_cache, weight)
        elif isinstance(value, numbers.Real):
            entry.add(torch.tensor(float(value)), weight)
        elif entry.last is None:
            entry.last = value

    @staticmethod
    def _record_tensor(entry: LogEntry, value: Tensor, weight: float) -> None:
        if value.ndim or value.dtype is not torch.float32:
            if value.numel() != 1:  # Lightning's own `log` will say what is wrong
                entry.last = value if entry.last is None else entry.last
                return
            value = value.reshape(())
            value = value if value.dtype is torch.float64 else value.float()
        entry.add(value.detach(), weight)

    def take(self) -> dict[str, LogEntry]:
        """Return what the client logged, and forget it."""
        entries, self._client = self._client, {}
        return entries

    def replay(self, log: ChunkLog, position: int) -> None:
        """Take what one client of a chunk logged, as if it had been recorded here."""
        self._client = log.client(position)

    def accept(self) -> None:
        """Count what the client logged."""
        for name, entry in self._client.items():
            known = self._round.setdefault(name, LogEntry(entry.options, entry.reduction))
            known.merge(entry)
        self._client = {}

    def reject(self) -> None:
        """Forget what the client logged."""
        self._client = {}

    def export(self, module: nn.Module) -> list[dict[str, Any]]:
        """Return the round's entries as plain values, for other processes that train clients of the same round.

        Args:
            module: Where a ``torchmetrics.Metric`` is found again by the name of its attribute.
        """
        paths = {id(child): name for name, child in module.named_modules() if isinstance(child, Metric)}
        return [
            {
                "name": name,
                # As a word, because a lambda does not travel; a process group has no meaning elsewhere.
                "options": {**entry.options, "reduce_fx": entry.reduction, "sync_dist_group": None},
                "reduction": entry.reduction,
                "total": None if entry.total is None else (float(entry.total), entry.total.dtype),
                "weight": entry.weight,
                "metric": paths.get(id(entry.last)),
            }
            for name, entry in self._round.items()
        ]

    def combine(self, parts: Sequence[list[dict[str, Any]]], module: nn.Module, device: torch.device) -> None:
        """Make of all processes' entries the same in each, with the options of the first that has the name.

        A metric keeps what its own process has seen, until Lightning computes it over the processes: all have to log
        it for that, also one whose clients did not.

        Args:
            parts: What ``export`` returned in each process, in order.
            module: The module.
            device: Where values go.
        """
        own, self._round = self._round, {}
        for part in parts:
            for item in part:
                name, total = item["name"], item["total"]
                known = self._round.setdefault(name, LogEntry(item["options"], item["reduction"]))
                value = None if total is None else torch.tensor(total[0], dtype=total[1], device=device)
                metric = None if item["metric"] is None else module.get_submodule(item["metric"])
                known.merge(LogEntry(item["options"], item["reduction"], value, item["weight"], metric or known.last))
        for name, entry in own.items():
            self._round[name].last = entry.last

    def flush(self, log: Callable[..., None], **overrides: Any) -> None:
        """Log every value of the round through ``log`` and start afresh.

        Args:
            log: Called as ``log(name, value, **options)``, with ``batch_size`` the weight of the whole round.
            **overrides: Options that replace the recorded ones.
        """
        entries, self._round, self._client = self._round, {}, {}
        for name, entry in entries.items():
            weight = entry.weight if entry.total is not None else 1
            options = {**entry.options, **overrides, "batch_size": int(weight) if weight == int(weight) else weight}
            log(name, _value(entry), **options)


def _value(entry: LogEntry) -> Any:
    reduced, last = entry.reduced(), entry.last
    if isinstance(last, Metric):
        if reduced is not None:
            # What Lightning logs as the metric's value of this step.
            last._forward_cache = reduced  # type: ignore[assignment]
        return last
    return last if reduced is None else reduced


@contextmanager
def captured_log(module: pl.LightningModule, capture: LogCapture) -> Iterator[None]:
    """Send the module's ``self.log`` and ``self.log_dict`` to ``capture``; within another capture, to this one."""
    around = module.__dict__.get("log")
    # A compiled step breaks its graph here. Elsewhere the wrapper would cost more than the recording.
    module.__dict__["log"] = torch.compiler.disable(capture.record) if is_compiled(module) else capture.record
    try:
        yield
    finally:
        if around is None:
            module.__dict__.pop("log", None)
        else:
            module.__dict__["log"] = around
