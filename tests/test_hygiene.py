"""The source, read as text: no bare prints, no hidden state, and nothing too long to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path.relative_to(ROOT)
    for place in ("easyanimate_jax", "demos", "benchmarks", "configs", "docs")
    for path in (ROOT / place).rglob("*.py")
) + [Path(name) for name in ("train.py", "sample.py", "setup.py")]
PACKAGE = Path("easyanimate_jax")
LIBRARY = [
    path
    for path in SOURCES
    if path.is_relative_to(PACKAGE)
    and path != PACKAGE / "__main__.py"
    and not path.is_relative_to(PACKAGE / "commands")
]
# What may write to a person's terminal: log lines, the progress line, the supervisor's own.
PRINTERS = {
    "processes.py": {"emit"},
    "training/metrics.py": {"show_progress"},
    "training/safety/supervisor.py": {"_say"},
}
UNIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}  # Windows has no such modules
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FILE, CLASS, FUNCTION, ARGUMENTS = 450, 200, 60, 10


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


def walk(node: ast.AST, inside: str | None = None):
    """(name of the function around it, node) for everything below `node`."""
    for child in ast.iter_child_nodes(node):
        yield inside, child
        yield from walk(child, child.name if isinstance(child, FUNCTIONS) else inside)


def prints(path: Path) -> list[str]:
    """Lines of `path` that print outside the functions that may: `print` called, or handed on."""
    name = path.relative_to(PACKAGE).as_posix()
    return [
        f"{name}:{node.lineno}"
        for inside, node in walk(tree(path))
        if isinstance(node, ast.Name) and node.id == "print"
        if inside not in PRINTERS.get(name, ())
    ]


def test_library_modules_do_not_print():
    assert [line for path in LIBRARY for line in prints(path)] == []


def test_a_module_logs_under_its_own_name():
    for path in LIBRARY:
        for inside, node in walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                own = ast.unparse(node) == "logging.getLogger(__name__)" and inside is None
                assert own or (path.name, inside) == ("processes.py", "start_logging"), path


def is_store(value: ast.expr | None) -> bool:
    """Whether a module's constant is there to be filled or changed: empty, or made by a class."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) in ("dict", "list", "set", "defaultdict", "deque")
    return isinstance(value, ast.Dict | ast.List) and not ast.unparse(value)[1:-1]


def test_modules_keep_no_state():
    for path in LIBRARY:
        module = tree(path)
        assert not [n for n in ast.walk(module) if isinstance(n, ast.Global)], path
        for node in module.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            # A constant has a capital; an object in small letters would be one for the process.
            assert all(n == "logger" or not n[:1].islower() for n in names), (path, names)
            assert not is_store(node.value), f"{path}: {names} is filled while it runs"


def test_no_module_needs_unix_to_be_imported():
    for path in LIBRARY:
        imports = [n for n in tree(path).body if isinstance(n, ast.Import)]
        names = {alias.name for node in imports for alias in node.names}
        assert not names & UNIX, path


def too_long(path: Path) -> list[str]:
    """What in a file is over the limits, with its size."""
    text = (ROOT / path).read_text("utf-8")
    lines = len(text.splitlines())
    found = [f"{path} has {lines} lines"] if lines > FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            size = node.end_lineno - node.lineno + 1
            if size > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                found.append(f"{path}: {node.name} has {size} lines")
        if isinstance(node, (ast.Lambda, *FUNCTIONS)):
            a = node.args
            names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > ARGUMENTS:
                found.append(f"{path}:{node.lineno} takes {count} arguments")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_classes_functions_and_signatures_are_short(path):
    assert too_long(path) == []
