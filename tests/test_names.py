"""Public names: resolved when they are asked for, the strategy's in Lightning's registry, and those that moved."""

import importlib
import subprocess
import sys

import pytest

import lightning_lbgm
from lightning_lbgm import uplink


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_every_public_name_is_there_and_no_other():
    assert lightning_lbgm.__all__ == sorted(lightning_lbgm.__all__, key=lambda name: (not name.isupper(), name))
    for name in lightning_lbgm.__all__:
        assert getattr(lightning_lbgm, name) is not None
        assert name in dir(lightning_lbgm)
    with pytest.raises(AttributeError, match="no attribute 'Lookback'"):
        lightning_lbgm.Lookback  # noqa: B018


@pytest.mark.parametrize("name", uplink.__all__)
def test_names_that_moved_are_found_with_a_warning(name):
    with pytest.warns(FutureWarning, match=f"import `{name}` from `lightning_lbgm") as caught:
        found = getattr(uplink, name)
    room = str(caught[0].message).split("`")[-2]
    assert found is getattr(importlib.import_module(room), name)


def test_a_name_that_was_never_there_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'LookAhead'"):
        uplink.LookAhead  # noqa: B018


IMPORTS = [
    "import lightning_lbgm; import lightning.pytorch as pl",
    "import lightning.pytorch as pl; import lightning_lbgm",
    "from lightning_lbgm import LBGMCallback; import lightning.pytorch as pl",
    "from lightning_lbgm import LBGMFederated; import lightning.pytorch as pl",
]
# Each in a fork of one process, that has imported what takes most of the time: neither Lightning nor this package.
FORKS = """
import os, sys
import torch, torch.utils.data, torchmetrics
assert not {{"lightning", "lightning_lbgm"}} & sys.modules.keys()
for imports in {imports}:
    child = os.fork()
    if not child:
        exec(imports)
        made = [pl.Trainer(strategy=s, accelerator="cpu", logger=False) for s in ("lbgm_federated", "fedavg")]
        print("made", [repr(trainer.strategy.uplink) for trainer in made])
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {{imports}}")
"""


def test_the_strategy_has_its_names_in_the_registry_in_either_order_of_imports():
    made = [line for line in run(FORKS.format(imports=IMPORTS)).splitlines() if line.startswith("made")]
    assert made == ["""made ["[LookBack(threshold=0.2, granularity='model')]", '[]']"""] * len(IMPORTS)


def test_importing_the_package_imports_neither_lightning_nor_its_own_strategy():
    modules = ("lightning", "torchmetrics", "mlflow", "matplotlib", "lightning_lbgm.strategy.federated")
    assert run(f"import sys, lightning_lbgm; print([m for m in {modules} if m in sys.modules])").strip() == "[]"
