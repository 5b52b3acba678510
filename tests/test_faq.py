"""The messages that docs/faq.md explains are in the package, word for word."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "faq.md").read_text()
OURS = PAGE.split("## Of other packages")[0]
HEADINGS = [line for line in re.findall(r"^### (.+)$", OURS, re.MULTILINE) if not line.endswith("?")]
HOLE = "\0"


def texts():
    """Return all strings of the package; what an f-string puts in is a hole."""
    found = []
    for path in (ROOT / "lightning_lbgm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()


def pattern(heading):
    """Match a heading's words at a text's start (after a hole, anywhere), each of its ellipses a hole with anything."""
    anywhere = heading.startswith("…")
    words = [re.escape(part.strip(" ") if part.strip(" ") else "") for part in heading.split("…")]
    return re.compile(("" if anywhere else "^") + ".*".join(words).replace("\\ ", " "), re.DOTALL)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_quoted_message_is_in_the_source(heading):
    assert any(pattern(heading).search(text) for text in TEXTS), heading


def test_there_is_an_answer_to_each():
    assert len(HEADINGS) >= 25
    assert len(set(HEADINGS)) == len(HEADINGS)
    answers = re.split(r"^### .+$", PAGE, flags=re.MULTILINE)[1:]
    assert all(len(re.split(r"^## ", answer, flags=re.MULTILINE)[0].strip()) > 60 for answer in answers)
