"""Picture and table of the rooms of lightning_lbgm, drawn from its imports, for docs/architecture.md.

``python docs/rooms.py`` writes them, ``python docs/rooms.py --check`` fails if they are out of date.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_lbgm"
PAGE = Path(__file__).parent / "architecture.md"
PICTURE = Path(__file__).parent / "images" / "rooms.svg"

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
    "network",
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


def arrows(imports: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Return what imports what; an arrow that follows from two others is left out."""
    reached: dict[str, set[str]] = {}
    for room in reversed(ROOMS):
        reached[room] = set(imports[room]).union(*(reached.get(other, ()) for other in imports[room]))
    found = []
    for room in ROOMS:
        through = set().union(*(reached[other] for other in imports[room]))
        found += [(room, other) for other in imports[room] if other not in through]
    return found


def rows(edges: list[tuple[str, str]]) -> dict[str, int]:
    """Return the row of each room: below all that import it, and those without Lightning below all with it."""
    found: dict[str, int] = {}
    for room in ROOMS:  # top first
        above = [found[source] + 1 for source, target in edges if target == room]
        found[room] = max([0, *above, *([1 + max(found[one] for one in ABOVE)] if room in BELOW else [])])
    return found


def places(edges: list[tuple[str, str]], row: Mapping[str, int]) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Return where in its row everything stands, and what each arrow passes: a place of its own in each row between.

    Rows are ordered by the mean place of the neighbours, up and down in turn, which leaves few arrows to cross.
    """
    level, passed, links = dict(row), {}, []
    for source, target in edges:
        between = [f"{source} {target} {number}" for number in range(row[source] + 1, row[target])]
        level |= {name: row[source] + 1 + number for number, name in enumerate(between)}
        passed[f"{source} {target}"] = path = [source, *between, target]
        links += list(itertools.pairwise(path))
    lines = [[name for name in level if level[name] == number] for number in range(max(level.values()) + 1)]
    place = {}
    for sweep in range(24):
        for line in lines if sweep % 2 else lines[::-1]:
            near = {
                name: [place[one] for link in links if name in link for one in link if one != name and one in place]
                for name in line
            }
            line.sort(key=lambda name: sum(near[name]) / len(near[name]) if near[name] else 0.0)
            place |= {name: number - (len(line) - 1) / 2 for number, name in enumerate(line)}
    return place, passed


def picture(imports: Mapping[str, list[str]]) -> str:
    """Return the rooms as an SVG, in colours for light and for dark pages."""
    edges = arrows(imports)
    row = rows(edges)
    place, passed = places(edges, row)
    left, bar = min(place.values()), max(row[room] for room in ABOVE) + 0.5

    def point(name: str, number: int) -> tuple[float, float]:
        return 64 + 120 * (place[name] - left), 27 + 74 * number + (34 if number > bar else 0)

    width, height = 320 + 120 * (max(place.values()) - left), 54 + 74 * max(row.values()) + 34
    line = 27 + 74 * bar + 17
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">',
        '<g fill="none" stroke="#8a90a0" stroke-width="1.6">',
    ]
    for names in passed.values():
        points = [point(name, row[names[0]] + number) for number, name in enumerate(names)]
        points[0], points[-1] = (points[0][0], points[0][1] + 17), (points[-1][0], points[-1][1] - 22)
        curve = [f"M{points[0][0]:g} {points[0][1]:g}"]
        for (x, y), (to_x, to_y) in itertools.pairwise(points):
            middle = (y + to_y) / 2
            curve.append(f"C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}")
        x, y = points[-1]
        parts.append(f'<path d="{" ".join(curve)}"/><path d="M{x - 4:g} {y - 3:g}l4 7l4 -7"/>')
    parts += [
        f'<path d="M0 {line:g}H{width:g}" stroke-dasharray="6 5"/></g>',
        '<g fill="#8a90a0" font-size="12">',
        f'<text x="{width:g}" y="{line - 8:g}" text-anchor="end">with Lightning</text>',
        f'<text x="{width:g}" y="{line + 18:g}" text-anchor="end">torch, NumPy, standard library</text></g>',
        '<g font-size="13" text-anchor="middle">',
    ]
    for room in ROOMS:
        x, y = point(room, row[room])
        parts.append(f'<rect x="{x - 54:g}" y="{y - 17:g}" width="108" height="34" rx="5" fill="#4051b5"/>')
        parts.append(f'<text x="{x:g}" y="{y + 4.5:g}" fill="#ffffff">{room}</text>')
    return "\n".join([*parts, "</g></svg>", ""])


def table(imports: Mapping[str, list[str]]) -> str:
    """Return a row for each room: what it is, from its docstring, and all rooms that it imports."""
    lines = ["| room | what it is | imports |", "| --- | --- | --- |"]
    for room in ROOMS:
        docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        summary = docstring.split("\n\n")[0].replace("\n", " ").replace("``", "`")
        lines.append(f"| `{room}` | {summary} | {', '.join(imports[room])} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """Return a page with its table drawn anew."""
    begin, end = "<!-- rooms table: begin -->", "<!-- rooms table: end -->"
    replacement = f"{begin}\n{table(room_imports(module_imports()))}\n{end}"
    page, count = re.subn(f"{begin}.*?{end}", lambda _: replacement, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"The page has `{begin}` ... `{end}` {count} times instead of once.")
    return page


def main(arguments: list[str]) -> str | None:
    """Write the page, or compare it; return an error for the shell."""
    if arguments not in ([], ["--check"]):
        return f"Unknown arguments {arguments}: use `python docs/rooms.py` or `python docs/rooms.py --check`."
    drawn = {PAGE: updated(PAGE.read_text()), PICTURE: picture(room_imports(module_imports()))}
    for path, text in drawn.items():
        if not arguments:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            return f"{path} is out of date: run `python docs/rooms.py`."
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
