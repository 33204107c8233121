"""Make the reference pages of the site from the code, and print them as JSON: {name: text}.

    python docs/reference.py > pages.json

Commands come from `--help`, configs from the dataclasses and their comments, HTTP from the server's
own description, and the Python page names what mkdocstrings reads. docs/hooks.py adds the pages.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import easyanimate_jax
from easyanimate_jax import facts
from easyanimate_jax.__main__ import VERBS
from easyanimate_jax.training.safety import exits

ROOT = Path(__file__).resolve().parent.parent
ROOTS = ("TrainConfig", "VAETrainConfig")
PACKAGE = "easyanimate_jax."


def pages() -> dict[str, str]:
    """Return the text of every page by its name."""
    made = {"commands": commands, "configs": configs, "python": python, "http": http}
    return {f"reference/{name}.md": make() for name, make in made.items()}


def commands() -> str:
    """Return the page of the verbs: what each prints for `--help`, and the exit codes."""
    text = [
        "# Commands",
        "`python -m easyanimate_jax VERB`, or `easyanimate-jax VERB` where the package is "
        "installed. `python train.py` and `python sample.py` are the verbs `train` and `sample`. "
        "If the first argument of a verb is a config, every field of it is an option too: "
        "[configs](configs.md).",
    ]
    for verb in VERBS:
        text += [f"## {verb}", f"```text\n{help_of(verb)}\n```"]
    text += [
        "## Exit codes",
        _table(("code", "name", "meaning"), sorted(_exit_codes(), key=lambda row: int(row[0]))),
    ]
    return "\n\n".join(text) + "\n"


def help_of(verb: str) -> str:
    """Return what a verb prints for `--help`."""
    module = importlib.import_module(f"easyanimate_jax.commands.{verb.replace('-', '_')}")
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return "\n".join(line.rstrip() for line in written.getvalue().strip().splitlines())


def _exit_codes() -> Iterator[tuple[str, ...]]:
    lines = inspect.getsource(exits).splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            comment = lines[node.lineno - 1].partition("  # ")[2]
            yield str(node.value.value), f"`{node.targets[0].id}`", comment


def configs() -> str:
    """Return the page of the config classes that a TrainConfig or a VAETrainConfig holds."""
    kinds = config_classes()
    text = [
        "# Configs",
        "A file of `configs/` defines one value, `config`. Every field can be overridden on the "
        "command line: `--stages.0.steps 10`, `--mesh.fsdp 8`. A field without a default is "
        "required. A range such as [0, 1) includes 0 and excludes 1. "
        "`python train.py CONFIG --help` lists the fields with the values of one config.",
        "Classes: " + ", ".join(f"[{k.__name__}](#{k.__name__.lower()})" for k in kinds) + ".",
    ]
    for kind in kinds:
        text += [f"## {kind.__name__}", inspect.getdoc(kind)]
        text += [_table(("field", "type", "default", "range", "meaning"), fields_of(kind))]
    return "\n\n".join(text) + "\n"


def config_classes() -> list[type]:
    """Return the config classes, each after the one whose field first names it."""
    found, todo = [], [getattr(easyanimate_jax, name) for name in ROOTS]
    while todo:
        kind = todo.pop(0)
        if kind in found or not dataclasses.is_dataclass(kind):
            continue
        found.append(kind)
        for field in dataclasses.fields(kind):
            todo += _classes_in(field.type)
    return found


def _classes_in(hint) -> list[type]:
    inner = [kind for one in typing.get_args(hint) for kind in _classes_in(one)]
    return [hint] * isinstance(hint, type) + inner


def fields_of(kind: type) -> Iterator[tuple[str, ...]]:
    """Yield name, type, default, range and meaning of each field of a dataclass.

    The fields of base classes come first.
    """
    given = ranges().get(kind, {})
    for one in reversed(kind.__mro__[:-1]):
        body = _class_node(one).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                name, default = node.target.id, node.value and ast.unparse(node.value)
                value = _code(default) if default is not None else "required"
                shown = _code(ast.unparse(node.annotation)), value, given.get(name, "")
                yield f"`{name}`", *shown, _doc(after)


def _class_node(kind: type) -> ast.ClassDef:
    return ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]


def _doc(node: ast.stmt | None) -> str:
    """Return the text of a string that stands below a field, on one line."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return " ".join(str(node.value.value).split()).replace("|", "\\|") if is_text else ""


@functools.cache
def ranges() -> dict[type, dict[str, str]]:
    """Return the ranges of each class's fields: what it gives to `check_fields`.

    They are seen as instances are made, so all files of configs/ are loaded.
    """
    seen = {}

    def check_fields(config, **given: str) -> None:
        seen[type(config)] = given

    homes = [m for n, m in sys.modules.items() if n.startswith(PACKAGE)]
    homes = [module for module in homes if hasattr(module, "check_fields")]
    real = facts.check_fields
    try:
        for module in homes:
            module.check_fields = check_fields
        for path in sorted((ROOT / "configs").glob("*.py")):
            easyanimate_jax.load_config(str(path))
        for kind in set(config_classes()) - set(seen):
            kind()  # no file of configs/ has one; its fields have defaults
    finally:
        for module in homes:
            module.check_fields = real
    return seen


def python() -> str:
    """Return the page of the public names, with a line for mkdocstrings for each."""
    text = ["# Python", f"```python\n{_example()}\n```"]
    text += [
        "Every name below is imported as `easyanimate_jax.NAME`. Configs: [fields](configs.md)."
    ]
    known = {kind.__name__ for kind in config_classes()}
    groups = {"Functions": [], "Classes": []}
    for name in _names():
        value = getattr(easyanimate_jax, name)
        if name not in known:
            groups["Classes" if isinstance(value, type) else "Functions"].append((name, value))
    for title, values in groups.items():
        text.append(f"## {title}")
        text += [
            f"::: {value.__module__}.{value.__qualname__}\n    options:\n      heading: {name}"
            for name, value in values
        ]
    text.append("## Configs")
    text.append(_table(("class", "what it is"), [_summary(name) for name in sorted(known)]))
    return "\n\n".join(text) + "\n"


def _example() -> str:
    """Return the example of the package's docstring."""
    lines = easyanimate_jax.__doc__.splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line[:4] == "    " or not line))[
        1:-1
    ]


def _names() -> list[str]:
    return sorted(name for name in dir(easyanimate_jax) if name in easyanimate_jax._HOME)


def _summary(name: str) -> tuple[str, str]:
    (kind,) = [kind for kind in config_classes() if kind.__name__ == name]
    return f"[{name}](configs.md#{name.lower()})", inspect.getdoc(kind).split("\n\n")[0]


def http() -> str:
    """Return the page of the server's routes, from the description that it serves itself."""
    described = description()
    text = [
        "# HTTP",
        "The routes of `python -m easyanimate_jax serve`, from the description that a running "
        "server gives at `/openapi.json`. What they are for: [serve](../serve.md).",
    ]
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            text.append(f"## {method.upper()} {path}")
            rows = [_parameter(one) for one in route.get("parameters", ())]
            if rows:
                text.append(_table(("parameter", "where", "type", "default"), rows))
            for kind, body in route.get("requestBody", {}).get("content", {}).items():
                text.append(f"Fields of the body, as JSON or as `{kind}`:")
                needed = body["schema"].get("required", ())
                rows = [
                    _property(n, p, n in needed) for n, p in body["schema"]["properties"].items()
                ]
                text.append(_table(("field", "type", "meaning"), rows))
            if len(text[-1].split("\n")) == 1 and text[-1].startswith("## "):
                text.append("No parameters.")
    return "\n\n".join(text) + "\n"


def description() -> dict:
    """Return the OpenAPI description of a server without models."""
    from easyanimate_jax.serving.app import Api, create_app

    return create_app(Api(None, None, {}), ["127.0.0.1"]).openapi()


def _parameter(one: dict) -> tuple[str, ...]:
    schema = one["schema"]
    kinds = [schema, *schema.get("anyOf", ())]
    kind = " or ".join(k["type"] for k in kinds if "type" in k)
    kind += "".join(f", {word}" for word in map(json.dumps, schema.get("enum", ())))
    ends = [str(schema[name]) for name in ("minimum", "maximum") if name in schema]
    kind += f", {' to '.join(ends)}" if ends else ""
    default = "required" if one.get("required") else _code(json.dumps(schema.get("default")))
    return f"`{one['name']}`", one["in"], kind, default


def _property(name: str, one: dict, needed: bool) -> tuple[str, ...]:
    kind = "file" if one.get("format") == "binary" else one["type"]
    kind += "".join(f", `{word}`" for word in one.get("enum", ()))
    return f"`{name}`", kind, one["description"].replace("|", "\\|") + " Required." * needed


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _table(head: tuple[str, ...], rows: typing.Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "96"
    json.dump(pages(), sys.stdout)
