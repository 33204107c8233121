"""Rate videos of the captioned world by `score.py`, in this process or as an HTTP server.

    python -m demos.verifier --port 8765

It answers as docs/posttraining.md says under "A server". `--reward demos.verifier:rate` needs no
server. A rating is from 0 to 1. It has no gradient: most of its parts are 0 or 1. Two parts are
graded, so that videos of one prompt rarely have the same rating.
"""

import base64
import io
import json
import tempfile
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, UInt8

from demos.score import measure
from demos.world import DIRECTIONS, SPEEDS, Attributes, by_text
from easyanimate_jax.data import media

WEIGHTS = {  # of the parts of a rating; their sum is 1
    "shape": 0.25,
    "speed": 0.25,
    "colour": 0.1,
    "background": 0.1,
    "direction": 0.1,
    "outline": 0.15,
    "pace": 0.05,
}
CLOSE = 0.05  # a clear lead of the wanted shape's overlap; true clips have 0.08 to 0.2


def rate(frames: UInt8[np.ndarray, "B F H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, "B"]:
    """Return the rating of each video, from 0 to 1; NaN for a prompt that the world has not."""
    known = by_text()
    return np.array(
        [
            rating(video, known[prompt].attributes) if prompt in known else np.nan
            for video, prompt in zip(frames, prompts, strict=True)
        ]
    )


def rating(video: UInt8[np.ndarray, "F H W 3"], wanted: Attributes) -> float:
    """Return how well a video shows the attributes, from 0 to 1."""
    found = parts(video, wanted)
    return sum(weight * found[name] for name, weight in WEIGHTS.items())


def parts(video: UInt8[np.ndarray, "F H W 3"], wanted: Attributes) -> dict[str, float]:
    """Return the parts of a rating.

    Each attribute is 1 if it is right and 0 if not. "outline" is above 0.5 if the object overlaps
    more with the wanted shape than with any other, and "pace" is the smaller of the speeds, shown
    and wanted, over the larger.
    """
    shown, overlaps, velocity = measure(video)
    found = {name: float(getattr(shown, name) == value) for name, value in wanted._asdict().items()}
    lead = overlaps[wanted.shape] - max(v for name, v in overlaps.items() if name != wanted.shape)
    found["outline"] = float(1 / (1 + np.exp(-lead / CLOSE))) if shown.shape else 0.0
    found["pace"] = float(shown.direction is None)
    if wanted.direction:
        speed, target = velocity @ DIRECTIONS[wanted.direction], SPEEDS[wanted.speed]
        found["pace"] = float(max(min(speed / target, target / max(speed, 1e-9)), 0))
    return found


class Handler(BaseHTTPRequestHandler):
    """Answer POST requests with ratings."""

    def do_POST(self):
        """Answer with each video's rating, or with code 400 and the fault of the request."""
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rows = [_row(sample, asked["format"]) for sample in asked["samples"]]
            code, answer = 200, {"rewards": rows}
        except (ValueError, KeyError, TypeError, OSError) as error:
            code, answer = 400, {"error": f"{type(error).__name__}: {error}"}
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Write no line for each request."""


def _row(sample: dict, form: str) -> dict:
    """Return the answer for one video; null for a prompt that the world has not."""
    (value,) = rate(_frames(base64.b64decode(sample["video"]), form)[None], [sample["prompt"]])
    return {"id": sample["id"], "reward": None if np.isnan(value) else float(value)}


def _frames(content: bytes, form: str) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the frames of an npz or an mp4. Raises ValueError for another form."""
    if form == "npz":
        return np.load(io.BytesIO(content), allow_pickle=False)["frames"]
    if form != "mp4":
        raise ValueError(f"the format is {form!r}; send npz or mp4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        path.write_bytes(content)
        return media.read_clip(path, 0, media.probe(path).num_frames)


def main(port: int = 8765) -> None:
    """Serve ratings at http://127.0.0.1:PORT/ until the process ends."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"the verifier serves http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    tyro.cli(main)
