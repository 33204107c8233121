"""Resolve the paths that a user names, in a config or on the command line, to local paths.

A path is not a URL: `gs://`, `s3://`, `hf://` and all other schemes are refused by name, because
nothing in the package reads or writes them. `file:///x` is the local path `/x`, and `~` is a home
folder. Environment variables are not expanded.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # `Path` joins slashes; "C:/" is a drive
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and most file systems


def local_path(path: str | os.PathLike) -> Path:
    """Return the local path that `path` names.

    Raises ValueError for a URL, a user without a home folder, and a name that no file can have.
    """
    text = os.fspath(path)
    if SCHEME.match(text):
        text = _from_url(text)
    elif text.startswith("~"):
        text = _from_home(text)
    _check(text)
    found = Path(text)
    # `Path` removes "./": a local folder "~" or "x:" gets a form that means the same again.
    special = str(found).startswith("~") or SCHEME.match(f"{found}/")
    return found.absolute() if special else found


def resolve_fields(config, *names: str, resolve: Callable = local_path) -> None:
    """Replace fields of a frozen dataclass by their local paths, as text; "" and None stay.

    `stores.place` as `resolve` also takes URLs. Raises ValueError, naming the field, as `resolve`
    does.
    """
    for name in names:
        if value := getattr(config, name):
            try:
                object.__setattr__(config, name, str(resolve(value)))
            except ValueError as error:
                raise ValueError(f"{type(config).__name__}.{name}: {error}") from error


def shown(name: str) -> str:
    """Return a name as valid Unicode: bytes that are not UTF-8 become \\x and two digits."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, from JSON
        return name.encode("utf-8", "backslashreplace").decode()


def quoted(name: str) -> str:
    """Return a name in quotation marks, for a message."""
    text = shown(name)
    return repr(name) if text == name else f"'{text}'"


def _from_url(text: str) -> str:
    """Return the path of a `file:` URL."""
    scheme, _, rest = text.partition(":")
    if scheme.lower() != "file":
        raise ValueError(
            f"{quoted(text)} is no local path, and {scheme}:// is not supported; copy it to a "
            f"local disk, or mount it, and give that path (a local folder named {scheme + ':'!r} "
            f"needs its absolute path)"
        )
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            raise ValueError(
                f"{quoted(text)} is not on this machine, but on {host!r}; write file:/// and an "
                f"absolute path"
            )
        rest = f"/{rest}"
    escaped = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes.fromhex(m[1].decode()), rest.encode())
    return os.fsdecode(escaped)


def _from_home(text: str) -> str:
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.split("/")[0]
        raise ValueError(
            f"{quoted(text)}: this machine knows no home folder {shown(user)}; write "
            f"./{shown(user)} for a local name, or give the absolute path"
        )
    return expanded


def _check(text: str) -> None:
    """Raise ValueError for text that no file can have as its path."""
    wrong = ""
    if not text:
        wrong = "is empty"
    elif "\0" in text:
        wrong = "holds the character NUL"
    elif shown(text) != text:
        wrong = "is not UTF-8; rename the file, or make a link to it"
    elif len(text.encode()) > LONGEST_PATH:
        wrong = f"has {len(text.encode()):,} bytes; use at most {LONGEST_PATH:,}"
    else:
        longest = max(len(name.encode()) for name in text.split("/"))
        if longest > LONGEST_NAME:
            wrong = f"holds a name of {longest:,} bytes; use at most {LONGEST_NAME}"
    if wrong:
        short = text if len(text) < 100 else f"{text[:100]}..."
        raise ValueError(f"path {quoted(short)} {wrong}")


def without_patterns(folder: Path) -> Path:
    """Return a path of a folder that holds no character of a glob pattern.

    orbax searches below the path of a checkpoint with `glob`, which takes `[`, `*` and `?` in the
    path itself for a pattern. Raises ValueError for such a path if the system has no /proc.
    """
    if not set("[*?") & set(str(folder)):
        return folder
    if not os.path.isdir("/proc/self/fd"):
        raise ValueError(f"{folder}: orbax cannot write below a name with [, * or ?; rename it")
    # The process keeps the descriptor until it ends, like its run folder.
    return Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}")
