"""Small films and pictures of animated emoji with English and Chinese captions, as training data.

    python -m demos.emoji OUT

fetches six packages with the ordinary npm client into `OUT/packages` (0.76 GB, once): 2,109 moving
emoji and 3,391 stills in one style, drawn by Microsoft, and their names in both languages. All are
declared MIT by their packagers. It writes them on white, 8 frames a second:

* `OUT/large/metadata.json`: films of 17 frames and stills, 96 pixels a side, six captions each;
* `OUT/small/metadata.json`: the same at 64 pixels, and `OUT/both.toml`, which names both;
* `OUT/texts/metadata.json`: more captions of the same emoji, for the text encoders alone;
* `OUT/wordings.json`: for each film a trained caption, and one in words of `HELD_OUT`, which no
  other file has, in both languages.
"""

import contextlib
import functools
import gzip
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from easyanimate_jax.commands.parse import registry, run
from easyanimate_jax.data.media import write_png, write_video
from easyanimate_jax.training.safety.exits import DONE

NAMES = "emojibase-data@17.0.0"
STILLS = "@lobehub/fluent-emoji-3d@1.1.0"
MOVING = tuple(f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4))

FPS, FRAMES = 8, 17
SIDES = {"small": 64, "large": 96}
CRF = 10  # of H.264: fine enough for small pictures
LONGEST = {"en": 16, "zh": 22}  # words and characters of a caption

TRAINED = {
    "en": ("{label}", "an animated emoji of {label}", "{label}, {tags}"),
    "zh": ("{label}", "{label}的动画表情", "{label}，{tags}"),
}
HELD_OUT = {
    "en": ("a short film that shows {label}", "please draw me {label} in motion"),
    "zh": ("请画一段{label}的短片", "我想看会动的{label}"),
}
OTHER = {  # only the text encoders read these
    "en": (
        "{tags}: {label}",
        "a cartoon of {label}",
        "{label} moves",
        "a small clip of the {label}",
        "the {label} on a white background",
        "I want to see {label}, {tags}",
        "{label} in 3D, {tags}",
        "make a funny video with {label}",
        "this is {label}",
        "a picture of {label}",
        "show me {label}",
        "a video of {label}",
        "could you draw {label}",
        "{label}, please",
        "an animation of {label}",
        "look at this {label}",
        "one {label} in the middle",
        "a tiny movie about {label}",
        "the film is about {label}",
        "a {label} that dances",
    ),
    "zh": (
        "{tags}：{label}",
        "{label}的卡通画",
        "{label}在动",
        "一个小小的{label}",
        "白色背景上的{label}",
        "给我看看{label}，{tags}",
        "三维的{label}，{tags}",
        "做一个有趣的{label}视频",
        "这是{label}",
        "一张{label}的图片",
        "画一个{label}",
        "{label}的视频",
        "关于{label}的小电影",
        "我喜欢{label}",
    ),
}


@dataclass(frozen=True)
class Emoji:
    """The names of an emoji: a label and tags in each language."""

    labels: dict[str, str]
    tags: dict[str, tuple[str, ...]]

    def say(self, language: str, template: str, seed: int = 0) -> str | None:
        """Return a caption; None if the template wants tags and there is no room for one."""
        label = self.labels[language]
        if "{tags}" not in template:
            return template.format(label=label)
        tags = [tag for tag in self.tags[language] if tag.lower() not in label.lower()]
        random.Random(seed).shuffle(tags)
        comma = {"en": ", ", "zh": "，"}[language]
        for count in range(min(3, len(tags)), 0, -1):
            said = template.format(label=label, tags=comma.join(tags[:count]))
            if (len(said.split()) if language == "en" else len(said)) <= LONGEST[language]:
                return said
        return None

    def captions(self, templates: dict[str, tuple[str, ...]], seed: int = 0) -> list[str]:
        """Return one caption for each template, English first, without the impossible ones."""
        made = (self.say(lang, one, seed) for lang in templates for one in templates[lang])
        return list(dict.fromkeys(filter(None, made)))


def plain(code: str) -> str:
    """Return the code points of an emoji as all packages agree on them: `1f441-200d-1f5e8`."""
    points = (point for point in code.lower().split("-") if point != "fe0f")
    return "-".join(f"{int(point, 16):x}" for point in points)


def fetch(package: str, folder: Path) -> Path:
    """Return the archive of an npm package, which npm fetches if it is not in `folder` yet.

    Raises ValueError if npm is missing or cannot fetch it.
    """
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if archive.is_file():
        return archive
    if shutil.which("npm") is None:
        raise ValueError(f"npm is missing: install Node.js, or put {archive.name} into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:  # a stopped npm leaves no half archive
        command = ["npm", "pack", "--silent", "--pack-destination", part, package]
        done = subprocess.run(command, capture_output=True, text=True)
        got = Path(part) / archive.name
        if done.returncode or not got.is_file():
            raise ValueError(f"npm cannot fetch {package}: {done.stderr.strip()[-500:]}")
        got.replace(archive)
    return archive


@contextlib.contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive of npm. Raise ValueError if it is damaged."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}): remove it to fetch it again") from error


def read_names(archive: Path) -> dict[str, Emoji]:
    """Return {code points: names} of emojibase's archive, with the variants of skin tones."""
    labels, tags = {}, {}
    with opened(archive) as tar:
        for lang in TRAINED:
            for row in json.load(tar.extractfile(f"package/{lang}/data.json")):
                for one in (row, *row.get("skins", ())):
                    code = plain(one["hexcode"])
                    labels.setdefault(code, {})[lang] = _clean(one["label"])
                    tags.setdefault(code, {})[lang] = tuple(map(_clean, row.get("tags", ())))
    return {code: Emoji(both, tags[code]) for code, both in labels.items() if len(both) == 2}


def _clean(words: str) -> str:
    chinese = bool(re.search("[\u4e00-\u9fff]", words))
    words = re.sub(r"\s*[:：]\s*", "，" if chinese else ", ", words)
    return re.sub(r"\s+", " ", words).strip()


def pictures(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (code points, WebP file) of each picture in a package, in the order of the archive."""
    with opened(archive) as tar:
        for member in tar:
            if member.name.endswith(".webp"):
                yield plain(Path(member.name).stem), tar.extractfile(member).read()


def frames_of(data: bytes, side: int) -> UInt8[np.ndarray, "F side side 3"] | None:
    """Return an animated picture on white: `FRAMES` frames at `FPS`, from its start, in a loop.

    The frame at time t is the last one that begins at or before t. Returns None for a still.
    """
    with Image.open(io.BytesIO(data)) as picture:
        count = getattr(picture, "n_frames", 1)
        if count == 1:
            return None
        shown, begins, time = [], [], 0
        for number in range(count):
            picture.seek(number)
            shown.append(_on_white(picture, side))
            begins.append(time)
            time += picture.info["duration"]
    wanted = (np.arange(FRAMES) * 1000 / FPS) % time
    return np.stack(shown)[np.searchsorted(begins, wanted, side="right") - 1]


def still_of(data: bytes, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Return a picture on white."""
    with Image.open(io.BytesIO(data)) as picture:
        return _on_white(picture, side)


def _on_white(picture: Image.Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))


def write_file(out: Path, code: str, data: bytes, kind: str) -> str | None:
    """Write a film or a still at both sizes; return its name, or None if it does not move."""
    name = f"films/{code}.mp4" if kind == "video" else f"stills/{code}.png"
    for folder, side in SIDES.items():
        if kind == "image":
            write_png(out / folder / name, still_of(data, side))
            continue
        frames = frames_of(data, side)
        if frames is None:
            return None
        write_video(out / folder / name, frames, FPS, crf=CRF)
    return name


def write_package(out: Path, known: frozenset[str], archive: Path, kind: str) -> dict[str, str]:
    """Write all pictures of one package whose names are known; return {code points: name}."""
    written = {}
    for code, data in pictures(archive):
        name = write_file(out, code, data, kind) if code in known else None
        if name:
            written[code] = name
    return written


def write_emoji(out: Path) -> tuple[int, int]:
    """Write the data set described above; return its number of films and of stills."""
    archives = [fetch(package, out / "packages") for package in tqdm([NAMES, STILLS, *MOVING])]
    named = read_names(archives[0])
    for folder in SIDES:
        for kind in ("films", "stills"):
            (out / folder / kind).mkdir(parents=True, exist_ok=True)
    write = functools.partial(write_package, out, frozenset(named))
    kinds = ["image"] + ["video"] * len(MOVING)
    with ProcessPoolExecutor() as pool:
        stills, *films = pool.map(write, archives[1:], kinds)
    films = dict(sorted((code, name) for part in films for code, name in part.items()))
    _write_tables(out, named, films, dict(sorted(stills.items())))
    return len(films), len(stills)


def _write_tables(out: Path, named: dict[str, Emoji], films: dict, stills: dict) -> None:
    def write(path, value):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False, indent=0) + "\n", "utf-8")

    rows = [
        {"file_path": name, "type": kind, "text": text}
        for kind, files in (("video", films), ("image", stills))
        for code, name in files.items()
        for text in named[code].captions(TRAINED)
    ]
    for folder in SIDES:
        write(out / folder / "metadata.json", rows)
    (out / "both.toml").write_text("".join(f'{name} = "{name}"\n' for name in SIDES), "utf-8")
    every = {lang: TRAINED[lang] + OTHER[lang] for lang in TRAINED}
    texts = [
        {"file_path": code, "text": text}
        for number, code in enumerate(sorted(films | stills))
        for text in named[code].captions(every, seed=number)
    ]
    write(out / "texts" / "metadata.json", texts)
    wordings = [
        {
            "file_path": films[code],
            "trained": {lang: named[code].say(lang, TRAINED[lang][1]) for lang in TRAINED},
            "held_out": {
                lang: named[code].say(lang, HELD_OUT[lang][number % len(HELD_OUT[lang])])
                for lang in HELD_OUT
            },
        }
        for number, code in enumerate(films)
    ]
    write(out / "wordings.json", wordings)


def main(out: tyro.conf.Positional[Path]) -> int:
    """Fetch animated emoji with npm, and write them as captioned films and stills.

    Args:
        out: folder to write
    """

    def work() -> int:
        films, stills = write_emoji(out)
        print(f"{films} films and {stills} stills in {out}")
        return DONE

    return run(work)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, registry=registry()))
