"""The twin package ``pytorch_lightning``: its objects and those of ``lightning.pytorch`` in one federation.

Both packages have the same classes at the same places, but ``isinstance`` does not know that, so a Trainer of one
refuses a strategy or a module of the other. This package is written over ``lightning.pytorch``. A Trainer of either
package whose strategy is ``LBGMFederated`` therefore *adopts* what it is given: modules (also nested ones),
datamodules, callbacks, loggers, the strategy itself and the errors that it raises. `_twin_import` arranges that.

To adopt an object is to put the classes of the Trainer's own package before their namesakes in the object's method
resolution order. What the user has overridden comes first as before, all else runs the code of the Trainer's package,
and the object is an instance of both. Copies and pickles are of the class that the user wrote.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

__all__ = [
    "TWIN",
    "adopt",
    "adopt_callbacks",
    "adopt_strategy",
    "is_a",
    "is_exactly",
    "namesakes",
    "native",
    "same_version",
]

TWIN = "pytorch_lightning"

_PACKAGES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
_KINDS = (pl.LightningModule, pl.LightningDataModule, pl.Callback, Logger, MisconfigurationException)


def is_a(instance: object, *classes: type) -> bool:
    """Whether an object is an instance of one of Lightning's classes, or of its namesake in the twin."""
    return isinstance(instance, tuple(namesake for cls in classes for namesake in namesakes(cls)))


def is_exactly(instance: object, cls: type) -> bool:
    """Whether an object's type is one of Lightning's classes, or its namesake in the twin, and no subclass."""
    return type(instance) in namesakes(cls)


def namesakes(cls: type) -> tuple[type, ...]:
    """Return a class of ``lightning`` and, if the twin is imported, its namesake there."""
    if TWIN not in sys.modules:
        return (cls,)
    other = counterpart(cls)
    return (cls,) if other is None else (cls, other)


def native(trainer: Any, thing: Any) -> Any:
    """Return a class or function of ``lightning`` as the Trainer's own package has it."""
    return (counterpart(thing) or thing) if _is_twins(trainer) else thing


@functools.cache
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
        if isinstance(reduced, str):
            return reduced
        adopted, original = type(self), self._lbgm_original
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # which insists on the object's present class
            function = original.__new__
        function, *arguments = (original if part is adopted else part for part in (function, *arguments))
        return function, tuple(arguments), *rest


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
        instance: A module (also a compiled one), datamodule, callback, logger or error; anything else is left alone.
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
    if TWIN in sys.modules:
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
    # The user's class is the first base, because an object's class can only be replaced by one of the same layout.
    adopted = metaclass(cls.__name__, (cls, helper), names)
    adopted._lbgm_original = cls  # not among the names: MLflow's metaclass wraps what can be called there
    return adopted


def _is_twins(instance: object) -> bool:
    """Whether the first of an object's classes that Lightning has written is the twin's."""
    if TWIN not in sys.modules:
        return False
    return next((_is_of(cls, True) for cls in type(instance).__mro__ if _is_of(cls, True) or _is_of(cls, False)), False)


def _check_versions() -> None:
    twins = sys.modules[TWIN].__version__
    if not same_version(twins):
        raise MisconfigurationException(
            f"lightning {pl.__version__} and pytorch_lightning {twins} meet in one federation, but are different"
            " versions of the same package. Install the same version of both: `pip install"
            f" 'pytorch-lightning=={pl.__version__}'`."
        )


def same_version(version: str) -> bool:
    """Whether a version of the twin agrees with ``lightning``'s up to the patch."""
    return version.split(".")[:2] == pl.__version__.split(".")[:2]
