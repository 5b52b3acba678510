"""The make targets of the contributors' guide, CI and pre-commit exist; forms and citation are well-formed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_the_make_targets_of_the_guide_exist():
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", (ROOT / "docs" / "contributing.md").read_text(), re.MULTILINE))
    assert {"test", "lint", "fuzz"} <= named <= TARGETS


def test_ci_runs_the_make_targets_on_the_oldest_and_the_newest_python():
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    rows = {(row["python"], row["target"]) for row in job["strategy"]["matrix"]["include"]}
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project).group(1)  # without an upper bound
    assert rows == {(oldest, "test"), (oldest, "test-oldest"), ("3", "test")}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make browser", "make ${{ matrix.target }}"]
    assert {target for _, target in rows} | {"browser"} <= TARGETS


def test_pre_commit_runs_the_same_commands_as_make_test():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # no versions of their own
    commands = {hook["entry"] for hook in repository["hooks"]}
    assert commands == {"make lint", "make types"}
    assert {"lint", "types"} <= TARGETS
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repository["hooks"])


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_have_what_github_asks_for(form):
    content = load(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in content["body"])
    assert any(field.get("validations", {}).get("required") for field in content["body"])


def test_the_citation_names_the_software_and_the_paper():
    citation = load("CITATION.cff")
    assert str(citation["cff-version"]) == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["type"] == "software"
    assert citation["license"] in (ROOT / "pyproject.toml").read_text()
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "2202.00280" in paper["url"]
