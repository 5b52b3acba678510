"""Every Python block of the documentation runs, a page's blocks in order and in one namespace."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import mlflow
import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if "```python" in path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracking_uri = mlflow.get_tracking_uri()
    namespace = {"__name__": page.stem}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    try:
        for block in blocks:
            exec(compile(textwrap.dedent(block), page.name, "exec"), namespace)
    finally:
        mlflow.set_tracking_uri(tracking_uri)  # an MLFlowLogger sets it for the whole process


def test_every_public_name_is_in_the_reference():
    import lightning_lbgm

    reference = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    names = [name for name in lightning_lbgm.__all__ if not name.startswith("__")]
    assert [name for name in names if f"::: lightning_lbgm.{name}\n" not in reference] == []


def test_the_metrics_page_lists_what_is_logged():
    from lightning_lbgm import LookBack
    from lightning_lbgm.callbacks.advice import Advice
    from lightning_lbgm.callbacks.communication import round_metrics
    from lightning_lbgm.compression import Decision, as_chain
    from lightning_lbgm.network import RoundTime
    from lightning_lbgm.reports.ledger import Ledger
    from lightning_lbgm.reports.reports import Broadcast, RoundReport

    advice = Advice()
    advice.begin(as_chain(LookBack()), {"clients_per_round": 1, "num_clients": 2}, anew=True)
    broadcast = Broadcast(decision=Decision((True,), (0.1,), (1.0,)))
    report = RoundReport(0, (), 0.0, broadcast=broadcast, num_available=1, time=RoundTime(()))
    of_nodes = {"comm/evaluation_bytes", "fl/evaluated_clients"}  # tests/flower sees them logged
    logged = {*round_metrics(report, Ledger()), *advice.observe(report), *of_nodes}
    listed = set(re.findall(r"^\| `((?:comm|lbgm|fl|time)/\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    assert logged == listed
