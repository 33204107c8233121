"""Serve models over HTTP."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.facts import CELL
from easyanimate_jax.generation.request import check_range, check_tile
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE
from easyanimate_jax.weights.pretrained import model_place

if TYPE_CHECKING:
    from easyanimate_jax.runs.parts import Opened

HELP = """Serve models over HTTP, by the routes that OpenAI's clients know.

  python -m easyanimate_jax serve runs/demo/train
  curl -H "Authorization: Bearer $(cat served/token)" -F prompt="a red circle" \\
      http://127.0.0.1:8000/v1/videos

MODEL is a run, a converted folder or a released folder, or NAME=FOLDER; requests name one by its
folder's name, and the first is the default. One model is in memory at a time. All jobs are kept in
a folder, and those of a server that was killed go on when the next one starts."""
NAME = re.compile(r"[\w.-]+")
LOCAL = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Options:
    """The arguments of `serve`."""

    models: Positional[tuple[str, ...]]
    """Models: FOLDER or NAME=FOLDER."""
    lora: UseAppendAction[tuple[str, ...]] = ()
    """LoRA that requests may name: FILE or NAME=FILE."""
    folder: Path = Path("served")
    """Folder of the queue and the videos."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one."""
    port: Annotated[int, arg(metavar="PORT")] = 8000
    """Port to listen at; 0 takes a free one."""
    allow_host: tuple[str, ...] = ()
    """Names by which the server may be called."""
    token: str | None = None
    """Token that requests carry; by default that of FOLDER/token, which is made."""
    no_token: bool = False
    """Admit every program of this machine."""
    easyanimate_routes: bool = False
    """Offer EasyAnimate's own route, too."""
    batch: int = 4
    """Most jobs of one shape that are sampled at once."""
    memory: Literal["all", "low"] = "all"
    """low: the parts of a model take turns."""
    weights: Literal["full", "int8"] = "full"
    """int8: transformer kernels in 8 bits."""
    weights_of: Literal["ema", "raw"] = "ema"
    """A run's averaged or last weights."""
    tile: int | None = None
    """Decode tiles of N pixels a side."""
    most_jobs: int = 64
    """Most jobs that wait or are made."""
    most_pixels: int | None = None
    """Most frames x height x width of a video; by default the model's own size."""
    most_steps: int = 100
    """Most denoising steps."""
    most_megabytes: int = 256
    """Most megabytes of a request with its files."""
    most_seconds: float = 3600.0
    """Most seconds for one batch."""
    keep_days: float = 7.0
    """Days after which a finished video is deleted."""
    keep_gigabytes: float = 100.0
    """Most gigabytes of finished videos; the oldest are deleted."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `serve`; return the exit code."""
    return parse.run(partial(_serve, arguments))


def _serve(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "serve", HELP)
    check(own)
    if not own.models:
        raise ValueError("give a model: a run, or a folder with weights")
    models = named(own.models, "folder", lambda path: path.is_dir())
    files = named(own.lora, "file", lambda path: path.is_file())
    parse.check_folder("--folder", own.folder)
    try:
        import fastapi  # noqa: F401 the first of the extra's packages
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serve needs the package {error.name}: pip install 'easyanimate_jax[serve]'"
        ) from error
    set_up_jax()
    from easyanimate_jax.serving.engine import Settings, open_model
    from easyanimate_jax.serving.server import serve
    from easyanimate_jax.storage.lock import FolderLock

    low = own.memory == "low"
    settings = Settings(models, files, own.weights, own.weights_of, low, own.tile)
    opened = {name: open_model(settings, name) for name in models}
    loras = fitting(opened, files)
    with FolderLock(own.folder, option="--folder", mode=0o700):
        say = partial(print, flush=True)  # a program may wait for the line
        serve(own, settings, opened, loras, token_of(own), LOCAL, say)
    return DONE


def check(own: Options) -> None:
    """Raise ValueError for options that are wrong or exclude each other."""
    for name, low, high in (
        ("port", 0, 65535),
        ("batch", 1, 1024),
        ("most_jobs", 1, 10**6),
        ("most_pixels", CELL * CELL, 10**12),
        ("most_steps", 1, 1000),
        ("most_megabytes", 1, 10**5),
        ("most_seconds", 1, 10**6),
        ("keep_days", 0, 10**5),
        ("keep_gigabytes", 0, 10**6),
    ):
        check_range(name, getattr(own, name), low, high)
    check_tile(own.tile)
    if own.no_token and own.token is not None:
        raise ValueError("--no-token and --token cannot both be given")
    if own.no_token and own.host not in LOCAL:
        raise ValueError(
            f"--no-token opens the server to everybody who reaches {own.host}: leave it out, or "
            f"leave out --host"
        )
    if own.token is not None and (len(own.token) < 16 or not own.token.isascii()):
        raise ValueError("--token is too easy to guess: use 16 ASCII characters or more")


def named(words: Sequence[str], kind: str, is_kind: Callable[[Place], bool]) -> dict[str, str]:
    """Return the path or URL of each model or LoRA by its name. Raises ValueError.

    A word is PATH, whose name is that of the file or folder, or NAME=PATH.
    """
    found = {}
    for word in words:
        name, sign, rest = word.partition("=")
        path = model_place(rest if sign else word)
        own = path.resolve() if isinstance(path, Path) else path
        name = name if sign else own.name.removesuffix(".safetensors")
        if not is_kind(path):
            raise ValueError(f"there is no {kind} {path}")
        if name in found:
            raise ValueError(f"two are called {name!r}: name one of them, as other={path}")
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name: use letters, digits, - _ and ., as good={path}")
        found[name] = str(path)
    return found


def fitting(models: Mapping[str, "Opened"], loras: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of the LoRAs that fit each model.

    Raises ValueError for a file that is no LoRA, and for one that fits no model.
    """
    from easyanimate_jax.weights.adapters import check, open_loras

    found, problems = {name: [] for name in models}, {}
    for lora, path in loras.items():
        opened = open_loras([(path, 1.0)])
        for name, model in models.items():
            try:
                check(opened, model.config)
                found[name].append(lora)
            except ValueError as error:
                problems[lora] = str(error)
        if not any(lora in names for names in found.values()):
            raise ValueError(problems[lora])
    return found


def token_of(own: Options) -> str | None:
    """Return the token: the given one, or that of the folder, which is made if there is none."""
    if own.no_token:
        return None
    if own.token is not None:
        return own.token
    path = own.folder / "token"
    if not path.is_file():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
    print(f"the token is in {path}", file=sys.stderr)
    return path.read_text().strip()
