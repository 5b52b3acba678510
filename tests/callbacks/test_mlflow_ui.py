"""What a user sees of a run in MLflow's UI, in a real browser.

``make screenshots`` runs this file and keeps what it sees in docs/images, otherwise the images go to pytest's folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, free_port, needs_browser, require_browser, resize, save_screenshot, server, wait_for
from mlflow.tracking import MlflowClient
from running import lay_store, run_here

pytestmark = [pytest.mark.slow, pytest.mark.browser, needs_browser]

ROUNDS = 30
CHARTS = {
    "comm": [
        "uplink_bytes",
        "uplink_bytes_total",
        "uplink_floats_total",
        "downlink_bytes",
        "downlink_bytes_total",
        "total_bytes_total",
        "savings",
        "total_savings",
    ],
    "lbgm": ["recycled_fraction", "lbp_error_mean", "threshold"],
    "fl": ["cohort_size", "update_norm", "rejected_clients"],
}

# The graph below the title; MLflow makes groups and charts when they come into sight. Of each line its points, which
# Plotly keeps in the element, and the widths of what is drawn. A line may be there twice, smoothed and as it is.
READ_CHART = """
const group = [...document.querySelectorAll('div')].find(d => !d.children.length && d.textContent === arguments[1]);
const title = [...document.querySelectorAll('h4')].find(h => h.title === arguments[0]);
if (!title) { group?.scrollIntoView(); return null; }
title.scrollIntoView({block: 'center'});
let card = title;
while (card && !card.querySelector('.js-plotly-plot')) card = card.parentElement;
if (!card || card.querySelectorAll('h4').length > 1) return null;
const graph = card.querySelector('.js-plotly-plot');
const widths = [...graph.querySelectorAll('svg path.js-line')].map(p => p.getBoundingClientRect().width);
if (!widths.some(width => width > 0)) return null;
const lines = {};
for (const trace of graph.data) lines[trace.name] = [Array.from(trace.x), Array.from(trace.y)];
return {lines, width: Math.max(...widths), room: graph.getBoundingClientRect().width};
"""
READ_ROWS = """
return [...document.querySelectorAll('[role=row]')].map(
    row => [...row.querySelectorAll('[role=cell],[role=columnheader]')].map(cell => cell.textContent.trim()))
"""


@pytest.fixture(scope="module")
def store():
    """Return a folder with the MLflow store of the quickstart's three runs; screenshots show its name."""
    require_browser()
    with tempfile.TemporaryDirectory(prefix="quickstart-", ignore_cleanup_errors=True) as name:
        yield fill_store(Path(name))


def fill_store(folder: Path) -> Path:
    lay_store(folder)
    run_here("quickstart", f"--rounds={ROUNDS}", f"--output={folder}")
    return folder


@pytest.fixture(scope="module")
def client(store) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client) -> dict[str, Any]:
    """Return the stored runs by name."""
    experiment = client.get_experiment_by_name("quickstart")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def address(store):
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}/mlflow.db"]
    command += ["--artifacts-destination", str(store / "mlruns"), "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with server(command, f"{url}/health", store / "server.log", MLFLOW_DISABLE_TELEMETRY="true"):
        yield url


@pytest.fixture(scope="module")
def driver(address, store):
    with chromium(store / "profile") as driver:
        yield driver


@pytest.fixture(scope="module")
def visit(driver, address, runs):
    """Return a function that opens a page below the experiment."""

    def open_page(path: str, height: int = 1450) -> None:
        resize(driver, 1400, height)
        driver.get("about:blank")  # a change after the # alone would keep the page
        driver.get(f"{address}/#/experiments/{runs['LBGM'].info.experiment_id}/{path}")
        wait_for(driver, lambda: "quickstart" in driver.execute_script("return document.body.innerText"), "experiment")

    # Newer versions begin with the menus for language models and an open assistant. What is chosen here stays.
    open_page("runs")
    driver.execute_script(
        "[...document.querySelectorAll('span')].find(s => s.textContent === 'Model training')?.click();"
        "document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')?.click();"
    )
    return open_page


@pytest.fixture
def save(driver, tmp_path):
    """Return a function that keeps a screenshot, with LBGM_SCREENSHOTS in that folder."""
    folder = Path(os.environ.get("LBGM_SCREENSHOTS") or tmp_path)

    def save(name: str) -> None:
        driver.execute_script("document.querySelector('button[data-assistant-ui]')?.remove()")  # lies on the page
        time.sleep(0.5)  # for menus that fold out
        save_screenshot(driver, folder / name)
        assert (folder / name).stat().st_size < 250_000

    return save


def read_chart(driver, metric: str) -> dict[str, Any]:
    group = metric.split("/")[0]
    return wait_for(driver, lambda: driver.execute_script(READ_CHART, metric, group), f"line in the chart {metric}")


def history(client, run, metric: str) -> list[list[float]]:
    """Return [steps, values] as the store has them."""
    points = sorted(client.get_metric_history(run.info.run_id, metric), key=lambda point: point.step)
    return [[point.step for point in points], [point.value for point in points]]


def test_every_chart_of_a_run_is_drawn_from_its_stored_values(visit, driver, save, client, runs):
    visit(f"runs/{runs['LBGM'].info.run_id}/model-metrics", height=1850)
    for group, names in CHARTS.items():
        for name in names:
            chart = read_chart(driver, f"{group}/{name}")
            assert list(chart["lines"]) == ["LBGM"]
            assert chart["lines"]["LBGM"] == history(client, runs["LBGM"], f"{group}/{name}")
            assert len(chart["lines"]["LBGM"][0]) == ROUNDS
            assert chart["width"] > chart["room"] / 2  # from the first round to the last
    text = " ".join(driver.execute_script("return document.body.innerText").split())
    assert [group for group, names in CHARTS.items() if f" {group} ({len(names)}) " not in text] == []
    read_chart(driver, "comm/downlink_bytes_total")  # scrolls up again
    save("mlflow_run.png")


def test_the_settings_of_a_run_are_shown(visit, driver, runs):
    visit(f"runs/{runs['LBGM'].info.run_id}", height=3000)
    settings = {name: value for name, value in runs["LBGM"].data.params.items() if name.startswith("federated/")}
    assert settings["federated/uplink"] == "[LookBack(threshold=0.05, granularity='model')]"

    def shown() -> dict[str, str]:
        rows = driver.execute_script(READ_ROWS)
        return {row[0]: row[1] for row in rows if len(row) == 2 and row[0].startswith("federated/")}

    wait_for(driver, shown, "row of a setting")
    assert shown() == settings


@pytest.mark.parametrize("name", ["metric_vs_uplink.png", "metric_vs_total.png", "lbp_error.png"])
def test_a_figure_of_a_run_is_shown(visit, driver, save, runs, name):
    visit(f"runs/{runs['LBGM'].info.run_id}/artifacts/figures/{name}", height=800)
    find = f"return document.querySelector('img[alt=\"figures/{name}\"]')?.naturalWidth"
    assert wait_for(driver, lambda: driver.execute_script(find), f"image figures/{name}") == 840  # 7 inches, 120 dpi
    if name == "lbp_error.png":
        tree = "return document.body.innerText.includes('metric_vs_uplink.png')"
        wait_for(driver, lambda: driver.execute_script(tree), "other figure in the folder")
        save("mlflow_artifacts.png")


def test_the_clients_table_is_shown_as_a_table(visit, driver, save, runs):
    visit(f"runs/{runs['LBGM'].info.run_id}/artifacts/federated/clients.json", height=1150)
    rows = wait_for(driver, lambda: [row for row in driver.execute_script(READ_ROWS) if len(row) == 11], "table")
    assert rows[0][:4] == ["round", "client", "decision", "lbp_error"]
    assert rows[1][:7] == ["0", "0", "refreshed", "1", "null", "2600", "2600"]  # 650 parameters in full
    save("mlflow_clients.png")


def test_the_methods_are_compared_in_one_chart(visit, driver, save, client, runs):
    visit("runs?compareRunsMode=CHART", height=1200)
    for metric in ("val/acc", "comm/savings", "comm/uplink_bytes_total"):
        lines = read_chart(driver, metric)["lines"]
        assert lines == {name: history(client, run, metric) for name, run in runs.items()}
        assert set(lines) == {"FedAvg", "LBGM", "TopK + LBGM"}
    save("mlflow_compare.png")
