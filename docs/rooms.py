"""Picture and table of the rooms of lightning_lbgm, drawn from its imports into docs/architecture.md.

``python docs/rooms.py`` writes them, ``python docs/rooms.py --check`` fails if they are out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_lbgm"
PAGE = Path(__file__).parent / "architecture.md"

ABOVE = ("flower", "strategy", "callbacks", "_compat")
"""Rooms that may import Lightning, torchmetrics, MLflow and matplotlib, top first."""

BELOW = (
    "simulation",
    "server",
    "protocol",
    "reports",
    "clients",
    "compression",
    "payloads",
    "data",
    "gradient_space",
    "figures",
    "core",
)
"""Rooms of torch, NumPy and the standard library alone, top first. A room imports only from those after it."""

ROOMS = ABOVE + BELOW


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return a package's modules, by their dotted names."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str | None:
    """Return the room of a module; None for one at the package's root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else None


def imported_names(module: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name or None) of every import in a file, within functions and ``TYPE_CHECKING`` too."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)


def module_imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return, for each module of a package, the modules of the same package that it imports."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = set()
        for source, name in imported_names(module, path):
            whole = f"{source}.{name}"
            targets.add(whole if whole in known else source)
        graph[module] = {target for target in targets if target in known and target != module}
    return graph


def room_imports(graph: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Return, for each room, the other rooms that it imports, in the order of ``ROOMS``."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, targets in graph.items():
        if (room := room_of(module)) is not None:
            found.setdefault(room, set()).update(other for t in targets if (other := room_of(t)) not in (None, room))
    return {room: [other for other in ROOMS if other in found[room]] for room in ROOMS}


def picture(imports: Mapping[str, list[str]]) -> str:
    """Return the rooms as a Mermaid flowchart; an arrow that follows from two others is left out."""
    reached: dict[str, set[str]] = {}
    for room in reversed(ROOMS):
        reached[room] = set(imports[room]).union(*(reached.get(other, ()) for other in imports[room]))
    lines = ["```mermaid", "flowchart TD"]
    for name, title, rooms in (
        ("above", "with Lightning", ABOVE),
        ("below", "torch, NumPy and the standard library", BELOW),
    ):
        lines += [f'  subgraph {name}["{title}"]', *(f'    {_node(room)}["{room}"]' for room in rooms), "  end"]
    for room in ROOMS:
        through = set().union(*(reached[other] for other in imports[room]))
        lines += [f"  {_node(room)} --> {_node(other)}" for other in imports[room] if other not in through]
    return "\n".join([*lines, "```"])


def table(imports: Mapping[str, list[str]]) -> str:
    """Return a row for each room: what it is, from its docstring, and all rooms that it imports."""
    lines = ["| room | what it is | imports |", "| --- | --- | --- |"]
    for room in ROOMS:
        docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        summary = docstring.split("\n\n")[0].replace("\n", " ").replace("``", "`")
        lines.append(f"| `{room}` | {summary} | {', '.join(imports[room])} |")
    return "\n".join(lines)


def _node(room: str) -> str:
    return f"room_{room.strip('_')}"


def updated(page: str) -> str:
    """Return a page with its picture and table drawn anew."""
    imports = room_imports(module_imports())
    for name, drawn in (("picture", picture(imports)), ("table", table(imports))):
        begin, end = f"<!-- rooms {name}: begin -->", f"<!-- rooms {name}: end -->"
        replacement = f"{begin}\n{drawn}\n{end}"
        page, count = re.subn(f"{begin}.*?{end}", lambda _, new=replacement: new, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"The page has `{begin}` ... `{end}` {count} times instead of once.")
    return page


def main(arguments: list[str]) -> str | None:
    """Write the page, or compare it; return an error for the shell."""
    if arguments not in ([], ["--check"]):
        return f"Unknown arguments {arguments}: use `python docs/rooms.py` or `python docs/rooms.py --check`."
    page = PAGE.read_text()
    if arguments:
        return None if updated(page) == page else f"{PAGE} is out of date: run `python docs/rooms.py`."
    PAGE.write_text(updated(page))
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
