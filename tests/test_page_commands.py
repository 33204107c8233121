"""The commands that the pages show: verbs, options, configs and make targets are real.

Nothing runs, except in the last test: a command goes to the parser of its verb, and stops there.
A name in capitals such as RUN or CONFIG stands for something of yours.
"""

import ast
import contextlib
import functools
import gc
import importlib
import inspect
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from demos.__main__ import KINDS
from easyanimate_jax import load_config
from easyanimate_jax.__main__ import VERBS
from easyanimate_jax.commands import parse

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("README*.md"),
        ROOT / "CONTRIBUTING.md",
        ROOT / "integrations" / "comfyui" / "README.md",
        *DOCS.rglob("*.md"),
    ]
)
CHINESE = [page for page in PAGES if page.is_relative_to(DOCS / "zh")]
SHELLS = ("", "bash", "sh", "shell", "console")
INLINE = re.compile(r"`([^`\n]+)`")
# A sentence may name a verb without its arguments.
MENTION = re.compile(
    rf"python (?:train\.py|sample\.py|-m easyanimate_jax(?: (?:VERB|{'|'.join(VERBS)}))?"
    rf"|-m demos(?: (?:{'|'.join(KINDS)}))?)"
)
FILE = re.compile(r'^```python title="([\w.]+)"\n(.*?)^```', re.S | re.M)
START = re.compile(
    r"(?:\$ )?(?:[A-Z_]+=\S+ )*"
    r"(?=(?:\.venv/bin/)?python (?:-m (?:easyanimate_jax|demos)\b|train\.py|sample\.py)|make )"
)
STANDS_FOR = {"CONFIG": "configs/demo.py", "FILE": "configs/demo.py", "STEP": "500"}
STANDS_FOR["VERB"] = "sources"
VERB_OF = {"train.py": "train", "sample.py": "sample"}


def english_of(page: Path) -> Path:
    return DOCS / page.relative_to(DOCS / "zh") if page in CHINESE else page


class ParsedError(BaseException):
    """Ends a command when its arguments have been parsed."""


def commands(text: str, *, fenced: bool = False) -> list[str]:
    """The commands of a page that are for us: in its fenced blocks, and between backticks.

    `fenced` leaves out those between backticks.
    """
    lines, inside = [], None
    for line in re.sub(r"\\\n *", "", text).splitlines():
        if line.strip().startswith("```"):
            inside = line.strip()[3:].strip() if inside is None else None
        elif inside is None and not fenced:
            lines += [one for one in INLINE.findall(line) if not MENTION.fullmatch(one)]
        elif inside in SHELLS:
            lines.append(line.strip())
    return [START.sub("", line, count=1) for line in lines if START.match(line)]


def wrong(command: str, files: dict[str, str] | None = None) -> str:
    """What is wrong with a command, or an empty text. `files` are paths by the page's names."""
    known = STANDS_FOR | (files or {})
    words = [known.get(word, word) for word in shlex.split(command, comments=True)]
    words = [word.strip("[]") if word.isupper() else word for word in words]
    first, *rest = words
    if first == "make":
        return wrong_targets(rest)
    if rest[0] in VERB_OF:
        return wrong_arguments(VERB_OF[rest[0]], rest[1:])
    _, module, *rest = rest
    if module != "easyanimate_jax":
        return wrong_demo(module, rest)
    if not rest or rest[0] not in VERBS:
        return f"there is no verb {' '.join(rest[:1])}".rstrip()
    return wrong_arguments(rest[0], rest[1:])


def wrong_targets(words: list[str]) -> str:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.M))
    variables = set(re.findall(r"^([A-Z_]+) *[:?]?=", makefile, re.M))
    names = [word.partition("=")[0] for word in words]
    missing = [
        n for n, w in zip(names, words, strict=True) if n not in (targets, variables)["=" in w]
    ]
    return f"make has no {missing}" if missing else ""


def wrong_arguments(verb: str, words: list[str]) -> str:
    """What the verb's own parser says of the arguments; the verb goes no further."""
    if verb == "supervise" and "--" in words:
        place = words.index("--")
        nested, words = shlex.join(words[place + 1 :]), words[:place]
        if said := wrong(nested):
            return said
    module = importlib.import_module(f"easyanimate_jax.commands.{verb.replace('-', '_')}")
    real = {name: getattr(parse, name) for name in ("options", "options_and_config")}
    heard = signal.getsignal(signal.SIGUSR2)
    collects, said = gc.get_threshold(), io.StringIO()

    def stops(name: str):
        def parsed(*arguments):
            real[name](*arguments)
            raise ParsedError

        return parsed

    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            for name in real:
                patch.setattr(parse, name, stops(name))
            module.main(words)
    except ParsedError:
        return ""
    except SystemExit as end:  # of --help
        return said.getvalue() if end.code else ""
    finally:
        signal.signal(signal.SIGUSR2, heard)
        gc.set_threshold(*collects)
    return said.getvalue() or "the verb did not parse its arguments"


def wrong_demo(module: str, words: list[str]) -> str:
    if module == "demos":
        if words and set(words[0].split("|")) <= set(KINDS):
            try:
                load_config(words[1], words[2:])
            except ValueError as error:
                return str(error)
            return ""
        return f"demos has no {words[:1]}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return f"there is no module {module}"
    options = getattr(found, "Options", found.main)
    if not inspect.signature(options).parameters:
        return f"{module} takes no arguments" if words else ""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            tyro.cli(only_parsed(options), args=words, registry=parse.registry())
        except SystemExit as end:
            return said.getvalue() if end.code else ""
    return ""


def only_parsed(options):
    """A class of options, or a function with the arguments of `options` that does nothing."""
    if isinstance(options, type):
        return options
    return functools.wraps(options)(lambda *values, **named: None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_is_there(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text, files = page.read_text("utf-8"), {}
    english = english_of(page)
    for name, code in FILE.findall(english.read_text("utf-8")):
        (tmp_path / name).write_text(code)
        files[name] = str(tmp_path / name)
    found = {command: wrong(command, files) for command in commands(text)}
    assert {command: said for command, said in found.items() if said} == {}


def test_the_commands_are_found():
    counts = {page.relative_to(ROOT).as_posix(): len(commands(page.read_text())) for page in PAGES}
    assert counts["README.md"] >= 10 and counts["docs/tutorial/your_clips.md"] >= 9
    assert sum(counts.values()) > 100
    page = "```json\n{}\n```\n```\nA=1 python train.py x \\\n  --y 1  # why\n```\n`make it`\n"
    expected = ["python train.py x --y 1  # why", "make it"]
    assert commands(page + "`make`, `python -m easyanimate_jax VERB`\n") == expected


@pytest.mark.parametrize(
    "command",
    [
        "python -m easyanimate_jax trian configs/demo.py",
        "python -m easyanimate_jax prepare configs/demo.py --sources X",
        "python -m easyanimate_jax prepare configs/no_such.py",
        "python -m easyanimate_jax checkpoint look RUN",
        "python -m easyanimate_jax supervise --ranks 2 -- python train.py configs/demo.py --run",
        "python train.py configs/demo.py --stages.0.step 10",
        "python train.py configs/demo.py --stages.9.steps 10",
        "python sample.py RUN --promt x",
        "python sample.py RUN --prompt x --steps many",
        "python -m demos.world OUT --clip 3",
        "python -m demos.wolrd OUT",
        "python -m demos world configs/demo.py --sed 3",
        "python -m demos worlds configs/demo.py",
        "make demos",
        "make test CPUS=1",
    ],
)
def test_a_wrong_command_is_seen(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert wrong(command)


def shown(page: Path) -> list[str]:
    """The commands in a page's blocks, without remarks, and with any prompt for a prompt."""
    found = []
    for command in commands(page.read_text("utf-8"), fenced=True):
        words = shlex.split(command, comments=True)
        prompts = {place + 1 for place, word in enumerate(words) if word == "--prompt"}
        found.append(" ".join("..." if i in prompts else word for i, word in enumerate(words)))
    return sorted(found)


def values(code: str) -> str:
    """A file of Python without its docstring and remarks."""
    tree = ast.parse(code)
    tree.body = tree.body[ast.get_docstring(tree) is not None :]
    return ast.unparse(tree)


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_chinese_page_shows_the_commands_of_the_english_one(page):
    english = english_of(page)
    assert shown(page) == shown(english)
    files = [dict(FILE.findall(one.read_text("utf-8"))) for one in (page, english)]
    one, other = [{name: values(code) for name, code in them.items()} for them in files]
    assert one == other


FEW = {"train.py my_vae.py": "--stages.0.steps 11", "train.py my_config.py": "--stages.0.steps 3"}
FEW |= {"easyanimate_jax text": "--steps 2", "sample.py": "--steps 2"}


@pytest.mark.slow
def test_the_commands_of_your_clips_make_a_video(tmp_path):
    text = (DOCS / "tutorial" / "your_clips.md").read_text("utf-8")
    for name, code in FILE.findall(text):
        (tmp_path / name).write_text(code)
    for name in ("train.py", "sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for command in commands(text, fenced=True):
        words = shlex.split(command)
        words[0] = sys.executable
        words += [w for part, few in FEW.items() if part in command for w in few.split()]
        words = [{"60": "12"}.get(word, word) for word in words]  # clips
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (tmp_path / "my" / "samples" / "00000001.mp4").stat().st_size > 0
