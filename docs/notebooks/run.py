"""Execute the notebooks of this folder afresh and save them with their outputs.

``python docs/notebooks/run.py`` takes them all, or name some.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a fresh kernel that works in ``folder``.

    Args:
        path: The notebook.
        folder: Where its cells write files.

    Raises:
        CellExecutionError: If a cell raises an error.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=600, resources=resources, record_timing=False
    ).execute()
    notebook.metadata.pop("language_info", None)  # has the version of Python
    return notebook


def main() -> None:
    """Execute and save the notebooks that are named, or all."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, folder), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
