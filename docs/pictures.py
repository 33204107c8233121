"""Runs the commands of generate.md that stand above a picture, and makes the pictures.

Needs the checkpoints of `make demo` and `make demo-control`; commands without theirs are left out.
What the commands are given is drawn first: a film of the demo's world, its first and last frame, a
mask of where its object is, its edges and its object's path.

    python docs/pictures.py [FOLDER]     # docs/pictures
"""

import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # sample.py

from demos import world  # noqa: E402
from demos.ways_report import box_around  # noqa: E402
from easyanimate_jax.commands import sample  # noqa: E402
from easyanimate_jax.data import media  # noqa: E402
from easyanimate_jax.data.control import canny  # noqa: E402

FILM = world.Attributes("blue", "white", "circle", "right", "quickly")
COMMAND = re.compile(
    r"```\npython sample\.py (.*?)\n```\n+!\[[^\]]*\]\(pictures/(\w+)\.png\)", re.S
)


def commands() -> dict[str, list[str]]:
    """The arguments of each command of generate.md, by the name of the picture below it."""
    text = (ROOT / "docs" / "generate.md").read_text()
    return {name: shlex.split(line.replace("\\\n", " ")) for line, name in COMMAND.findall(text)}


def draw_inputs(folder: Path) -> None:
    """The files that the commands are given."""
    (film,), (path,) = world.clips([world.caption(FILM)], 9, 128, 128, seed=0)
    media.write_video(folder / "film.mp4", film, crf=10)
    write_small(folder / "film.png", media.contact_sheet(film[None]))
    media.write_png(folder / "start.png", film[0])
    media.write_png(folder / "end.png", film[-1])
    media.write_png(folder / "hole.png", np.repeat(box_around(film)[0] * 255, 3, axis=-1))
    write_small(folder / "edges.png", media.contact_sheet(canny(film)[None]))
    spot = world.path_video(path, *film.shape[:3])
    write_small(folder / "spot.png", media.contact_sheet(spot[None]))
    (folder / "path.json").write_text(json.dumps([path.astype(float).round(1).tolist()]) + "\n")


def write_small(path: Path, picture: np.ndarray) -> None:
    """Half as high and wide."""
    Image.fromarray(picture).reduce(2).save(path)


def main(folder: Path) -> int:
    """Make all pictures in `folder`; returns 0, or the exit code of a command that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_inputs(folder)
    for name, arguments in commands().items():
        if not (ROOT / arguments[0] / "summary.json").is_file():
            print(f"left out: {name}, as {arguments[0]} is missing or unfinished")
            continue
        with tempfile.TemporaryDirectory() as output:
            code = sample.main([*arguments, "--output", output])
            if code:
                return code
            for path in sorted(Path(output).glob("*.png")):
                write_small(folder / f"{name}.png", media.read_image(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"))
