"""What sample.py can be asked: options, the lines of a prompt file, and what is wrong with them.

A request is the command's namespace, with a line's values where there are lines. Nothing here needs
a checkpoint or JAX.
"""

import argparse
import copy
import json
import math
from pathlib import Path

from easyanimate_jax.data.buckets import check_size
from easyanimate_jax.facts import CELL, MESH_AXES

MAX_SEED = 2**32 - 1
FILES = ("image", "end_image", "video", "mask", "control", "trajectory", "camera", "reference")
WORDS = ("prompt", "negative_prompt", "operator")
NUMBERS = ("height", "width", "frames", "segment", "spot", "seed")
LINE_KEYS = (*WORDS, *FILES, *NUMBERS, "strength")
STARTS = ("control", "camera", "trajectory", "reference")
ALONE = (  # what cannot be given together
    ("image", "video"),
    ("end_image", "video"),
    ("segment", "video"),
    ("control", "camera"),
    ("control", "trajectory"),
    ("camera", "trajectory"),
    *((a, b) for a in STARTS for b in ("image", "end_image", "video", "segment")),
)
NEEDS = (
    ("mask", "video"),
    ("strength", "video"),
    ("operator", "control"),
    ("spot", "trajectory"),
)
SAMPLING = (  # of the whole command
    *("steps", "sampler", "eta", "guidance", "rescale", "guided", "guidance_every", "teacache"),
)

SAMPLERS = "V5: ddim, euler, euler_a, dpm++, pndm; V5.1: euler, adams (the first)"
GUIDED = "share of the steps with guidance (0 1)"
PICTURE_NOISE = "on given pictures; with more the video moves more (0.0563)"


MEMORY = "low: text encoders, model and VAE in turn, read again for every batch (all)"
WEIGHTS = "of the model; int8 is a quarter of the bytes (full)"


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"sample.py: {message}\n")


def parser(description: str) -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser(
        "sample.py",
        description=description,
        formatter_class=formatter,
        allow_abbrev=False,
        usage="sample.py CHECKPOINT (--prompt TEXT | --prompts FILE) [options]",
    )
    p.add_argument("checkpoint", type=Path, help="folder of a training run")
    add = p.add_argument_group("what").add_argument
    add("--prompt", metavar="TEXT", help="may be empty")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a JSON object a line: options as below, with _",
    )
    add("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    add("--image", metavar="FILE", help="first frame")
    add("--end-image", metavar="FILE", help="last frame")
    add("--video", metavar="FILE", help="what to make anew")
    add("--mask", metavar="FILE", help="picture or video, white where it is made anew")
    add("--strength", type=float, metavar="X", help="0 to 1, how much of it (0.7; with a mask 1)")
    add("--control", metavar="FILE", help="control video, or any video and --operator")
    add("--operator", metavar="NAME", help="canny, soft_edge, scribble, lines or line_art")
    add("--trajectory", metavar="FILE", help="JSON list of paths of [x, y] pixels")
    add("--spot", type=int, metavar="N", help="pixels around a path (50 at 1280x720)")
    add("--camera", metavar="FILE", help="pose file")
    add("--reference", metavar="FILE", help="what a controlled video looks like")
    add = p.add_argument_group("size").add_argument
    add("--height", type=int, metavar="N", help=f"multiple of {CELL} (the run's)")
    add("--width", type=int, metavar="N", help=f"multiple of {CELL} (the run's)")
    add("--frames", type=int, metavar="N", help="4n+1; 1 makes a picture (the run's)")
    add("--segment", type=int, metavar="N", help="4n+1, made at once of a longer video")
    add = p.add_argument_group("how").add_argument
    add("--steps", type=int, default=50, metavar="N", help="of denoising (50)")
    add("--sampler", default="", metavar="NAME", help=SAMPLERS)
    add("--eta", type=float, default=0.0, metavar="X", help="fresh noise of ddim, 0 to 1 (0)")
    add("--guidance", type=float, default=6.0, metavar="X", help="by the prompt; 1 is none (6)")
    add("--rescale", type=float, default=0.0, metavar="X", help="of guidance, 0 to 1 (0)")
    metavar = ("FROM", "UNTIL")
    add("--guided", type=float, nargs=2, default=(0.0, 1.0), metavar=metavar, help=GUIDED)
    add("--guidance-every", type=int, default=1, metavar="N", help="steps; reused between (1)")
    add("--teacache", type=float, default=0.0, metavar="X", help="threshold, as 0.08; 0 is off (0)")
    add("--picture-noise", type=float, default=0.0563, metavar="X", help=PICTURE_NOISE)
    add("--seed", type=int, default=43, metavar="N", help="same seed, same video (43)")
    add = p.add_argument_group("on what").add_argument
    add("--memory", choices=("all", "low"), default="all", help=MEMORY)
    add("--weights", choices=("full", "int8"), default="full", help=WEIGHTS)
    add("--mesh", metavar="AXES", help="over several devices, as data=2,context=4 (one device)")
    add = p.add_argument_group("where").add_argument
    add("--output", type=Path, default=Path("samples"), metavar="FOLDER", help="(samples)")
    add("--batch", type=int, default=1, metavar="N", help="lines of --prompts made at once (1)")
    add("--gif", action="store_true", help="a GIF beside each video")
    return p


def requests(a: argparse.Namespace) -> list[argparse.Namespace]:
    """One for --prompt, or one per line of --prompts: the command with the line's values."""
    if (a.prompt is None) == (a.prompts is None):
        raise ValueError("give either --prompt or --prompts")
    if a.prompts is None:
        a.line, a.where = None, ""
        return [a]
    if not a.prompts.is_file():
        raise ValueError(f"there is no prompt file {a.prompts}")
    try:
        # Not splitlines: JSON may hold U+2028 and U+0085, which it takes for ends of lines.
        lines = a.prompts.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{a.prompts} is not UTF-8 text ({error}); save it as UTF-8") from error
    found = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        one = copy.copy(a)
        one.line, one.where = number, f"{a.prompts}, line {number}: "
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{one.where}not JSON ({error})") from error
        for key, value in check_line(line, one.where).items():
            setattr(one, key, value)
        found.append(one)
    if not found:
        raise ValueError(f"{a.prompts} holds no line")
    return found


def check_line(line, where: str) -> dict:
    """A line's values; keys with other names and values of other types are refused."""
    if not isinstance(line, dict) or "prompt" not in line:
        raise ValueError(f'{where}an object with a "prompt" is wanted, as {{"prompt": "..."}}')
    kinds = dict.fromkeys((*WORDS, *FILES), str) | dict.fromkeys(NUMBERS, int)
    kinds |= {"strength": (int, float)}
    for key, value in line.items():
        if key not in kinds:
            raise ValueError(f"{where}no key {key!r}; there are {', '.join(LINE_KEYS)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{where}{key} is {json.dumps(value)}, which is of another type")
    return line


def check(a: argparse.Namespace) -> None:
    """Refuse what is wrong by itself; needs no checkpoint."""
    check_size(1 if a.frames is None else a.frames, a.height or CELL, a.width or CELL)
    for name in ("height", "width"):
        if getattr(a, name) == 0:
            raise ValueError(f"--{name} 0: use {CELL} or more")
    if a.segment is not None:
        check_size(a.segment, CELL, CELL)
        if a.segment < 9:
            raise ValueError(f"--segment {a.segment}: segments share 4 frames; use 9 or more")
    for name, low, high in (
        ("steps", 1, 1000),
        ("guidance", 0, 100),
        ("rescale", 0, 1),
        ("picture_noise", 0, 1),
        ("seed", 0, MAX_SEED),
        ("strength", 0, 1),
        ("frames", 1, 100_001),  # three hours and a half at 8 a second
        ("spot", 1, 1344),
        ("batch", 1, 1024),
    ):
        value = getattr(a, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"--{option(name)} {value} is not between {low} and {high}")
    for name in WORDS[:2]:
        try:
            getattr(a, name).encode()
        except UnicodeEncodeError as error:
            message = f"--{option(name)} is not UTF-8 text; save and pass it as UTF-8"
            raise ValueError(message) from error
    if a.mesh is not None:
        read_mesh(a.mesh)
        if a.weights == "int8":
            raise ValueError("--weights int8 is for one device; leave out --mesh")
    for one, other in ALONE:
        if given(a, one) and given(a, other):
            raise ValueError(f"--{option(one)} and --{option(other)} cannot both be given")
    for one, other in NEEDS:
        if given(a, one) and not given(a, other):
            raise ValueError(f"--{option(one)} says nothing without --{option(other)}")
    if (a.image or a.end_image) and a.frames == 1:
        raise ValueError(
            "--frames 1 makes one picture, and pictures are given; use 5 frames or more"
        )
    for name in FILES:
        if given(a, name) and not Path(getattr(a, name)).is_file():
            raise ValueError(f"--{option(name)}: there is no file {getattr(a, name)}")
    if not a.checkpoint.is_dir():
        raise ValueError(f"there is no checkpoint folder {a.checkpoint}; give the folder of a run")
    if a.output.exists() and not a.output.is_dir():
        raise ValueError(f"--output {a.output} is a file; name a folder")


def read_mesh(text: str) -> dict[str, int]:
    """`data=2,context=4` -> devices per mesh axis."""
    pairs = [pair.split("=") for pair in text.split(",")]
    if not all(len(p) == 2 and p[0] in MESH_AXES and p[1].isdecimal() and int(p[1]) for p in pairs):
        raise ValueError(
            f"--mesh {text}: give a number of devices by axis, of {', '.join(MESH_AXES)}, as "
            f"data=2,context=4"
        )
    return {name: int(count) for name, count in pairs}


def given(a: argparse.Namespace, name: str) -> bool:
    return getattr(a, name) is not None


def option(name: str) -> str:
    return name.replace("_", "-")


def options_of(a: argparse.Namespace) -> dict:
    """Everything that a request says, by the names of the command line."""
    names = (*LINE_KEYS, *SAMPLING, "picture_noise", "weights")
    return {option(name): getattr(a, name) for name in names if given(a, name)}
