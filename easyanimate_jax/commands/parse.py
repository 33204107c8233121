"""Argument parsing for every verb: tyro, on a frozen dataclass of options.

The help text of an option is the string below its field. If the first argument of a verb is a
config, the config's fields are options too: `train CONFIG --stages.0.steps 10`. An option of type
Path is a local path (storage/local.py), and one of type Place may be in a store. Wrong arguments
raise ValueError with one line; `run` prints it and returns exit code 2. A full disk is one line and
exit code 5. `--help` prints to stdout and ends the program with exit code 0. Nothing here imports
JAX before a config is read.
"""

import dataclasses
import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, get_args

import tyro

from easyanimate_jax import processes
from easyanimate_jax.storage.errors import says_jax
from easyanimate_jax.storage.local import local_path
from easyanimate_jax.storage.probe import check_store
from easyanimate_jax.storage.stores import SCHEMES, Place, Remote, place
from easyanimate_jax.training.safety.exits import BAD_INPUT, STORAGE

HELP = ("-h", "--help")
MARKERS = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.HelptextFromCommentsOff)
# Flags are off by default and have no --no- form; the text "None" is an ordinary value.
OWN = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # a disk that takes no more
# Paths that cannot be written, and too few open files: a restart does not help.
OF_SETTINGS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS}
OF_SETTINGS |= {errno.EMFILE}
AWAY = {errno.ETIMEDOUT, errno.ESTALE}  # of a store: the same command may do later
URLS = tuple(f"{scheme}://" for scheme in SCHEMES)


def registry() -> tyro.constructors.ConstructorRegistry:
    """Return tyro's rules; options of type Path are local paths, of type Place also stores'."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def path(info: tyro.constructors.PrimitiveTypeInfo):
        read = {Path: local_path, Place: place, Place | None: place}.get(info.type)
        if read is None:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH" if info.type is Path else "PATH|URL",
            instance_from_str=lambda words: read(words[0]),
            is_instance=lambda value: isinstance(value, info.type),
            str_from_instance=lambda value: [str(value)],
        )

    return rules


def run(work: Callable[[], int], prefix: str = "error") -> int:
    """Return the exit code of a verb's work.

    For a ValueError, a path that cannot be written and too few open files, print one line and
    return 2. If the disk takes no more, or a store does not answer, print one line and return 5.
    """
    if not processes.several_processes(os.environ):  # else the verb does so once it knows its rank
        processes.start_logging()
    try:
        return work()
    except ValueError as error:
        if says_jax(error):
            raise
        print(f"{prefix}: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if error.errno in NO_ROOM:
            where = f"{error.filename}: " if error.filename else ""
            print(
                f"{prefix}: {where}{error.strerror}; make room on the disk, then run the same "
                f"command again",
                file=sys.stderr,
            )
            return STORAGE
        if str(error.filename).startswith(URLS):
            print(f"{prefix}: {error.filename}: {error.strerror}", file=sys.stderr)
            return STORAGE if error.errno in AWAY else BAD_INPUT
        if error.errno in OF_SETTINGS:
            more = error.errno == errno.EMFILE and "ulimit" not in str(error)
            repair = "; raise the limit (`ulimit -n`), then run the same command again"
            print(f"{prefix}: {error}{repair * more}", file=sys.stderr)
            return BAD_INPUT
        raise


def options(kind: type, arguments: Sequence[str], verb: str, description: str):
    """Return the options of a verb, an instance of the dataclass `kind`.

    Raises ValueError with a message of one line for wrong arguments.
    """
    name = f"python -m easyanimate_jax {verb}"
    return _parse(Annotated[kind, *OWN], arguments, prog=name, description=description)


def options_and_config(
    kind: type, arguments: Sequence[str], verb: str, description: str, configs: tuple[str, ...]
):
    """Return the options of a verb and its config, which is None if CONFIG is optional and missing.

    `kind` has a positional field `config`, the path of the config's file. The arguments after the
    path may be options of both. `configs` are the names of the config classes that the verb takes.
    Raises ValueError for a missing file, a config of another class, and wrong arguments.
    """
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if path is None:
        path = options(kind, arguments, verb, description).config
    if path is None:
        return options(kind, arguments, verb, description), None
    default = _opened(_read(path), arguments)
    if type(default).__name__ not in configs:
        other = "a VAE" if type(default).__name__ == "VAETrainConfig" else "a transformer"
        wanted = "stages and sets" if "TrainConfig" in configs else "the stages of a VAE"
        raise ValueError(f"{path} trains {other}; `{verb}` takes a config with {wanted}")
    both = dataclasses.make_dataclass(
        "Options",
        [
            ("own", Annotated[kind, tyro.conf.arg(name=""), *OWN]),
            ("fields", _fields_of(default), dataclasses.field(default=default)),
        ],
    )
    name = f"python -m easyanimate_jax {verb}"
    given = _parse(both, arguments, prog=name, description=description)
    return given.own, given.fields


def check_folder(name: str, path: str | Place) -> None:
    """Raise ValueError unless the option `name` is a folder that can be written, or can become one.

    A folder that does not exist is not made yet. In a store, an object is made and deleted.
    """
    if isinstance(path, Remote):
        check_store(name, path)
        return
    for found in (Path(path), *Path(path).absolute().parents):
        if found.is_dir():
            if not os.access(found, os.W_OK | os.X_OK):
                raise ValueError(f"{name} {path}: {found} cannot be written; name another folder")
            return
        if os.path.lexists(found):
            where = "" if str(found) == str(path) else f": {found}"
            what = "a link to nothing" if found.is_symlink() else "a file"
            raise ValueError(f"{name} {path}{where} is {what}; name a folder")


def part_of(text: str) -> tuple[int, int]:
    """Return (part, number of parts) of a text such as `0/8`. Raise ValueError for other texts."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--part {text!r}: give a part and the number of parts, as in 0/8 to 7/8")
    return int(part), int(parts)


def check_no_part(text: str) -> None:
    """Raise ValueError if `--part` is given beside `--engine ray`."""
    if part_of(text) != (0, 1):
        raise ValueError(
            f"--part {text} is for processes without an engine; leave it out: --engine ray shares "
            f"all of the work"
        )


def load_config(path: str, overrides: Sequence[str] = ()):
    """Return the config of a file with overrides such as `--stages.0.steps 10`.

    Raises ValueError for a missing file, an unknown field, and a value that does not fit.
    """
    default = _opened(_read(path), overrides)
    kind = dataclasses.make_dataclass(
        "Overrides", [("fields", _fields_of(default), dataclasses.field(default=default))]
    )
    return _parse(kind, overrides, prog=path, description="").fields


def _read(path: str):
    from easyanimate_jax.runs.config import load

    return load(path)


def _opened(value, arguments: Sequence[str], place: str = "--"):
    """Return a config in which a part that is None has its defaults, if an argument names it.

    Such a part is the mesh of a stage. Tyro has no options for the fields of None. `--help` lists
    the fields of all parts. `place` is the beginning of the options of `value`.
    """
    if isinstance(value, tuple):
        return tuple(_opened(one, arguments, f"{place}{i}.") for i, one in enumerate(value))
    if not dataclasses.is_dataclass(value):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        before, inside = getattr(value, field.name), f"{place}{field.name}."
        kinds = [kind for kind in get_args(field.type) if dataclasses.is_dataclass(kind)]
        start = inside.replace("-", "_")
        named = any(w in HELP or w.replace("-", "_").startswith(start) for w in arguments)
        part = kinds[0]() if before is None and len(kinds) == 1 and named else before
        part = _opened(part, arguments, inside)
        if part != before:
            changed[field.name] = part
    return dataclasses.replace(value, **changed) if changed else value


def _fields_of(config):
    """Return the type of a config, annotated so that its fields are options without a prefix."""
    return Annotated[tyro.conf.AvoidSubcommands[type(config)], tyro.conf.arg(name="")]


def _parse(kind, arguments: Sequence[str], *, prog: str, description: str):
    """Return tyro's result. Raise ValueError with tyro's message for wrong arguments."""
    asks = bool(set(HELP) & set(arguments))
    if asks:
        print(f"{description}\n")  # printed here, as tyro would join its lines
    with nullcontext(io.StringIO()) if asks else _quiet() as written:
        try:
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=prog,
                description="",
                config=MARKERS,
                registry=registry(),
            )
        except SystemExit as stop:
            if not stop.code:
                raise
            message = _line(written.getvalue(), prog)
    raise ValueError(message or f"wrong arguments beside --help; see {prog} --help")


@contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Capture tyro's output. Without a terminal tyro writes ASCII, here without line breaks."""
    written, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with redirect_stdout(written), redirect_stderr(written):
            yield written
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _line(box: str, prog: str) -> str:
    """Return tyro's message as one line: the error, and the nearest options.

    In `box`, rows of dashes separate the title, the error, and the suggestions.
    """
    parts = [[]]
    for row in map(str.strip, box.splitlines()):
        if row and not row.strip("-"):
            parts.append([])
        elif row:
            parts[-1].append(row)
    _, wrong, *others = parts
    meant = [
        row.split()[0]
        for rows in others
        if rows[:1] == ["Perhaps you meant:"]
        for row in rows
        if row.startswith("--")
    ]
    line = " ".join(wrong).removeprefix("Error parsing ").removeprefix("fields.")
    line = line.replace(f"Missing from {prog}:", "missing:", 1)
    if not meant:
        return line
    unknown = line.partition("--")[2].partition(",")[0]
    nearest = difflib.get_close_matches(f"--{unknown}", meant, n=2, cutoff=0)
    return f"{line}; perhaps you meant {' or '.join(nearest)}"
