"""Adoption of the strategy by ``pytorch_lightning`` and its Trainer; see ``twin``.

Three things are done, once: the strategy and the callbacks are declared to be the twin's too; the strategy gets its
names in the twin's registry; and both Trainer classes let a federation's Trainer adopt what it is given. Trainers with
other strategies are as strict as before.

An alias, ``sys.modules["pytorch_lightning"] = lightning.pytorch``, would be shorter. But it works only if this package
is imported first, and it would change what ``pytorch_lightning`` means for everything else in the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry

from lightning_lbgm._compat.registration import make_strategy
from lightning_lbgm._compat.twin import adopt, same_version

__all__ = ["meet_twin"]

_ENTRIES = ("fit", "validate", "test", "predict")


def meet_twin(strategy: Any, callbacks: tuple[type, ...], twin: Any) -> None:
    """Make the twin, which the process has imported, know this package's strategy and callbacks."""
    trainers: list[tuple[Any, bool]] = [(pl.Trainer, False)]
    if same_version(twin.__version__):
        trainers.append((twin.Trainer, True))
        strategy.register_strategies(twin.strategies.StrategyRegistry)
        for callback in callbacks:
            for cls in callback.__mro__:
                if pl.Callback in cls.__bases__ and cls.__module__.startswith("lightning_lbgm."):
                    cls.__bases__ = tuple(dict.fromkeys((*cls.__bases__, twin.Callback)))
    # Of another version too, so that its Trainer comes to the error that names both versions.
    base = getattr(getattr(twin, "strategies", None), "SingleDeviceStrategy", None)
    if base is not None:
        base.register(strategy)
    for trainer, twins in trainers:
        trainer.__init__ = _adopting_settings(trainer.__init__, strategy, twins)
        for name in _ENTRIES:
            setattr(trainer, name, _adopting_arguments(getattr(trainer, name), strategy, twins))


def _adopting_settings(init: Callable[..., None], strategy: type, twins: bool) -> Callable[..., None]:
    """Let a Trainer adopt the callbacks and loggers that it is made with."""

    @functools.wraps(init)
    def adopting(self: Any, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("strategy")
        entry = StrategyRegistry[given.lower()] if isinstance(given, str) and given.lower() in StrategyRegistry else {}
        if not isinstance(given, strategy) and entry.get("strategy") not in (strategy, make_strategy):
            init(self, *args, **kwargs)
            return
        items: list[Any] = []
        for settings in (kwargs.get("callbacks"), kwargs.get("logger")):
            items += settings if isinstance(settings, (list, tuple)) else [settings]
        _call(init, twins, items, self, *args, **kwargs)

    return adopting


def _adopting_arguments(method: Callable[..., Any], strategy: type, twins: bool) -> Callable[..., Any]:
    """Let a Trainer adopt what it is to fit, validate, test or predict."""

    @functools.wraps(method)
    def adopting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.strategy, strategy):
            return method(self, *args, **kwargs)
        return _call(method, twins, (*args, *kwargs.values(), *self.callbacks, *self.loggers), self, *args, **kwargs)

    return adopting


def _call(method: Callable[..., Any], twins: bool, items: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
    """Call a Trainer's method once the items are adopted, and adopt the error that it may raise."""
    for item in items:
        adopt(item, twins)
    try:
        return method(*args, **kwargs)
    except Exception as error:
        adopt(error, twins)  # so that `except MisconfigurationException` of either package catches it
        raise
