"""Facts stand once: channels in tasks.py, exit codes in exits.py, all others in facts.py."""

import ast
import re
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import MODULES, PACKAGE, loaded

from easyanimate_jax import facts
from easyanimate_jax.diffusion.tasks import TASKS, TaskName, channels_with, numbers, task_of
from easyanimate_jax.generation import pipelines
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.models.vae import VAEConfig
from easyanimate_jax.runs.config import from_json, to_json
from easyanimate_jax.training.safety import exits
from easyanimate_jax.weights import folder

TABLE = PACKAGE / "diffusion" / "tasks.py"
FACTS = PACKAGE / "facts.py"
EXITS = PACKAGE / "training" / "safety" / "exits.py"
NUMBERS = {t.in_channels for t in TASKS.values()} | {t.extra_channels for t in TASKS.values()}
TOLD = NUMBERS - {0, facts.LATENT_CHANNELS}  # 17, 22, 32, 33, 38, 48
CODES = {code for name, code in vars(exits).items() if name.isupper() and isinstance(code, int)}
NAMES = {name for name in vars(facts) if name.isupper()}
LENGTHS = {"frames", "height", "width", "side", "h", "w"}
WORDS = re.compile(r"channel|inpaint|control|camera|t2v|text", re.IGNORECASE)
COUNTED = re.compile(rf"(?<![\w.])({'|'.join(map(str, sorted(TOLD)))})(?![\w.])")


def numbers_in(*nodes: ast.AST | None) -> set:
    """The int literals anywhere in the nodes."""
    found = (n.value for node in nodes if node for n in ast.walk(node) if is_number(n))
    return {value for value in found if type(value) is int}


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def names_in(*nodes: ast.AST | None) -> set[str]:
    """Names, attributes and keys anywhere in the nodes."""
    found = set()
    for node in (n for root in nodes if root for n in ast.walk(root)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def bindings(tree: ast.AST) -> list[tuple[set[str], ast.AST]]:
    """(names, value) of all that gives a value to a name: comparisons bind both of their sides."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            found.append((names_in(*node.targets), node.value))
        elif isinstance(node, ast.AnnAssign) and node.value:
            found.append((names_in(node.target), node.value))
        elif isinstance(node, ast.keyword) and node.arg:
            found.append(({node.arg}, node.value))
        elif isinstance(node, ast.Compare):
            found.append((names_in(node), node))
        elif isinstance(node, ast.Dict):
            found += [(names_in(k), v) for k, v in zip(node.keys, node.values, strict=True) if k]
        elif isinstance(node, ast.arguments):
            places = [*node.posonlyargs, *node.args][::-1], node.defaults[::-1]
            pairs = [*zip(*places, strict=False)]
            pairs += zip(node.kwonlyargs, node.kw_defaults, strict=True)
            found += [({arg.arg}, value) for arg, value in pairs if value]
    return found


def texts(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of the strings that are no docstrings, an f-string as one."""
    bodies = (ast.Module, ast.ClassDef, ast.FunctionDef)
    skip = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, bodies) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v for v in node.values if isinstance(v, ast.Constant)]
            skip |= {id(part) for part in parts}
            found.append((node.lineno, "{}".join(part.value for part in parts)))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip
        ):
            found.append((node.lineno, node.value))
    return found


def channels_again(tree: ast.AST) -> list[str]:
    """Where the table of tasks is written again."""
    faults = [
        f"line {value.lineno}: a channel count for {', '.join(sorted(names))}"
        for names, value in bindings(tree)
        if any("channel" in name.lower() for name in names)
        and numbers_in(value) & (TOLD | {facts.LATENT_CHANNELS})
    ]
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Dict):
            parts = [[k for k in node.keys if k], node.values]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = [node.elts]
        for elements in parts:
            found = {e.value for e in elements if is_number(e)} & TOLD
            if len(found) > 1:
                faults.append(f"line {node.lineno}: {found} together")
    return faults + [
        f"line {line}: {text!r}"
        for line, text in texts(tree)
        if COUNTED.search(text) and WORDS.search(text)
    ]


def facts_again(tree: ast.AST) -> list[str]:
    """Where a fact of facts.py is written again."""
    faults = []
    for names, value in bindings(tree):
        if NAMES & names and not isinstance(value, ast.Compare):
            faults.append(f"line {value.lineno}: {', '.join(sorted(NAMES & names))} is given anew")
        rate = any(name.lower().endswith("fps") for name in names)
        if rate and isinstance(value, ast.Constant) and value.value == facts.FPS:
            faults.append(f"line {value.lineno}: {facts.FPS} frames a second")
    sizes = facts.TIME_FACTOR, facts.SPACE_FACTOR, facts.CELL
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == 127.5:
            faults.append(f"line {node.lineno}: 127.5")
        if isinstance(node, ast.Tuple) and ast.unparse(node) == str(facts.MESH_AXES):
            faults.append(f"line {node.lineno}: the axes of the mesh")
        if isinstance(node, ast.BinOp) and is_number(node.right):
            number, of = node.right.value, names_in(node.left)
            whole = isinstance(node.op, ast.Mult) and isinstance(node.left, ast.BinOp)
            if whole and isinstance(node.left.op, ast.FloorDiv):
                again = number in sizes and numbers_in(node.left.right) == {number}
            elif isinstance(node.op, ast.Mod):
                again = number in sizes and bool(LENGTHS & of)
            elif isinstance(node.op, ast.FloorDiv | ast.Div):  # a quarter of a side is no factor
                again = number in sizes[1:] and bool((LENGTHS | {"fps"}) & of)
            else:
                again = False
            if again:
                faults.append(f"line {node.lineno}: {ast.unparse(node)}")
    return faults


def codes_again(tree: ast.AST) -> list[str]:
    """Where an exit code other than 0 is written as a number."""
    ending = ("main", "run", "train", "replay")
    mains = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ending]
    returns = {n for main in mains for n in ast.walk(main) if isinstance(n, ast.Return)}
    faults = []
    for node in ast.walk(tree):
        found: set = set()
        if node in returns and isinstance(node.value, ast.Constant | ast.IfExp):
            ends = [node.value, *vars(node.value).values()]  # of "return 0 if asked else 2" both
            found = {end.value for end in ends if isinstance(end, ast.AST) and is_number(end)}
        elif isinstance(node, ast.Call) and node.args and is_number(node.args[0]):
            name = ast.unparse(node.func).rsplit(".", 1)[-1]
            found = {node.args[0].value} if name in ("exit", "_exit", "SystemExit") else set()
        elif isinstance(node, ast.Compare) and names_in(node) & {"code", "rc", "returncode"}:
            found = numbers_in(node)
        faults += [f"line {node.lineno}: exit code {code}" for code in found & (CODES - {0})]
    return faults


def again(rule, *places: Path) -> dict[str, list[str]]:
    """The faults of every module that is none of `places`."""
    found = {
        str(path.relative_to(PACKAGE)): rule(ast.parse(path.read_text()))
        for path in MODULES
        if path not in places
    }
    return {name: faults for name, faults in found.items() if faults}


def test_channels_stand_in_the_table_of_tasks_alone():
    assert again(channels_again, TABLE, FACTS) == {}


def test_facts_stand_in_facts_alone():
    assert again(facts_again, FACTS) == {}


def test_exit_codes_stand_in_exits_alone():
    assert again(codes_again, EXITS) == {}


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (channels_again, "EXTRA_CHANNELS = {'t2v': 0, 'i2v': 17}"),
        (channels_again, "def f(in_channels=16): pass"),
        (channels_again, "C(in_channels=33)"),
        (channels_again, "x = config.in_channels in (38, 48)"),
        (channels_again, "TAKES = {'video': (16, 33), 'control': (32, 48)}"),
        (channels_again, "raise ValueError(f'use a camera (38) checkpoint, not {x}')"),
        (facts_again, "TIME_FACTOR, SPACE_FACTOR = 4, 8"),
        (facts_again, "def write(path, *, fps: int = 8): pass"),
        (facts_again, "FPS = 8"),
        (facts_again, "stride = clip.fps / 8"),
        (facts_again, "AXES = ('data', 'fsdp', 'context', 'tensor')"),
        (facts_again, "n = (frames - 1) // 4 * 4 + 1"),
        (facts_again, "bad = height % 16"),
        (facts_again, "rows = height // 8"),
        (facts_again, "x = x / 127.5 - 1"),
        (codes_again, "def main():\n    return 2"),
        (codes_again, "def main():\n    return 0 if asked else 2"),
        (codes_again, "os._exit(4)"),
        (codes_again, "stopped = code in (0, 42)"),
    ],
)
def test_a_fact_that_is_written_again_is_found(rule, line):
    assert rule(ast.parse(line))


def test_the_facts_and_the_tasks_load_no_jax():
    statement = "import easyanimate_jax.facts, easyanimate_jax.diffusion.tasks"
    assert loaded(statement, "jax", "flax") == []


def test_pixels_and_values_are_inverses_in_numpy_and_in_jax():
    pixels = np.arange(256, dtype=np.uint8)
    signed = facts.to_signed(pixels)
    assert signed.dtype == np.float32 and (signed[0], signed[-1]) == (-1, 1)
    np.testing.assert_allclose(facts.to_signed(jnp.asarray(pixels)), signed, atol=1e-6)
    # Values are truncated: half a step more is as much, and what is out of range is cut.
    np.testing.assert_array_equal(facts.to_bytes(signed + 1 / 255), pixels)
    np.testing.assert_array_equal(facts.to_bytes(jnp.asarray(signed + 1 / 255)), pixels)
    assert facts.to_bytes(np.float32([-3, 3])).tolist() == [0, 255]


def test_the_table_holds_the_released_variants():
    assert set(TASKS) == set(typing.get_args(TaskName))
    rows = {task.in_channels: (sum(task.holds.values()), task.pipeline) for task in TASKS.values()}
    control = "EasyAnimateControlPipeline"
    assert rows == {
        16: (0, "EasyAnimatePipeline"),
        33: (17, "EasyAnimateInpaintPipeline"),
        32: (16, control),
        48: (32, control),
        38: (22, control),
    }
    assert channels_with("video") == channels_with("text_to_video") == (16, 33)
    assert numbers("reference") == "48 or 38" and numbers("control") == "32 or 48"
    with pytest.raises(ValueError, match=r"20 input channels.* 33 inpainting"):
        task_of(20)


def test_every_way_of_the_table_is_a_pipeline():
    for way in {way for task in TASKS.values() for way in task.ways}:
        assert callable(getattr(pipelines, way))


def test_a_config_of_an_earlier_version_is_read():
    assert from_json('{"class": "VAEConfig", "latent_channels": 16}') == VAEConfig()
    fields = {"depth": 1, "mmdit_depth": 1, "heads": 1, "text_widths": [4], "text_norm": True}
    fields |= {"round_time": True, "patch": 2, "out_channels": 16}
    config = folder._config(MMDiTConfig, fields)
    assert config == MMDiTConfig(1, 1, 1, (4,), True, True)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("VAEConfig", "latent_channels", 8),
        ("MMDiTConfig", "patch", 1),
        ("MMDiTConfig", "out_channels", 32),
    ],
)
def test_a_removed_field_with_a_value_that_never_worked_is_refused_by_name(name, field, value):
    text = f'{{"class": "{name}", "{field}": {value}}}'
    with pytest.raises(ValueError, match=f"{name}.*{field} is {value}"):
        from_json(text)
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        folder._config({"VAEConfig": VAEConfig, "MMDiTConfig": MMDiTConfig}[name], {field: value})
