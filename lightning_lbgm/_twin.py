"""Lightning under its other name: objects of ``pytorch_lightning`` and of ``lightning.pytorch`` in one federation.

Both packages have the same classes at the same places, but ``isinstance`` does not know that, so a Trainer of one
refuses a strategy or a module of the other. This package is written over ``lightning.pytorch``. When the process
imports ``pytorch_lightning``, before or after this package, three things are done once:

- this package's strategy and callbacks are declared to be its strategies and callbacks too, and the strategy is
  registered there by name;
- the two Trainer classes, if their strategy is ``LBGMFederated``, first *adopt* what they are given;
- nothing else: Trainers with other strategies are as strict as before.

To adopt an object is to put the class of the Trainer's own package before its namesake in the object's method
resolution order. What the user has overridden comes first as before, all else runs the code of the Trainer's package,
and the object is an instance of both. It is done for modules (also nested ones), datamodules, callbacks, loggers and
the strategy. Copies and pickles are of the class that the user wrote.

An alias in ``sys.modules`` would be shorter. But it works only for who imports this package first, and it changes what
``pytorch_lightning`` means for everything else in the process. The twin is never imported from here: until the user
imports it, this costs one look at each import's name.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

__all__ = ["adopt", "adopt_callbacks", "adopt_strategy", "is_a", "is_exactly", "namesakes", "native", "when_imported"]

_PACKAGES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
_TWIN = "pytorch_lightning"
_KINDS = (pl.LightningModule, pl.LightningDataModule, pl.Callback, Logger)
_ENTRIES = ("fit", "validate", "test", "predict")


def is_a(instance: object, *classes: type) -> bool:
    """Whether an object is an instance of one of Lightning's classes, or of its namesake in the twin."""
    return isinstance(instance, tuple(namesake for cls in classes for namesake in namesakes(cls)))


def is_exactly(instance: object, cls: type) -> bool:
    """Whether an object's type is one of Lightning's classes, or its namesake in the twin, and no subclass."""
    return type(instance) in namesakes(cls)


def namesakes(cls: type) -> tuple[type, ...]:
    """Return a class of ``lightning`` and, if the twin is imported, its namesake there."""
    if _TWIN not in sys.modules:
        return (cls,)
    other = counterpart(cls)
    return (cls,) if other is None else (cls, other)


def native(trainer: Any, thing: Any) -> Any:
    """Return a class or function of ``lightning`` as the Trainer's own package has it."""
    return (counterpart(thing) or thing) if _is_twins(trainer) else thing


def counterpart(thing: Any) -> Any:
    """Return the class or function of the other package that has the same place and name; None if there is none."""
    for one, two in _PACKAGES.items():
        for source, target in ((one, two), (two, one)):
            if _lies_in(thing, source):
                return _find(target + thing.__module__.removeprefix(source), thing.__qualname__)
    return None


def _lies_in(thing: Any, package: str) -> bool:
    return f"{thing.__module__}.".startswith(f"{package}.")


def _is_of(thing: Any, twins: bool) -> bool:
    """Whether a class or function is one of the twin's; else, whether it is one of ``lightning``."""
    return any(_lies_in(thing, package) for package in (_PACKAGES.values() if twins else _PACKAGES))


@functools.cache
def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


# Adopting


class _Adopted:
    """Base of the classes that are made for adopted objects."""

    __slots__ = ()
    _lbgm_original: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing: the user's own hook would take this for a subclass that somebody wrote."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as an object of the class that the user wrote."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str) or type(self) not in reduced[1]:
            return reduced
        function, arguments, *rest = reduced
        original = self._lbgm_original
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # which insists on the object's present class
            function = original.__new__
        return function, tuple(original if a is type(self) else a for a in arguments), *rest


class _AdoptedModule(_Adopted):
    __slots__ = ()

    def configure_callbacks(self) -> Any:
        callbacks = super().configure_callbacks()  # type: ignore[misc]
        for callback in callbacks if isinstance(callbacks, Sequence) else [callbacks]:
            adopt(callback, twins=_is_twins(self))
        return callbacks


def adopt(instance: Any, twins: bool) -> None:
    """Make an object, and the modules nested in it, instances of one package's classes.

    Args:
        instance: A module (also a compiled one), datamodule, callback or logger; anything else is left alone.
        twins: Whether the package is ``pytorch_lightning``.

    Raises:
        MisconfigurationException: If the two packages differ in their minor version.
    """
    parts = list(instance.modules()) if isinstance(instance, nn.Module) else [instance]
    for part in parts:
        for kind in _KINDS:
            if is_a(part, kind):
                _adopt(part, kind, twins)


def adopt_strategy(strategy: Any) -> None:
    """Let a strategy run the code of its Trainer's package, of which is the accelerator that it has been given."""
    twins, original = _is_twins(strategy.accelerator), _original(strategy)
    if twins:
        _check_versions()
    strategy.__class__ = _adopted(original, twins) if twins else original


def adopt_callbacks(trainer: Any) -> None:
    """Adopt what the module or another tool has added to the Trainer's callbacks."""
    if _TWIN in sys.modules:
        for callback in trainer.callbacks:
            adopt(callback, _is_twins(trainer))


def _adopt(instance: Any, kind: type, twins: bool) -> None:
    own = counterpart(kind) if twins else kind
    original = _original(instance)
    if own is not None and not issubclass(original, own):
        _check_versions()
        instance.__class__ = _adopted(original, twins)
    elif original is not type(instance):
        instance.__class__ = original


def _original(instance: object) -> Any:
    """Return an object's class before it was adopted."""
    return getattr(type(instance), "_lbgm_original", type(instance))


@functools.cache
def _adopted(cls: Any, twins: bool) -> Any:
    """Return a subclass in which each class of the other package comes after all of the wanted one's."""
    helper = _AdoptedModule if issubclass(cls, nn.Module) else _Adopted

    def mro(self: type) -> list[type]:
        front: list[type] = [self, *helper.__mro__[:-1]]
        behind: list[type] = []
        for base in cls.__mro__[:-1]:
            foreign = _is_of(base, not twins)
            (behind if foreign else front).append(base)
            if foreign:
                front.append(counterpart(base) or base)
        return list(dict.fromkeys([*front, *behind, object]))

    metaclass = type(type(cls).__name__, (type(cls),), {"mro": mro})
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    # The user's class is the first base, for an object's class can only be replaced by one of the same layout.
    adopted = metaclass(cls.__name__, (cls, helper), names)
    adopted._lbgm_original = cls  # not among the names: MLflow's metaclass wraps what can be called there
    return adopted


def _is_twins(instance: object) -> bool:
    """Whether the first of an object's classes that Lightning has written is the twin's."""
    if _TWIN not in sys.modules:
        return False
    return next((_is_of(cls, True) for cls in type(instance).__mro__ if _is_of(cls, True) or _is_of(cls, False)), False)


def _check_versions() -> None:
    twins = sys.modules[_TWIN].__version__
    if not _agrees(twins):
        raise MisconfigurationException(
            f"lightning {pl.__version__} and pytorch_lightning {twins} meet in one federation, but are different"
            " versions of the same package. Install the same version of both: `pip install"
            f" 'pytorch-lightning=={pl.__version__}'`."
        )


def _agrees(version: str) -> bool:
    return version.split(".")[:2] == pl.__version__.split(".")[:2]


# Meeting the twin


def when_imported(strategy: type, callbacks: Iterable[type]) -> None:
    """Make the twin know this package's strategy and callbacks, now or when the process imports it."""
    meet = functools.partial(_meet, strategy, tuple(callbacks))
    twin = sys.modules.get(_TWIN)
    if twin is not None and hasattr(twin, "Trainer"):
        meet(twin)
    else:
        sys.meta_path.insert(0, _AfterImport(meet))


class _AfterImport(MetaPathFinder):
    """Call a function when the twin has been imported; finds nothing itself."""

    def __init__(self, function: Callable[[ModuleType], None]) -> None:
        self._function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TWIN:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._function(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _meet(strategy: Any, callbacks: tuple[type, ...], twin: Any) -> None:
    # In another version too, so that its Trainer comes to the error that names both versions.
    twin.strategies.SingleDeviceStrategy.register(strategy)
    strategy.register_strategies(twin.strategies.StrategyRegistry)
    if not _agrees(twin.__version__):
        return
    for callback in callbacks:
        for cls in callback.__mro__:
            if pl.Callback in cls.__bases__ and _lies_in(cls, __package__):
                cls.__bases__ = tuple(dict.fromkeys((*cls.__bases__, twin.Callback)))
    trainers: list[tuple[Any, bool]] = [(pl.Trainer, False), (twin.Trainer, True)]
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
        if isinstance(given, strategy) or entry.get("strategy") is strategy:
            for settings in (kwargs.get("callbacks"), kwargs.get("logger")):
                for item in settings if isinstance(settings, (list, tuple)) else [settings]:
                    adopt(item, twins)
        init(self, *args, **kwargs)

    return adopting


def _adopting_arguments(method: Callable[..., Any], strategy: type, twins: bool) -> Callable[..., Any]:
    """Let a Trainer adopt what it is to fit, validate, test or predict."""

    @functools.wraps(method)
    def adopting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.strategy, strategy):
            for item in (*args, *kwargs.values(), *self.callbacks, *self.loggers):
                adopt(item, twins)
        return method(self, *args, **kwargs)

    return adopting
