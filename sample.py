"""Make a video or a picture from a checkpoint folder.

  text to video    python sample.py runs/demo --prompt "a red circle moves to the left"
  text to picture  python sample.py runs/demo --prompt "..." --frames 1
  image to video   python sample.py runs/demo --prompt "..." --image start.png --end-image end.png

Every call adds NUMBER.mp4 (or .png), a contact sheet and NUMBER.json, which holds everything needed
to make it again. What cannot work is refused with one line and exit code 2, before a device starts.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import CELL, TIME_FACTOR, grid_of

FPS = 8
MAX_SEED = 2**32 - 1
INPAINT = 33  # input channels of a transformer that takes pictures


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"sample.py: {message}\n")


def parser() -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser("sample.py", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    p.add_argument("checkpoint", type=Path, help="folder of a training run")
    p.add_argument("--prompt", required=True, help="may be empty")
    p.add_argument("--negative-prompt", default="", help="what to keep away from (default: empty)")
    p.add_argument("--image", type=Path, help="first frame; stretched to the size")
    p.add_argument("--end-image", type=Path, help="last frame; stretched to the size")
    p.add_argument("--height", type=int, help="multiple of 16 (default: the run's)")
    p.add_argument("--width", type=int, help="multiple of 16 (default: the run's)")
    p.add_argument("--frames", type=int, help="4n+1; 1 makes a picture (default: the run's)")
    p.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    p.add_argument("--guidance", type=float, default=6.0, help="1 is none (default: 6)")
    p.add_argument("--rescale", type=float, default=0.0, help="of guidance, 0 to 1 (default: 0)")
    p.add_argument("--seed", type=int, default=43, help="same seed, same video (default: 43)")
    p.add_argument("--output", type=Path, default=Path("samples"), help="folder (default: samples)")
    return p


def check(a: argparse.Namespace) -> None:
    """Refuse what is wrong by itself; needs no checkpoint."""
    for name, sides in (("height", a.height), ("width", a.width)):
        if sides is not None and (sides < CELL or sides % CELL):
            raise ValueError(
                f"--{name} {sides} is not a multiple of {CELL}; use {near(sides, 0, CELL)}"
            )
    if a.frames is not None and (a.frames < 1 or a.frames % TIME_FACTOR != 1):
        raise ValueError(
            f"--frames {a.frames} is not 4n+1 (frame 0, then fours); use {near(a.frames, 1, 4)}"
        )
    if not 1 <= a.steps <= 1000:
        raise ValueError(f"--steps {a.steps} is not between 1 and 1000")
    if not (math.isfinite(a.guidance) and a.guidance >= 0):
        raise ValueError(
            f"--guidance {a.guidance} is not a number from 0 on; 6 is usual, 1 is none"
        )
    if not 0 <= a.rescale <= 1:
        raise ValueError(f"--rescale {a.rescale} is not between 0 and 1")
    if not 0 <= a.seed <= MAX_SEED:
        raise ValueError(f"--seed {a.seed} is not between 0 and {MAX_SEED}")
    for name, prompt in (("prompt", a.prompt), ("negative-prompt", a.negative_prompt)):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--{name} is not UTF-8 text; save and pass it as UTF-8") from error
    if (a.image or a.end_image) and a.frames == 1:
        raise ValueError(
            "--frames 1 makes one picture, and pictures are given; use 5 frames or more"
        )
    if not a.checkpoint.is_dir():
        raise ValueError(f"there is no checkpoint folder {a.checkpoint}; give the folder of a run")
    if a.output.exists() and not a.output.is_dir():
        raise ValueError(f"--output {a.output} is a file; name a folder")


def near(value: int, offset: int, step: int) -> str:
    """The possible numbers on both sides of `value`."""
    low = (value - offset) // step * step + offset
    smallest = offset or step
    return f"{low} or {low + step}" if low >= smallest else str(smallest)


def read_pictures(a: argparse.Namespace) -> dict[str, np.ndarray]:
    """The given pictures as (1, H, W, 3), keyed by their place in the video."""
    paths = {"start": a.image, "end": a.end_image}
    return {place: media.read_image(path)[None] for place, path in paths.items() if path}


def fit(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretched to the size, bicubic, as the reference does; a picture of that size stays."""
    picture = Image.fromarray(pictures[0])
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))[None]


def complete(a: argparse.Namespace, meta: dict) -> None:
    """Fill in the run's own size, and refuse what this checkpoint cannot do."""
    samples = meta["config"]["samples"]
    for name in ("height", "width", "frames"):
        if getattr(a, name) is None:
            setattr(a, name, samples[name])
    grid_of(a.frames, a.height, a.width)
    channels = meta["in_channels"]
    if (a.image or a.end_image) and channels != INPAINT:
        raise ValueError(
            f"{a.checkpoint} takes no pictures: its transformer has {channels} input channels, "
            f"and image-to-video needs {INPAINT}; leave --image and --end-image out"
        )
    if (a.image or a.end_image) and a.frames == 1:
        raise ValueError("the run makes pictures (1 frame), and pictures are given; add --frames 5")


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    try:
        check(a)
        pictures = read_pictures(a)
        # JAX is imported here, and no device is touched before `load_run`.
        from easyanimate_jax.runs import load_run
        from easyanimate_jax.training.checkpoint import read_meta

        step, meta = read_meta(a.checkpoint)
        complete(a, meta)
        a.output.mkdir(parents=True, exist_ok=True)
        from easyanimate_jax.text.encode import TextEncoder

        run = load_run(a.checkpoint)
        encoder = TextEncoder.load(run.config.text)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2

    for name, prompt in (("prompt", a.prompt), ("negative-prompt", a.negative_prompt)):
        if encoder.is_cut(prompt):
            print(f"sample.py: --{name} is too long, its end is not used", file=sys.stderr)
    pictures = {place: fit(p, a.height, a.width) for place, p in pictures.items()}
    began = time.perf_counter()
    frames = generate(a, run, encoder, pictures)
    path = write(a, frames, record(a, step, meta, time.perf_counter() - began))
    print(path)
    return 0


def generate(a: argparse.Namespace, run, encoder, pictures: dict[str, np.ndarray]) -> np.ndarray:
    """(F, H, W, 3) uint8."""
    import jax
    from tqdm import tqdm

    from easyanimate_jax.pipelines import image_to_video, text_to_video

    options = {
        "frames": a.frames,
        "height": a.height,
        "width": a.width,
        "seeds": [a.seed],
        "steps": a.steps,
        "guidance": a.guidance,
        "rescale": a.rescale,
    }
    pipeline = image_to_video if pictures else text_to_video
    with tqdm(total=a.steps, desc="denoising", unit="step") as bar:
        videos = pipeline(
            run.model,
            run.vae,
            run.config.process,
            encoder.encode([a.prompt]),
            encoder.encode([a.negative_prompt]),
            **pictures,
            **options,
            progress=lambda number: bar.update(int(number) - bar.n),
        )
        jax.effects_barrier()
    return videos[0]


def record(a: argparse.Namespace, step: int, meta: dict, seconds: float) -> dict:
    """Everything needed to make the sample again."""
    import jax

    paths = {"--image": a.image, "--end-image": a.end_image}
    given = {name: path for name, path in paths.items() if path}
    options = {"--prompt": a.prompt, "--negative-prompt": a.negative_prompt, **given}
    for name in ("height", "width", "frames", "steps", "guidance", "rescale", "seed", "output"):
        options[f"--{name}"] = getattr(a, name)
    words = [f"{name}={value}" for name, value in options.items()]
    return {
        "command": shlex.join(["python", "sample.py", str(a.checkpoint), *words]),
        "options": {name.removeprefix("--"): str(value) for name, value in options.items()},
        "pictures_sha256": {
            name.removeprefix("--"): hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in given.items()
        },
        "checkpoint": str(a.checkpoint.absolute()),
        "step": step,
        "seconds": round(seconds, 2),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "numpy", "easyanimate_jax")},
        **meta,
    }


def write(a: argparse.Namespace, frames: np.ndarray, sidecar: dict) -> Path:
    """The next free number's video or picture, contact sheet and sidecar."""
    taken = [int(p.stem) for p in a.output.glob("*.json") if p.stem.isdigit()]
    stem = f"{max(taken, default=0) + 1:08d}"
    if len(frames) == 1:
        path = a.output / f"{stem}.png"
        media.write_png(path, frames[0])
    else:
        path = a.output / f"{stem}.mp4"
        media.write_video(path, frames, fps=FPS)
        media.write_png(a.output / f"{stem}_sheet.png", media.contact_sheet(frames[None]))
    sidecar = json.dumps({"file": path.name, **sidecar}, indent=1, ensure_ascii=False)
    (a.output / f"{stem}.json").write_text(sidecar + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
