"""The rooms of the package: what each may import, how long a file may be, and the picture of them in the docs."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 300
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
HEAVY = {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics", "mlflow", "matplotlib"}

spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
rooms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rooms)

MODULES = rooms.modules()

LOADED = """
import importlib, json, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("room", rooms.BELOW)
def test_a_room_below_the_bar_loads_without_what_is_above_it(room):
    names = [name for name in MODULES if rooms.room_of(name) == room]
    assert f"lightning_lbgm.{room}" in names
    out = subprocess.run(
        [sys.executable, "-c", LOADED, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert HEAVY & set(json.loads(out.stdout)) == set()


def test_rooms_below_the_bar_name_only_torch_numpy_and_the_standard_library():
    allowed = {"lightning_lbgm", "torch", "numpy", *sys.stdlib_module_names}
    wrong = []
    for module, path in MODULES.items():
        room = rooms.room_of(module)
        if room in rooms.BELOW:
            also = {"matplotlib"} if room == "figures" else set()  # within functions: the test above sees any other
            names = {source.partition(".")[0] for source, _ in rooms.imported_names(module, path)}
            wrong += [f"{module} imports {name}" for name in sorted(names - allowed - also)]
    assert wrong == []


def test_every_folder_has_its_place_in_the_order_of_rooms():
    folders = {path.name for path in rooms.PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(rooms.ROOMS)
    assert len(set(rooms.ROOMS)) == len(rooms.ROOMS)


def test_imports_go_down_only():
    upward = []
    for module, path in MODULES.items():
        room = rooms.room_of(module)
        if room is None:
            continue
        for source, name in rooms.imported_names(module, path):
            if source.partition(".")[0] != "lightning_lbgm":
                continue
            # `from lightning_lbgm import TopK` goes through the root, which is above all rooms.
            whole = f"{source}.{name}"
            other = rooms.room_of(whole if source == "lightning_lbgm" else source)
            if other not in rooms.ROOMS or rooms.ROOMS.index(other) < rooms.ROOMS.index(room):
                upward.append(f"{module} imports {whole}")
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    graph = rooms.module_imports()
    assert sum(map(len, graph.values())) > 300  # it sees the package
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_file_is_too_long_to_read():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > MAX_LINES} == {}


def private_lightning_names(module, path):
    """Yield the names with an underscore that a file takes from Lightning: imports, and attributes of a Trainer."""
    for source, name in rooms.imported_names(module, path):
        parts = [*source.split("."), *([name] if name else [])]
        if parts[0] in LIGHTNING and any(part.startswith("_") and not part.startswith("__") for part in parts):
            yield ".".join(parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.split(".")[-1].endswith(("trainer", "loop", "connector")):
                yield f"{owner}.{node.attr}"


def test_private_names_of_lightning_are_in_the_compat_room_alone():
    found = {module: [*private_lightning_names(module, path)] for module, path in MODULES.items()}
    outside = {module: names for module, names in found.items() if names and rooms.room_of(module) != "_compat"}
    assert outside == {}
    assert "trainer._accelerator_connector" in found["lightning_lbgm._compat.processes"]  # it sees them


def test_the_picture_of_the_rooms_is_up_to_date():
    page, picture = rooms.PAGE.read_text(), rooms.PICTURE.read_text()
    imports = rooms.room_imports(rooms.module_imports())
    assert rooms.updated(page) == page, "run `python docs/rooms.py`"
    assert rooms.picture(imports) == picture, "run `python docs/rooms.py`"
    assert all(f">{room}</text>" in picture for room in rooms.ROOMS)
    assert picture.count("l4 7l4 -7") == len(rooms.arrows(imports))  # an arrow's head each


def test_an_arrow_that_follows_from_two_others_is_left_out_and_rows_go_down():
    imports = {room: [] for room in rooms.ROOMS}
    imports |= {"strategy": ["server", "core"], "server": ["core"], "callbacks": ["_compat"]}
    edges = rooms.arrows(imports)
    assert edges == [("strategy", "server"), ("callbacks", "_compat"), ("server", "core")]
    row = rooms.rows(edges)
    assert (row["strategy"], row["callbacks"], row["_compat"]) == (0, 0, 1)
    assert (row["server"], row["core"]) == (2, 3)  # below the bar


def test_the_architecture_page_names_files_that_exist():
    names = set(re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", rooms.PAGE.read_text()))
    assert "data/rounds.py" in names
    assert {name for name in names if not (rooms.PACKAGE / name).exists() and not (ROOT / name).exists()} == set()
