"""MkDocs hook: each notebook becomes a page of the site, with its committed outputs.

It is made into Markdown, so that links are checked, headings are listed and the site's
style applies as on other pages.
"""

from __future__ import annotations

import base64
import re
from pathlib import PurePosixPath

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and its pictures for each notebook, and a link to the notebook."""
    for file in list(files):
        path = PurePosixPath(file.src_uri)
        if path.suffix == ".ipynb":
            markdown, pictures = to_markdown(
                nbformat.reads(file.content_string, as_version=4), path.stem
            )
            markdown += f"\n[This page as a notebook]({path.name})\n"
            files.append(
                File.generated(config, str(path.with_suffix(".md")), content=markdown)
            )
            for name, content in pictures.items():
                files.append(
                    File.generated(config, str(path.parent / name), content=content)
                )
    return files


def to_markdown(
    notebook: nbformat.NotebookNode, name: str
) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures as PNG by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the code above]({picture})")
            elif "text/html" in data:
                parts.append(_plain_table(data["text/html"]))
            else:
                text = output.get("text") or data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _plain_table(html: str) -> str:
    """Return a table of pandas without its own style, for that of the site."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r"<(table|tr)[^>]*>", r"<\1>", html)
    lines = (line.strip() for line in html.splitlines())
    return "\n".join(line for line in lines if line)  # an empty one would end the HTML
