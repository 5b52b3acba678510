"""The notebook runs, comes to the outputs that are committed, and becomes a page of the site."""

from __future__ import annotations

import base64
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOK = FOLDER / "first_federation.ipynb"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def load(name):
    """Import a script of the notebooks' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in cell.outputs)


def numbers_in(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def words_in(text):
    return NUMBER.sub("0", text).split()


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_it_runs_and_comes_to_what_is_committed(committed, tmp_path):
    executed = load("run").execute(NOTEBOOK, tmp_path)
    said = {}
    for cell, before in zip(code_cells(executed), code_cells(committed)):
        kinds = [[sorted(output.get("data", [output.get("name")])) for output in c.outputs] for c in (cell, before)]
        assert kinds[0] == kinds[1], f"other outputs of\n{cell.source}\n{text_of(cell)}"
        said[cell.source] = text = text_of(cell)
        if "varies" in cell.metadata.get("tags", ()):
            continue
        assert words_in(text) == words_in(text_of(before))
        # Other processors round otherwise, which a look-back test near the threshold magnifies.
        assert numbers_in(text) == pytest.approx(numbers_in(text_of(before)), rel=0.05, abs=0.02)

    (resume,) = (text for text in said.values() if "resumed" in text)
    unbroken, resumed = map(numbers_in, resume.splitlines())
    assert unbroken == resumed
    (table,) = (text for source, text in said.items() if "pd.DataFrame" in source)
    rows = {line.rsplit(maxsplit=5)[0]: numbers_in(line) for line in table.splitlines()[1:]}
    assert rows["Ternary, both ways"][-1] < 5 < rows["LBGM"][-1] < 60 < rows["FedAvg"][-1] == 100
    assert min(accuracy for accuracy, *_ in rows.values()) > 0.88


def test_what_is_committed_was_run_in_order_and_is_small(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    streams = {output.get("name") for cell in cells for output in cell.outputs if output.output_type == "stream"}
    assert streams == {"stdout"}  # no warnings
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 400_000


def test_a_notebook_becomes_a_page():
    v4 = nbformat.v4
    style = "<style scoped>\n  a {}\n\n</style>"
    table = f'<div>\n{style}\n<table border="1" class="dataframe">\n\n  <tr style="x"><td>1</td></tr>\n</table>\n</div>'
    outputs = [
        v4.new_output("stream", text="accuracy 0.9\n"),
        v4.new_output("display_data", {"image/png": base64.b64encode(b"picture").decode(), "text/plain": "<Figure>"}),
        v4.new_output("execute_result", {"text/html": table, "text/plain": "1"}),
        v4.new_output("execute_result", {"text/plain": "3"}),
    ]
    cells = [v4.new_markdown_cell("# Title\n\n[a](../a.md)"), v4.new_code_cell("x = 1\nx", outputs=outputs)]
    markdown, pictures = load("page").to_markdown(v4.new_notebook(cells=cells), "first")
    assert markdown.split("\n\n") == [
        "# Title",
        "[a](../a.md)",
        "```python\nx = 1\nx\n```",
        "```text\naccuracy 0.9\n```",
        "![Output of the code above](first_1.png)",
        "<div>\n<table>\n<tr><td>1</td></tr>\n</table>\n</div>",
        "```text\n3\n```\n",
    ]
    assert pictures == {"first_1.png": b"picture"}
