"""What is imported is declared in pyproject.toml, and nothing but what is imported."""

from __future__ import annotations

import ast
import functools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"lightning_lbgm", "benchmarks", "recipes", "digits", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
TOOLS = {  # run, not imported
    *("build", "ipykernel", "mkdocs_material", "mkdocstrings", "mypy", "nbclient", "pytest_xdist", "ruff", "rich")
}


@functools.cache
def imported(folder):
    """Return the first part of every module that a folder imports, also within functions, and a file that does."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found[node.module.split(".")[0]] = path
    return found


providers_of_modules = functools.cache(packages_distributions)  # reads the metadata of all that is installed


def normalized(name):
    return re.sub("[-_.]+", "_", name).lower()


def declared(*extras):
    """Return the distributions that pyproject.toml names, with those of extras."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {normalized(re.match(r"[\w.-]+", line).group()) for line in lines}


def distributions(folder):
    """Return the distributions that a folder's files import: name to a file that does."""
    providers = providers_of_modules()
    found = {}
    for module, path in imported(folder).items():
        if module not in sys.stdlib_module_names and module not in OWN:
            names = {normalized(name) for name in providers.get(module, [module])}
            # mlflow and its smaller halves come together; the one named like the module is meant.
            found[module.lower() if module.lower() in names else min(names)] = path.name
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("lightning_lbgm", ("flower",)),
        ("recipes", ("cli", "flower", "llm", "ray", "tuning")),
        ("benchmarks", ("cli",)),
        ("tests", ("cli", "dev", "flower", "llm", "tuning")),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    missing = {name: path for name, path in distributions(folder).items() if name not in declared(*extras)}
    assert not missing


def test_what_is_declared_is_imported():
    # But for MLflow, which Lightning's logger imports, and two that must match torch and Lightning.
    needed = set(distributions("lightning_lbgm")) | {"mlflow", "torchmetrics", "torchvision"}
    assert declared() <= needed
    everything = needed | {n for folder in ("recipes", "benchmarks", "tests") for n in distributions(folder)}
    assert declared("cli", "dev", "flower", "llm", "ray", "tuning") - everything <= TOOLS | {
        "lightning_lbgm",
        "jsonargparse",
    }
