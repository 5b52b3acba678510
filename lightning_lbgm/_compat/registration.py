"""Registration of the strategy's names with Lightning and its twin package, when the process imports them.

``Trainer(strategy="lbgm_federated")`` works after ``import lightning_lbgm`` alone, in either order of imports. Neither
package is imported from here: until the process does it, this costs a comparison of each imported name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["STRATEGY_NAMES", "make_strategy", "register_when_imported"]

STRATEGY_NAMES = {"lbgm_federated": "Federated training with LBGM", "fedavg": "Federated averaging"}


def make_strategy(**settings: Any) -> Any:
    """Make an ``LBGMFederated``, which is imported only now."""
    return importlib.import_module("lightning_lbgm.strategy.federated").LBGMFederated(**settings)


def register_when_imported() -> None:
    """Give the strategy its names in Lightning, and let the twin know this package, now or at their import."""
    _when_imported("lightning.pytorch", _register_names)
    _when_imported("pytorch_lightning", _meet_twin)


def _register_names(package: Any) -> None:
    registry = package.strategies.StrategyRegistry
    for name, description in STRATEGY_NAMES.items():
        if name not in registry:
            settings: dict[str, Any] = {"uplink": []} if name == "fedavg" else {}
            registry.register(name, make_strategy, description=description, **settings)


def _meet_twin(twin: ModuleType) -> None:
    importlib.import_module("lightning_lbgm.strategy.twin").meet(twin)


def _when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    module = sys.modules.get(name)
    if module is not None and hasattr(module, "Trainer"):
        function(module)
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(MetaPathFinder):
    """Call a function when a module has been imported; finds nothing itself."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._function(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
