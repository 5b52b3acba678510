"""The README and the recipes do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyModule, make_data
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(make_data(2000), batch_size=100)
    namespace = {"model": TinyModule(), "train_loader": loader, "val_loader": loader}
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    short = first.replace("max_epochs=60", "max_epochs=2, accelerator='cpu', logger=False, enable_progress_bar=False")
    assert short != first
    exec(short, namespace)
    assert namespace["strategy"].round_index == 2
    exec(second, namespace)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def run_recipe(*args, cwd, **env):
    result = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_quickstart_prints_the_readmes_table(tmp_path):
    out = run_recipe(str(ROOT / "recipes" / "quickstart.py"), cwd=tmp_path)
    table = out[out.index("method ") :].splitlines()[1:4]
    rows = {line[:14].strip(): line[14:].split() for line in table}
    stated = {
        cells[0]: cells[1:]
        for cells in (re.split(r"\s*\|\s*", line.strip("| ")) for line in README.splitlines() if line.startswith("| "))
        if cells[0] in rows
    }
    assert set(rows) == set(stated) == {"FedAvg", "LBGM", "TopK + LBGM"}
    for name, (accuracy, uplink, share) in stated.items():
        assert float(rows[name][0]) == pytest.approx(float(accuracy), abs=0.01)  # another torch may round otherwise
        assert float(rows[name][1].replace(",", "")) == pytest.approx(float(uplink.replace(",", "")), rel=0.1)
        assert float(rows[name][2].rstrip("%")) == pytest.approx(float(share.rstrip("%")), rel=0.1, abs=0.05)
    fedavg, lbgm = (float(rows[name][0]) for name in ("FedAvg", "LBGM"))
    assert lbgm >= fedavg - 0.01
    assert float(rows["LBGM"][2].rstrip("%")) <= 10
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in out
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        names = store.execute(
            "select runs.name from runs join experiments using (experiment_id) where experiments.name = 'quickstart'"
        ).fetchall()
    assert {name for (name,) in names} == {"FedAvg", "LBGM", "TopK + LBGM"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")
def test_the_ray_recipe_trains_as_two_devices_do(tmp_path):
    for folder, options in (("ray", ()), ("devices", ("--without-ray",))):
        arguments = ("--rounds=3", "--clients=5", f"--output={folder}", *options)
        out = run_recipe("-m", "recipes.ray.mnist", *arguments, cwd=tmp_path, LBGM_DATA="")
        assert "2 processes: validation accuracy" in out
    one, two = (torch.load(tmp_path / folder / "module.pt") for folder in ("ray", "devices"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [(tmp_path / folder / "clients.csv").read_text() for folder in ("ray", "devices")]
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 1 + 3 * 5  # written by one worker
