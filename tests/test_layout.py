"""Imports point down the house, and training imports no foreign framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "easyanimate_jax"
ROWS = [
    {"facts"},
    {"diffusion", "storage", "sharding", "memory", "processes"},
    {"models"},
    {"weights"},
    {"data", "text"},
    {"training", "generation", "prepare", "evaluation"},
    {"runs"},
    {"pods", "serving"},
    {"commands"},
    {"__main__"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))
ABOVE = ("demos", "benchmarks", "configs", "tests", "train", "sample")  # no room imports these


def imports(path: Path) -> list[str]:
    """Every module that a file names in an import, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "easyanimate_jax":
            names += [f"easyanimate_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names.append(node.module)
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_row():
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(ROW)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    for name in imports(path):
        assert name.split(".")[0] not in ABOVE, f"{room} imports {name}"
        if name.startswith("easyanimate_jax.") and room != "__init__":
            other = name.split(".")[1]
            assert other == room or ROW[other] < ROW[room], f"{room} imports {name}"


def test_the_root_holds_four_modules_at_most():
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(modules) <= 4, modules


def loaded(statement: str, *names: str) -> list[str]:
    """Those of `names` that a fresh Python has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*[n for n in {names!r} if n in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ran.stdout.split()


def test_importing_the_loop_loads_no_foreign_framework_and_no_upper_room():
    upper = ("easyanimate_jax.pods", "easyanimate_jax.commands", "demos")
    foreign = ("torch", "transformers", "tensorflow")
    assert loaded("import easyanimate_jax.runs.loop", *upper, *foreign) == []


def test_conversion_loads_no_foreign_framework():
    statement = "import easyanimate_jax.commands.convert"
    assert loaded(statement, "torch", "transformers", "tensorflow") == []


def test_importing_the_package_loads_no_jax():
    assert loaded("import easyanimate_jax", "jax", "numpy") == []
