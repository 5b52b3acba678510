"""The recipe's files fit together, and importing the package asks for no Flower."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_lbgm.flower

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "flower"
BLOCKED = "import sys; sys.modules['flwr'] = None; import lightning_lbgm, lightning_lbgm.flower"


def test_the_package_is_imported_without_flower():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BLOCKED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", lightning_lbgm.flower.__all__)
def test_without_flower_its_names_say_what_to_install(name, monkeypatch):
    for module in [module for module in sys.modules if module.startswith(("lightning_lbgm.flower.", "flwr"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-lbgm\[flower\]'"):
        getattr(lightning_lbgm.flower, name)


def test_the_services_of_the_compose_file_are_called_with_options_that_exist():
    pytest.importorskip("flwr")
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    parsers = {"flower-superlink": _parse_args_run_superlink(), "flower-supernode": _parse_args_run_supernode()}
    services = yaml.safe_load((RECIPE / "docker-compose.yml").read_text())["services"]
    assert sorted(services) == ["node-0", "node-1", "node-2", "superlink"]
    for service in services.values():
        command, *words = service["command"]
        parsers[command].parse_args(words)  # ends the process at an unknown one


def test_the_app_is_one_that_flower_takes():
    pytest.importorskip("flwr")
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(RECIPE / "pyproject.toml", check_module=False)
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["config"]["rounds"] == 5
