"""Every Python block of the documentation runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import mlflow
import pytest

DOCS = Path(__file__).parent.parent / "docs"
# A block that cannot run alone has the info string `python {notest}`; a `text` block right after a block is its output.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def python_blocks(page: str) -> list[tuple[int, str, str | None]]:
    """Return the blocks of a page: first line in the file, code, and what it prints where the page says so."""
    text = (DOCS / page).read_text()
    return [(text.count("\n", 0, m.start(1)), m[1], m[2]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
@pytest.mark.filterwarnings("ignore")
def test_the_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracking_uri = mlflow.get_tracking_uri()
    namespace = {"__name__": "__main__"}
    try:
        for line, code, expected in python_blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + code, str(DOCS / page), "exec"), namespace)
            if expected is not None:
                assert printed.getvalue() == expected, f"{page}, line {line}"
    finally:
        mlflow.set_tracking_uri(tracking_uri)  # MLFlowLogger sets it for the whole process


def test_no_block_is_overlooked():
    fences = re.compile(r"^```(\S*)(.*)$", re.MULTILINE)
    for page in PAGES:
        text = (DOCS / page).read_text()
        opened = [m for i, m in enumerate(fences.finditer(text)) if i % 2 == 0]
        strange = [m[0] for m in opened if m[1].startswith("py") and m[0] not in ("```python", "```python {notest}")]
        assert not strange, page
        assert all(m[1] for m in opened), f"{page}: a block without a language"
        assert sum(m[0] == "```python" for m in opened) == len(python_blocks(page))


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w/-]+\.md", (DOCS.parent / "mkdocs.yml").read_text())
    assert sorted(named) == PAGES


def test_the_metrics_page_lists_what_is_logged():
    from lightning_lbgm.callback import _client_rows, round_metrics
    from lightning_lbgm.ledger import ClientReport, Ledger, RoundReport

    client = ClientReport(0, 1, 1, 0.5, 1.0, 32, 32, 32)
    report = RoundReport(0, (client,), 1.0)
    names = [*round_metrics(report, Ledger()), *next(iter(_client_rows(report)))]
    rows = re.findall(r"^\| `([\w/]+)` \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    assert rows == names
