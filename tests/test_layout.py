"""Imports point down the house, and training imports no foreign framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "easyanimate_jax"
ROWS = [
    {"sharding", "pod", "memory"},
    {"tensors"},
    {"models", "diffusion", "data"},
    {"text", "denoising"},
    {"training", "prepare", "pipelines", "sampling"},
    {"evaluation"},
    {"config"},
    {"convert"},
    {"aot", "batches"},
    {"trainer", "describe", "runs", "doctor"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name == "easyanimate_jax" and isinstance(node, ast.ImportFrom):
                names += [f"easyanimate_jax.{a.name}" for a in node.names]
            elif name and name.startswith("easyanimate_jax."):
                other = name.split(".")[1]
                assert other == room or ROW[other] < ROW[room], f"{room} imports {name}"


@pytest.mark.parametrize("module", ["trainer", "convert", "convert.__main__"])
def test_importing_training_imports_no_foreign_framework(module):
    code = (
        f"import sys, easyanimate_jax.{module}; "
        "print([m for m in ('torch', 'transformers', 'tensorflow') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
