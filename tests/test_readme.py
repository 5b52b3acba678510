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
def test_the_charts_recipe_makes_the_runs_and_the_figures_of_its_page(tmp_path):
    images = tmp_path / "images"
    out = run_recipe("-m", "recipes.charts", "--rounds=3", f"--images={images}", cwd=tmp_path)
    page = (ROOT / "docs" / "reading-charts.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", out, re.MULTILINE)
    assert rows[:2] == ["run", "---"]
    assert rows == re.findall(r"^\| ([^|]+) \|", page.split("## ")[0], re.MULTILINE)
    assert {path.name for path in images.iterdir()} == set(re.findall(r"images/(charts_\w+\.png)", page))


@pytest.mark.slow
def test_the_gradient_space_recipe_needs_no_data(tmp_path):
    recipe = str(ROOT / "recipes" / "gradient_space.py")
    out = run_recipe(recipe, "--epochs=4", "--output=out", cwd=tmp_path, LBGM_DATA="")
    assert "4 epoch gradients of 9,610 entries" in out
    names = {f"gradient_space_{name}.png" for name in ("components", "principal", "cosines")}
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == names
    assert {path.name for path in (tmp_path / "out" / "mlruns").rglob("*.png")} == names


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


def mnist_folder() -> Path | None:
    candidates = [os.environ.get("LBGM_DATA"), ROOT.parent / "shared" / "data", ROOT / "data"]
    folders = (Path(c) for c in candidates if c)
    return next((f for f in folders if list((f / "MNIST" / "raw").glob("train-images-idx3-ubyte*"))), None)


@pytest.mark.slow
@pytest.mark.skipif(mnist_folder() is None, reason="MNIST is not there: set LBGM_DATA to a folder that holds MNIST/raw")
def test_the_mnist_recipe_trains_on_real_data(tmp_path):
    run_recipe(
        "-m",
        "recipes.mnist",
        "fit",
        "--config",
        str(ROOT / "recipes" / "configs" / "mnist_lbgm.yaml"),
        "--trainer.max_epochs=8",
        f"--data.root={mnist_folder()}",
        f"--data.cache={tmp_path / 'cache'}",
        cwd=tmp_path,
    )
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        metrics = dict(store.execute("select key, value from latest_metrics").fetchall())
    assert metrics["val/acc"] > 0.6
    assert metrics["comm/savings"] > 0.5


@pytest.mark.slow
def test_the_recipe_of_clients_runs_on_the_digits(tmp_path):
    arguments = ("--data", "", "--rounds", "2", "--clients", "5", "--every", "2", "--output", str(tmp_path))
    out = run_recipe("-m", "recipes.clients", *arguments, cwd=ROOT)
    rows = [line for line in out.splitlines() if line.startswith(("FedAvg", "LBGM"))]
    assert [len(row[22:].split()) for row in rows] == [7, 7, 7]
    assert len(list(tmp_path.glob("*/figures/clients.png"))) == 3


@pytest.mark.slow
def test_the_recipe_of_partitions_prints_the_table_and_draws_the_figures_of_its_page(tmp_path):
    out = run_recipe("-m", "recipes.partitions", "--clients=6", "--images=images", cwd=tmp_path, LBGM_DATA="")
    page = (ROOT / "docs" / "partitions.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", out.split("\n\n")[0], re.MULTILINE)
    assert "\n".join(rows) in "\n".join(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE))
    assert len(rows) == 2 + 7
    assert set(re.findall(r"images/(\w+\.png)", page)) <= {path.name for path in (tmp_path / "images").iterdir()}
