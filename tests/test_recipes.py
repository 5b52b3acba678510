"""The recipes do what they say. Those of test_readme.py are run by a Python of their own, as a user does."""

from __future__ import annotations

import os
import re
import sqlite3
from pathlib import Path

import pytest
from running import lay_store, run_here

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_charts_recipe_makes_the_runs_and_the_figures_of_its_page(tmp_path):
    images = tmp_path / "images"
    lay_store(tmp_path)
    out = run_here("charts", "--rounds=3", f"--output={tmp_path}", f"--images={images}")
    page = (ROOT / "docs" / "reading-charts.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", out, re.MULTILINE)
    assert rows[:2] == ["run", "---"]
    assert rows == re.findall(r"^\| ([^|]+) \|", page.split("## ")[0], re.MULTILINE)
    assert {path.name for path in images.iterdir()} == set(re.findall(r"images/(charts_\w+\.png)", page))


@pytest.mark.slow
def test_the_gradient_space_recipe_needs_no_data(tmp_path):
    lay_store(tmp_path / "out")
    out = run_here("gradient_space", "--epochs=4", f"--output={tmp_path / 'out'}", LBGM_DATA="")
    assert "4 epoch gradients of 9,610 entries" in out
    names = {f"gradient_space_{name}.png" for name in ("components", "principal", "cosines")}
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == names
    assert {path.name for path in (tmp_path / "out" / "mlruns").rglob("*.png")} == names


def mnist_folder() -> Path | None:
    candidates = [os.environ.get("LBGM_DATA"), ROOT.parent / "shared" / "data", ROOT / "data"]
    folders = (Path(c) for c in candidates if c)
    return next((f for f in folders if list((f / "MNIST" / "raw").glob("train-images-idx3-ubyte*"))), None)


@pytest.mark.slow
@pytest.mark.skipif(mnist_folder() is None, reason="MNIST is not there: set LBGM_DATA to a folder that holds MNIST/raw")
def test_the_mnist_recipe_trains_on_real_data(tmp_path):
    run_here(
        "mnist",
        "fit",
        f"--config={ROOT / 'recipes' / 'configs' / 'mnist_lbgm.yaml'}",
        "--trainer.max_epochs=8",
        f"--trainer.logger.init_args.tracking_uri=sqlite:///{lay_store(tmp_path)}",
        f"--data.root={mnist_folder()}",
        f"--data.cache={tmp_path / 'cache'}",
    )
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        metrics = dict(store.execute("select key, value from latest_metrics").fetchall())
    assert metrics["val/acc"] > 0.6
    assert metrics["comm/savings"] > 0.5


@pytest.mark.slow
def test_the_recipe_of_clients_runs_on_the_digits(tmp_path):
    arguments = ("--data", "", "--rounds", "2", "--clients", "5", "--every", "2", "--output", str(tmp_path))
    out = run_here("clients", *arguments)
    rows = [line for line in out.splitlines() if line.startswith(("FedAvg", "LBGM"))]
    assert [len(row[22:].split()) for row in rows] == [7, 7, 7]
    assert len(list(tmp_path.glob("*/figures/clients.png"))) == 3


@pytest.mark.slow
def test_the_recipe_of_partitions_prints_the_table_and_draws_the_figures_of_its_page(tmp_path):
    out = run_here("partitions", "--clients=6", f"--images={tmp_path / 'images'}", LBGM_DATA="")
    page = (ROOT / "docs" / "partitions.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", out.split("\n\n")[0], re.MULTILINE)
    assert "\n".join(rows) in "\n".join(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE))
    assert len(rows) == 2 + 7
    assert set(re.findall(r"images/(\w+\.png)", page)) <= {path.name for path in (tmp_path / "images").iterdir()}
