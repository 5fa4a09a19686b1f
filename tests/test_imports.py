"""The walls of the house: a room imports only rooms below it, files import each other in no circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

FLOORS = (
    ("misc",),
    ("text_utils", "misc.pedestrians", "misc.system"),
    ("model",),
    ("model.pretrained", "misc.data"),
    ("misc.run", "misc.config"),
    ("misc.retrieval", "misc.training"),
    ("misc.study", "misc.builders"),
    ("misc.commands", "misc.search"),
    ("main", "search", "benchmarks", "image"),
)
"""Rooms by floor, from the ground up. `misc` means the files directly in that folder."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def product_files(root: Path) -> list[Path]:
    """The Python files of the project except its tests, relative to its root."""
    tops = {room.partition(".")[0] for room in FLOOR_OF}
    return sorted(
        path.relative_to(root)
        for top in tops
        for path in ([root / f"{top}.py"] if (root / f"{top}.py").is_file() else (root / top).rglob("*.py"))
    )


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room that a module is in; None for a module of another project. The longest name counts."""
    names = [room for room in FLOOR_OF if module == room or module.startswith(f"{room}.")]
    return max(names, key=len, default=None)


def imported_modules(root: Path, path: Path) -> Iterator[str]:
    """The project's own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(root, name) else node.module for name in submodules]
        else:
            continue
        yield from (name for name in names if room_of(name) is not None)


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def upward_imports(root: Path) -> list[str]:
    """Imports between rooms that do not lead to a lower floor, in words."""
    problems = []
    for path in product_files(root):
        own = room_of(module_name(path))
        for name in imported_modules(root, path):
            other = room_of(name)
            if other != own and FLOOR_OF[other] >= FLOOR_OF[own]:
                problems.append(f"{path} ({own}) imports {name} ({other}), which is not on a lower floor")
    return problems


def circle_of_files(root: Path) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    graph = {module_name(path): set(imported_modules(root, path)) for path in product_files(root)}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_room_imports_upwards():
    assert upward_imports(ROOT) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle_of_files(ROOT) == []


def test_every_file_is_in_a_room_that_has_a_docstring():
    rooms = {room_of(module_name(path)) for path in product_files(ROOT)}
    assert rooms == FLOOR_OF.keys()
    packages = [ROOT.joinpath(*room.split("."), "__init__.py") for room in rooms]
    without = [path for path in packages if path.is_file() and not ast.get_docstring(ast.parse(path.read_text()))]
    assert without == []


@pytest.mark.parametrize(
    ("path", "line", "problem"),
    [
        ("misc/files.py", "from misc.builders import run", "misc.builders"),
        ("model/losses.py", "import misc.data.views", "misc.data.views"),
        ("misc/search/engine.py", "from misc.commands.evaluate import evaluate", "misc.commands.evaluate"),
    ],
)
def test_an_upward_import_is_found(tmp_path, path, line, problem):
    for number, room in enumerate(FLOOR_OF):
        folder = tmp_path.joinpath(*room.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(f'"""{number}"""\n')
    for module in ("misc/builders/run.py", "misc/data/views.py", "misc/commands/evaluate.py", path):
        (tmp_path / module).write_text("")
    assert upward_imports(tmp_path) == []
    (tmp_path / path).write_text(f"def later():\n    {line}\n")
    (found,) = upward_imports(tmp_path)
    assert problem in found and path in found


def test_a_circle_of_files_is_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "losses.py").write_text("from model import heads\n")
    (tmp_path / "model" / "heads.py").write_text("from model.losses import nothing\n")
    (tmp_path / "model" / "__init__.py").write_text("")
    assert {"model.losses", "model.heads"} <= set(circle_of_files(tmp_path))
