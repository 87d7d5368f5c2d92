"""Draw the rooms and the imports between them: ``python tools/layout_picture.py`` writes docs/layout.svg."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "layout.svg"
WINGS = {
    "ground": ("#e8e8e8", ["core"]),
    "matter": ("#cfe3f5", ["models", "data", "transport"]),
    "measure": ("#d5efd8", ["activations", "analysis", "edits", "audit"]),
    "change": ("#fbe3c8", ["training", "ablation", "defences"]),
    "example": ("#f6d6e6", ["organism", "experiments"]),
    "face": ("#e2d9f3", ["study", "figures", "cli"]),
}
WIDTH, ROW, BOX, HEIGHT = 900, 78, 124, 34


def floors() -> list[list[str]]:
    """Rooms by floor, the highest first, as the import contract of pyproject.toml lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def imports(room: str) -> set[str]:
    """Other rooms that the modules of a room import, at their head or inside a function."""
    names = {name for file in sorted((ROOT / "replib" / room).rglob("*.py")) for name in _imported(file)}
    return names - {room}


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "replib":
            yield from (alias.name for alias in node.names if (ROOT / "replib" / alias.name).is_dir())
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("replib."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("replib."))


def picture() -> str:
    """SVG: a row a floor, a colour a wing, a line an import; lines lead downwards only."""
    places = {
        room: (WIDTH * (2 * i + 1) / (2 * len(rooms)), 30 + ROW * row)
        for row, rooms in enumerate(floors())
        for i, room in enumerate(rooms)
    }
    height = 30 + ROW * len(floors()) + 24
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">']
    parts += [f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    parts += [_line(*places[room], *places[lower]) for room in places for lower in sorted(imports(room))]
    parts += [_box(room, *place) for room, place in places.items()]
    parts += [_legend(i, wing, colour, height) for i, (wing, (colour, _)) in enumerate(WINGS.items())]
    return "\n".join([*parts, "</svg>\n"])


def _line(x: float, y: float, lower_x: float, lower_y: float) -> str:
    return (
        f'<line x1="{x:.0f}" y1="{y + HEIGHT:.0f}" x2="{lower_x:.0f}" y2="{lower_y:.0f}" '
        'stroke="#777" stroke-opacity="0.45"/>'
    )


def _box(room: str, x: float, y: float) -> str:
    colour = next(colour for colour, rooms in WINGS.values() if room in rooms)
    corner = f'x="{x - BOX / 2:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="6"'
    shape = f'<rect {corner} fill="{colour}" stroke="#555"/>'
    return f'{shape}<text x="{x:.0f}" y="{y + 22:.0f}" font-size="15" text-anchor="middle">{room}</text>'


def _legend(number: int, wing: str, colour: str, height: int) -> str:
    x = 20 + 145 * number
    square = f'<rect x="{x}" y="{height - 24}" width="14" height="14" fill="{colour}" stroke="#555"/>'
    return f'{square}<text x="{x + 20}" y="{height - 12}" font-size="13">{wing}</text>'


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
