"""Make videos and pictures from a checkpoint folder.

  text to video    sample.py runs/demo/train --prompt "a red circle moves to the left"
  text to picture  sample.py RUN --prompt "..." --frames 1
  image to video   sample.py RUN --prompt "..." --image start.png --end-image end.png
  longer           sample.py RUN --prompt "..." --frames 97 --segment 49
  video to video   sample.py RUN --prompt "..." --video film.mp4 --strength 0.7
  inpainting       sample.py RUN --prompt "..." --video film.mp4 --mask hole.png
  control          sample.py RUN --prompt "..." --control film.mp4 --operator canny
  camera           sample.py RUN --prompt "..." --camera poses.txt --reference look.png
  many             sample.py RUN --prompts lines.jsonl

Adds NUMBER.mp4 (or .png), a contact sheet and NUMBER.json, which holds all that is needed to make
it again. What cannot work is refused in one line with exit code 2, before a device starts.
"""

import argparse
import copy
import hashlib
import json
import math
import shlex
import sys
import time
import warnings
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import check_size, whole_frames
from easyanimate_jax.evaluation.guard import suspicion

FPS = 8
MAX_SEED = 2**32 - 1
NEW = 240  # grey of a mask from which on the video is made anew (spec 6.6)
TASKS = {  # input channels of the transformer -> what it was trained for
    16: "text to video",
    33: "inpainting",
    32: "control",
    48: "control with a reference",
    38: "camera",
}
TAKES = {  # what may be given to whom
    "image": (33,),
    "end_image": (33,),
    "video": (16, 33),
    "mask": (16, 33),
    "control": (32, 48),
    "trajectory": (32, 48),
    "camera": (38,),
    "reference": (48, 38),
    "segment": (33,),
}
FILES = ("image", "end_image", "video", "mask", "control", "trajectory", "camera", "reference")
WORDS = ("prompt", "negative_prompt", "operator")
NUMBERS = ("height", "width", "frames", "segment", "seed")
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
NEEDS = (("mask", "video"), ("strength", "video"), ("operator", "control"))
SETTINGS = (  # of the whole command, kept in the sidecar
    *("steps", "sampler", "eta", "guidance", "rescale", "guided", "guidance_every"),
    *("teacache", "picture_noise"),
)


SAMPLERS = "V5: ddim, euler, euler_a, dpm++, pndm; V5.1: euler, adams (the first)"
GUIDED = "share of the steps with guidance (0 1)"
PICTURE_NOISE = "on given pictures; with more the video moves more (0.0563)"


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"sample.py: {message}\n")


def parser() -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser(
        "sample.py",
        description=__doc__,
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
    add("--camera", metavar="FILE", help="pose file")
    add("--reference", metavar="FILE", help="what a controlled video looks like")
    add = p.add_argument_group("size").add_argument
    add("--height", type=int, metavar="N", help="multiple of 16 (the run's)")
    add("--width", type=int, metavar="N", help="multiple of 16 (the run's)")
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
    found = []
    for number, text in enumerate(a.prompts.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        one = copy.copy(a)
        one.line, one.where = number, f"{a.prompts}, line {number}: "
        try:
            line = json.loads(text)
        except ValueError as error:
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
    check_size(1 if a.frames is None else a.frames, a.height or 16, a.width or 16)
    for name in ("height", "width"):
        if getattr(a, name) == 0:
            raise ValueError(f"--{name} 0: use 16 or more")
    if a.segment is not None:
        check_size(a.segment, 16, 16)
        if a.segment < 9:
            raise ValueError(f"--segment {a.segment}: segments share 4 frames; use 9 or more")
    for name, low, high in (
        ("steps", 1, 1000),
        ("guidance", 0, 100),
        ("rescale", 0, 1),
        ("picture_noise", 0, 1),
        ("seed", 0, MAX_SEED),
        ("strength", 0, 1),
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


def given(a: argparse.Namespace, name: str) -> bool:
    return getattr(a, name) is not None


def option(name: str) -> str:
    return name.replace("_", "-")


def complete(a: argparse.Namespace, meta: dict) -> None:
    """Fill in the run's own size, and refuse what this checkpoint cannot do."""
    samples, channels = meta["config"]["samples"], meta["in_channels"]
    for name, takers in TAKES.items():
        if given(a, name) and channels not in takers:
            raise ValueError(
                f"{a.checkpoint} was trained for {TASKS[channels]} ({channels} input channels), "
                f"and --{option(name)} needs {' or '.join(map(str, takers))}; leave it out"
            )
    if channels not in (16, 33) and not any(given(a, name) for name in STARTS):
        wanted = "--camera" if channels == 38 else "--control or --trajectory"
        raise ValueError(f"{a.checkpoint} was trained for {TASKS[channels]}: give {wanted}")
    film = a.video or a.control
    if film and a.frames is None:
        a.frames = whole_frames(min(samples["frames"], film_frames(film)))
    for name in ("height", "width", "frames"):
        if getattr(a, name) is None:
            setattr(a, name, samples[name])
    check_size(a.frames, a.height, a.width)
    if (a.image or a.end_image) and a.frames == 1:
        raise ValueError("the run makes pictures (1 frame), and pictures are given; add --frames 5")
    if a.strength is None and a.video:
        a.strength = 1.0 if a.mask else 0.7
    if a.strength == 1 and a.video and not a.mask:
        raise ValueError("--strength 1 without --mask keeps nothing of the video; use less")


def film_stride(fps: float) -> int:
    """Every how many frames of a film one is taken for 8 a second (spec 6.6)."""
    return max(1, int(fps // FPS))


def film_frames(path: str) -> int:
    """How many frames at 8 a second a film has."""
    probe = media.probe(Path(path))
    return -(-probe.num_frames // film_stride(probe.fps))


def read_inputs(a: argparse.Namespace) -> dict[str, np.ndarray]:
    """The pipeline's arrays for one request, (F, H, W, C) or (H, W, C), at the request's size."""
    inputs = {}
    for name, argument in (("image", "start"), ("end_image", "end"), ("reference", "reference")):
        if given(a, name):
            picture = media.read_image(Path(getattr(a, name)))
            inputs[argument] = stretch(picture[None], a, Image.Resampling.BICUBIC)[0]
    if a.video:
        inputs["video"] = read_film(a.video, a)
    if a.mask:
        inputs["mask"] = read_mask(a)
    if a.control:
        inputs["control"] = read_film(a.control, a)
        if a.operator:
            from easyanimate_jax.data.control import control_video

            inputs["control"] = control_video(inputs["control"], a.operator)
    if a.trajectory:
        inputs["control"] = read_trajectory(a)
    if a.camera:
        from easyanimate_jax.data.control import pluecker_rays, read_camera, sampled_camera

        camera = sampled_camera(read_camera(a.camera), a.frames)
        inputs["camera"] = pluecker_rays(camera, a.height, a.width)
    return inputs


def stretch(frames: np.ndarray, a: argparse.Namespace, how) -> np.ndarray:
    """Resized to the request's size without regard to the aspect, as the reference does."""
    resized = (Image.fromarray(x).resize((a.width, a.height), how) for x in frames)
    return np.stack([np.asarray(x) for x in resized])


def read_film(path: str, a: argparse.Namespace) -> np.ndarray:
    """The first frames of a film at 8 a second."""
    have = film_frames(path)
    if have < a.frames:
        raise ValueError(
            f"{path} has {have} frames at {FPS} a second, and {a.frames} are asked for; use "
            f"--frames {whole_frames(have)}"
        )
    stride = film_stride(media.probe(Path(path)).fps)
    frames = media.read_clip(Path(path), 0, a.frames, stride)
    return stretch(frames, a, Image.Resampling.BILINEAR)


def read_mask(a: argparse.Namespace) -> np.ndarray:
    """1 where it is white; a picture holds for all frames."""
    mask, video = (media.probe(Path(path)) for path in (a.mask, a.video))
    if (mask.height, mask.width) not in ((video.height, video.width), (a.height, a.width)):
        raise ValueError(
            f"{a.mask} is {mask.height}x{mask.width}, and {a.video} is "
            f"{video.height}x{video.width}; draw the mask on a frame of the video"
        )
    if mask.kind == "video":
        frames = read_film(a.mask, a)
    else:
        picture = media.read_image(Path(a.mask))[None]
        frames = np.repeat(stretch(picture, a, Image.Resampling.BILINEAR), a.frames, axis=0)
    new = (frames.mean(axis=-1, keepdims=True) >= NEW).astype(np.uint8)
    if not new.any():
        raise ValueError(f"{a.mask} is white nowhere, so nothing would be made anew")
    return new


def read_trajectory(a: argparse.Namespace) -> np.ndarray:
    from easyanimate_jax.data.control import trajectory_video

    try:
        paths = [
            np.array(path, float).reshape(-1, 2)
            for path in json.loads(Path(a.trajectory).read_text())
        ]
        usable = bool(paths) and all(len(p) and np.isfinite(p).all() for p in paths)
    except (ValueError, TypeError):
        usable = False
    if not usable:
        raise ValueError(f"{a.trajectory} is no JSON list of paths, as [[[10, 20], [50, 20]]]")
    return trajectory_video(paths, a.frames, a.height, a.width)


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    where = ""
    try:
        todo = requests(a)
        for one in todo:
            where = one.where
            check(one)
        # JAX is imported here, and no device is touched before `load_run`.
        from easyanimate_jax.config import from_json
        from easyanimate_jax.denoising import Sampling, make_tables
        from easyanimate_jax.runs import load_run
        from easyanimate_jax.training.checkpoint import read_meta

        step, meta = read_meta(a.checkpoint)
        sampling = Sampling(
            **{
                name: getattr(a, name)
                for name in SETTINGS
                if name not in ("guided", "picture_noise")
            },
            guided=tuple(a.guided),
        )
        process = from_json(json.dumps(meta["config"]["process"]))
        for one in todo:
            where = one.where
            complete(one, meta)
            strength = 1.0 if one.strength is None else one.strength
            one.evaluations = int(make_tables(process, sampling, strength).count)
            read_inputs(one)  # tried now, read again when its turn comes: films are large
        where = ""
        a.output.mkdir(parents=True, exist_ok=True)
        done = finished(a.output)
        todo = [one for one in todo if one.line is None or identity(one, step) not in done]
        from easyanimate_jax.text.encode import TextEncoder

        run = load_run(a.checkpoint)
        encoder = TextEncoder.load(run.config.text)
    except (ValueError, OSError) as error:
        print(f"sample.py: {where}{error}", file=sys.stderr)
        return 2

    warn(a, todo, encoder)
    for _, alike in groupby(todo, key=shape_of):
        alike = list(alike)
        for first in range(0, len(alike), a.batch):
            rows = alike[first : first + a.batch]
            began = time.perf_counter()
            videos = generate(rows, run, encoder, sampling)
            seconds = (time.perf_counter() - began) / len(rows)
            for one, frames in zip(rows, videos, strict=True):
                print(write(one, frames, record(one, step, meta, seconds)))
                if problem := suspicion(frames):
                    print(f"sample.py: {one.where}{problem}", file=sys.stderr)
    return 0


def warn(a: argparse.Namespace, todo: list[argparse.Namespace], encoder) -> None:
    """What works, and not as its user may think."""
    if a.sampler == "pndm":
        print(
            "sample.py: pndm starts as if a little of the video were known; ddim fits better",
            file=sys.stderr,
        )
    for one in todo:
        for name in ("prompt", "negative_prompt"):
            if encoder.is_cut(getattr(one, name)):
                print(
                    f"sample.py: {one.where}--{option(name)} is too long, its end is not used",
                    file=sys.stderr,
                )


def shape_of(a: argparse.Namespace) -> tuple:
    """Requests of one shape can be made at once."""
    names = tuple(name for name in (*FILES, "segment") if given(a, name))
    return names, a.frames, a.height, a.width, a.strength, a.segment


def generate(rows: list[argparse.Namespace], run, encoder, sampling) -> np.ndarray:
    """(B, F, H, W, 3) uint8."""
    import jax
    from tqdm import tqdm

    from easyanimate_jax import pipelines

    a = rows[0]
    parts = [read_inputs(one) for one in rows]
    inputs = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    size = {"frames": a.frames, "height": a.height, "width": a.width}
    noise = {"picture_noise": a.picture_noise}
    if a.video:
        pipeline, options = pipelines.video_to_video, {"strength": a.strength} | noise
    elif any(given(a, name) for name in STARTS):
        pipeline, options = pipelines.control_to_video, size
    elif a.segment and a.frames > a.segment:
        pipeline, options = pipelines.long_video, {"segment": a.segment} | size
    elif inputs:
        pipeline, options = pipelines.image_to_video, noise | size
    else:
        pipeline, options = pipelines.text_to_video, size
    total = a.evaluations
    if pipeline is pipelines.long_video:
        total *= len(pipelines.segments(a.frames, a.segment))
    bar = tqdm(desc="denoising", unit="step", total=total)
    with bar, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        videos = pipeline(
            run.model,
            run.vae,
            run.config.process,
            encoder.encode([one.prompt for one in rows]),
            encoder.encode([one.negative_prompt for one in rows]),
            **inputs,
            **options,
            seeds=[one.seed for one in rows],
            sampling=sampling,
            progress=lambda number: bar.update(),
        )
        jax.effects_barrier()
    for warning in told:
        print(f"sample.py: {warning.message}", file=sys.stderr)
    return videos


def options_of(a: argparse.Namespace) -> dict:
    """Everything that a request says, by the names of the command line."""
    names = (*LINE_KEYS, *SETTINGS)
    return {option(name): getattr(a, name) for name in names if given(a, name)}


def identity(a: argparse.Namespace, step: int) -> str:
    """Equal for equal lines of a prompt file: they are not made twice."""
    parts = [str(a.checkpoint.absolute()), step, a.line, options_of(a)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished(folder: Path) -> set[str]:
    """The identities of the samples in `folder`; the sidecar is written last."""
    sidecars = (p for p in folder.glob("*.json") if p.stem.isdigit())
    return {json.loads(p.read_text(encoding="utf-8")).get("identity") for p in sidecars}


def record(a: argparse.Namespace, step: int, meta: dict, seconds: float) -> dict:
    """Everything needed to make the sample again."""
    import jax

    options, words = options_of(a), []
    for name, value in (options | {"output": str(a.output)}).items():
        several = isinstance(value, list | tuple)
        words += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    files = {option(name): Path(getattr(a, name)) for name in FILES if given(a, name)}
    return {
        "command": shlex.join(["python", "sample.py", str(a.checkpoint), *words]),
        "options": options,
        "files_sha256": {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()},
        "checkpoint": str(a.checkpoint.absolute()),
        "identity": identity(a, step),
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
    path = a.output / f"{stem}{'.png' if len(frames) == 1 else '.mp4'}"
    sidecar = {"file": path.name, **sidecar}
    text = json.dumps(sidecar, indent=1, ensure_ascii=False)
    if len(frames) == 1:
        media.write_png(path, frames[0])
    else:
        media.write_video(path, frames, fps=FPS, comment=json.dumps(sidecar, ensure_ascii=False))
        media.write_png(a.output / f"{stem}_sheet.png", media.contact_sheet(frames[None]))
        if a.gif:
            media.write_gif(a.output / f"{stem}.gif", frames, fps=FPS)
    (a.output / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
