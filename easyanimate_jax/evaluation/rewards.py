"""Rewards: functions that rate videos of prompts, in this process or behind HTTP.

A reward takes frames (B, F, H, W, 3), uint8 or float in [-1, 1], and B prompts; it returns B
numbers, larger for better. A number that is missing is NaN. docs/posttraining.md has the protocol.

    reward = open_reward("my_rewards:aesthetic")         # a function of a module
    reward = open_reward("http://localhost:8000/score")  # a server

Nothing is pickled: a request is JSON, with each video as mp4 or npz in base64.
"""

import base64
import hashlib
import http.client
import io
import json
import logging
import math
import os
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from easyanimate_jax.data import media
from easyanimate_jax.facts import FPS, check_fields, to_bytes
from easyanimate_jax.storage.functions import named_function
from easyanimate_jax.storage.whole import replace_text

logger = logging.getLogger(__name__)

PAUSES = (1.0, 4.0, 16.0, 60.0)  # seconds between two requests of a batch; the last one repeats
AGAIN = (408, 425, 429)  # HTTP codes, besides those from 500 on, after which a request is repeated
MAX_ANSWER = 2**24  # bytes
CRF = 8  # of the mp4 that is sent: no difference can be seen
MAX_DROPPED = 0.05  # share of the prompts that may have no reward

Frames = UInt8[np.ndarray, "B F H W 3"] | Float[np.ndarray, "B F H W 3"]
Numbers = Float[np.ndarray, "B"]
Format = Literal["mp4", "npz"]


class RewardError(Exception):
    """A reward rates too few videos to go on."""


class RewardFunction(NamedTuple):
    """A reward that is a function of this process, named MODULE:FUNCTION.

    Raises ValueError if it does not return one number for each video.
    """

    name: str
    function: Callable

    def __call__(self, frames: Frames, prompts: Sequence[str]) -> Numbers:
        found = np.asarray(self.function(frames, list(prompts)), np.float64)
        if found.shape != (len(prompts),):
            raise ValueError(
                f"the reward {self.name} returned the shape {found.shape} for {len(prompts)} "
                f"videos; return one number for each"
            )
        return np.where(np.isfinite(found), found, np.nan)


@dataclass(frozen=True)
class RewardServer:
    """A reward behind HTTP. A call takes any number of videos, and sends `batch` at once.

    A number is NaN if the server does not answer in time after all `tries`, or if its answer for
    the video is missing, double or not finite. Answers with other ids are ignored. The environment
    variable REWARD_TOKEN, if it is set, is sent as a bearer token.
    """

    name: str
    """Address, http:// or https://."""

    batch: int = 8
    """Videos of a request."""

    seconds: float = 120.0
    """Time in seconds for the answer to a request."""

    tries: int = 5
    """Most requests for a batch. The pauses between them grow: 1 s, 4 s, 16 s, then 60 s."""

    format: Format = "mp4"
    """Form of the videos: mp4 is small; npz holds exactly the pixels."""

    fps: int = FPS
    """Frames per second of the videos."""

    def __post_init__(self):
        check_fields(self, batch="[1, inf)", seconds="(0, inf)", tries="[1, inf)", fps="[1, 120]")
        if not self.name.startswith(("http://", "https://")):
            raise ValueError(f"the reward's address {self.name!r} begins with no http(s)://")

    def __call__(self, frames: Frames, prompts: Sequence[str]) -> Numbers:
        found = []
        for first in range(0, len(prompts), self.batch):
            rows = slice(first, first + self.batch)
            found += self._some(frames[rows], prompts[rows])
        return np.array(found, np.float64)

    def check(self) -> None:
        """Raise `RewardError` unless the server answers a request of no video."""
        _, reason = self._ask([])
        if reason:
            raise RewardError(f"the reward {self.name} does not serve: {reason}")

    def _some(self, frames: Frames, prompts: Sequence[str]) -> list[float]:
        """Return the numbers of the videos of one request."""
        samples = []
        for video, prompt in zip(frames, prompts, strict=True):
            content = encoded(as_bytes(video), self.format, self.fps)
            digest = hashlib.blake2b(prompt.encode() + content, digest_size=12).hexdigest()
            video = base64.b64encode(content).decode()
            samples.append({"id": f"{len(samples)}-{digest}", "prompt": prompt, "video": video})
        answer, reason = self._ask(samples)
        wanted = [sample["id"] for sample in samples]
        rewards, faults = matched(wanted, answer) if not reason else ({}, [reason])
        if faults:
            logger.warning("the reward %s: %s", self.name, "; ".join(faults))
        return [rewards.get(one, math.nan) for one in wanted]

    def _ask(self, samples: list[dict]) -> tuple[object, str]:
        """Return (the answer as JSON, "") or (None, the reason why there is none)."""
        body = {"version": 1, "format": self.format, "fps": self.fps, "samples": samples}
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get("REWARD_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.name, json.dumps(body).encode(), headers)
        reason = ""
        for number in range(self.tries):
            if number:
                time.sleep(PAUSES[min(number, len(PAUSES)) - 1])
            try:
                return json.loads(self._read(request)), ""
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
                code = getattr(error, "code", 500)
                if code < 500 and code not in AGAIN:
                    return None, f"it refuses the request: {reason}"
            except (ValueError, RecursionError) as error:
                return None, f"its answer is no JSON: {error}"
        return None, f"no answer to {self.tries} requests: {reason}"

    def _read(self, request: urllib.request.Request) -> bytes:
        """Return the bytes of the answer. Raises TimeoutError if they are not complete in time."""
        end, parts = time.monotonic() + self.seconds, []
        with urllib.request.urlopen(request, timeout=self.seconds) as response:
            while part := response.read1(2**16):  # a timeout of the socket counts each read alone
                parts.append(part)
                if time.monotonic() > end:
                    raise TimeoutError(f"the answer took longer than {self.seconds:g} s")
                if sum(map(len, parts)) > MAX_ANSWER:
                    raise ValueError(f"it has more than {MAX_ANSWER:,} bytes")
        return b"".join(parts)


Reward = RewardFunction | RewardServer  # called with frames and prompts; it has a `name`


def matched(wanted: Sequence[str], answer: object) -> tuple[dict[str, float], list[str]]:
    """Return {id: number} of an answer {"rewards": [{"id": ..., "reward": ...}]}, and its faults.

    Only ids in `wanted` that come once, with a finite number, are in it.
    """
    rows = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        return {}, ['its answer is not {"rewards": [...]}']
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
    times, found, faults = Counter(row["id"] for row in rows), {}, []
    for row in rows:
        value = _number(row.get("reward"))
        if row["id"] not in wanted:
            faults.append(f"it answers for {row['id']!r}, which was not asked")
        elif times[row["id"]] > 1:
            faults.append(f"it answers {times[row['id']]} times for {row['id']}")
        elif not math.isfinite(value):
            told = str(row.get("reward"))[:40]
            faults.append(f"its reward of {row['id']} is {told!r}, no finite number")
        else:
            found[row["id"]] = value
    missing = [one for one in wanted if not times[one]]
    if missing:
        faults.append(f"it has no answer for {', '.join(missing)}")
    return found, list(dict.fromkeys(faults))


def _number(value: object) -> float:
    """Return a number of JSON; NaN for other values, and for numbers that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def open_reward(text: str, **settings) -> Reward:
    """Return the reward MODULE:FUNCTION, or that of a server http(s)://...

    `settings` are those of `RewardServer`; a function takes none of them. MODULE is looked for in
    the current folder too. Raises ValueError if there is no such function, and for another scheme.
    """
    if "://" in text:
        return RewardServer(text, **settings)
    return RewardFunction(text, named_function(text))


def as_bytes(frames: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Return frames as uint8. Raises ValueError for floats outside [-1, 1]."""
    if frames.dtype == np.uint8:
        return frames
    if not (np.abs(frames) <= 1 + 1e-3).all():
        raise ValueError("frames of floats must be from -1 to 1; uint8 is from 0 to 255")
    return np.asarray(to_bytes(np.clip(frames, -1, 1)))


def encoded(frames: UInt8[np.ndarray, "F H W 3"], form: Format, fps: int) -> bytes:
    """Return a video as the bytes of an mp4, or of an npz with the array `frames`."""
    if form == "npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=frames)
        return buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        media.write_video(path, frames, fps, crf=CRF)
        return path.read_bytes()


class Received:
    """The rewards that were received, kept in a file of JSON lines: (key of the video, number).

    A line that a kill cut short is removed.
    """

    def __init__(self, path: Path):
        self.path, self.rewards = path, {}
        text = path.read_text("utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self.rewards[row["key"]] = float(row["reward"])
            except (ValueError, KeyError, TypeError):
                continue
        lines = "".join(self._line(*row) for row in self.rewards.items())
        if lines != text:
            replace_text(path, lines)

    def add(self, rewards: dict[str, float]) -> None:
        """Append rewards; those that are not finite are left out."""
        new = {key: value for key, value in rewards.items() if math.isfinite(value)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(self._line(*row) for row in new.items()))
            file.flush()
            os.fsync(file.fileno())
        self.rewards |= new

    @staticmethod
    def _line(key: str, value: float) -> str:
        return json.dumps({"key": key, "reward": value}) + "\n"


def check_dropped(dropped: int, groups: int, name: str) -> None:
    """Raise `RewardError` if more than `MAX_DROPPED` of the groups of videos are dropped."""
    if dropped > MAX_DROPPED * groups:
        raise RewardError(
            f"{dropped} of {groups} prompts have a video without a reward of {name}, which is more "
            f"than {MAX_DROPPED:.0%}; the log says why. Repair the reward and run the same command "
            f"again, which asks only for what is missing"
        )
