"""The house: rooms that say what they hold, floors without a circle, files that can be found by name."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("models", "rotation", "boa", "export", "eval", "pipeline")
# Rooms from the ground up: a room imports from itself and from those before it.
FLOORS = [
    ["models", "rotation"],
    ["boa", "boa/kernels", "boa/online", "boa/objective", "boa/solver", "boa/block"],
    ["export", "export/runtime", "export/ggml", "export/formats", "export/runtimes"],
    ["eval", "eval/drawing"],
    ["pipeline/recipe", "pipeline/storage", "pipeline/ranks", "pipeline/console", "pipeline/job", "pipeline/rotating"],
    ["pipeline/estimate", "pipeline/measure", "pipeline/budget", "pipeline", "pipeline/cli"],
]
ROOMS = [room for floor in FLOORS for room in floor]
MOST_FILES = 16
MOST_LINES = 300


def product_files() -> list[Path]:
    return [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]


def room_of(path: Path) -> str:
    folder = path.relative_to(ROOT).parent.as_posix()
    return "models" if folder.startswith("models/") else folder


def imports(file: Path) -> set[Path]:
    """Files of this package that `file` imports at once: not those for types, nor those inside functions."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1] / "/".join((node.module or "").split("."))
            for name in [base, *(base / alias.name for alias in node.names)]:
                if name.with_suffix(".py").is_file() and ROOT in name.parents:
                    found.add(name.with_suffix(".py"))
    return {path for path in found if path.parent != ROOT}


def test_packages_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {file.parent for file in product_files()} | {ROOT / "recipes"}
    data = {file.parent for file in (ROOT / "models").rglob("*.yaml")}
    expected = {".".join(["rotoboa", *folder.relative_to(ROOT).parts]) for folder in folders | data}
    assert set(listed) == expected | {"rotoboa"}


def test_no_two_files_of_one_name() -> None:
    files = [*product_files(), *(ROOT / "tests").rglob("*.py")]
    names = Counter(file.name for file in files if file.name not in ("__init__.py", "conftest.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_an_init_hides_nothing() -> None:
    for file in product_files():
        if file.name == "__init__.py":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), file


def test_every_room_has_its_floor() -> None:
    assert {room_of(file) for file in product_files() if file.name != "__init__.py"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_do_not_go_up(room: str) -> None:
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    for file in product_files():
        if room_of(file) == room:
            assert {path.as_posix() for path in imports(file) if room_of(path) in above} == set(), file


def test_no_room_is_full() -> None:
    rooms = Counter(file.parent for file in product_files() if file.name != "__init__.py")
    rooms += Counter(file.parent for file in (ROOT / "tests").rglob("*.py"))
    assert {str(room): count for room, count in rooms.items() if count > MOST_FILES} == {}


def test_no_file_is_two() -> None:
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in product_files()}
    assert {str(file): count for file, count in lines.items() if count > MOST_LINES} == {}


def test_floors_follow_the_order_of_the_parts() -> None:
    firsts = [ROOMS.index(next(room for room in ROOMS if room.startswith(part))) for part in PARTS]
    assert all(a < b for a, b in pairwise(firsts))
