"""Make pairs for preference: sample several videos of each prompt, rate them, and pair them.

    OUT/videos/KEY-SEED.mp4   a video; KEY is of its prompt
    OUT/rewards.jsonl         the rewards that were received, by the content of prompt and video
    OUT/metadata.json         the pairs, a source for `prepare` (docs/data.md)
    OUT/index.html            pairs side by side
    OUT/settings.json         model and sampling of the videos

A call that was stopped goes on: a video that exists is not made again, and a reward that was
received is not asked for again. More prompts and a larger count add to the folder.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from easyanimate_jax.data import media
from easyanimate_jax.data.contents import key
from easyanimate_jax.data.sources.rows import caption_of
from easyanimate_jax.evaluation import pairs
from easyanimate_jax.evaluation.pairs import Group
from easyanimate_jax.evaluation.rewards import Received, Reward, RewardServer, check_dropped
from easyanimate_jax.runs.evaluate import Asked, begin, make_films
from easyanimate_jax.runs.load import Pipeline
from easyanimate_jax.runs.parts import Opened
from easyanimate_jax.storage import whole

logger = logging.getLogger(__name__)

VIDEOS = "videos"


class PairMaker:
    """Prompts, a model that makes `count` videos of each, a reward, and the folder of the results.

    `run` is the pipeline of `opened`. `size` is (frames, height, width) of the videos. Video n of a
    prompt has the seed `asked.seed` + n.
    """

    def __init__(
        self,
        opened: Opened,
        run: Pipeline,
        prompts: Sequence[str],
        reward: Reward,
        output: Path,
        *,
        count: int,
        size: tuple[int, int, int],
        asked: Asked,
    ):
        self.opened, self.run, self.reward, self.output = opened, run, reward, output
        self.prompts, self.count, self.size, self.asked = list(prompts), count, size, asked
        self.rewards: dict[tuple[str, int], float] = {}
        self.keys: dict[tuple[str, int], str] = {}  # of the rewards of videos that exist

    def make(self) -> list[str]:
        """Write videos, rewards, pairs and the page; return the figures as lines.

        Raises ValueError for a folder that was begun with other settings and if no prompt gives a
        pair, and `RewardError` if too many rewards are missing.
        """
        (self.output / VIDEOS).mkdir(parents=True, exist_ok=True)
        for folder in (self.output, self.output / VIDEOS):
            whole.remove_left(folder)
        begin(self.output, self.opened, self.asked, size=self.size, fps=self.asked.fps)
        received = Received(self.output / "rewards.jsonl")
        todo = [(p, n, path) for p, n in self._all() if not (path := self._path(p, n)).is_file()]
        if isinstance(self.reward, RewardServer) and (todo or self._unrated(received)):
            self.reward.check()  # before hours of sampling
        if todo:
            self._warn_cut()
            make_films(self.run, todo, self.size, self.asked)
        self._rate(received)
        groups = [self._group(prompt) for prompt in self.prompts]
        rows = [row for group in groups if (row := group.row)]
        if not rows:
            raise ValueError(
                f"no prompt gives a pair: all videos of each have the same reward of "
                f"{self.reward.name}; use another reward, or a larger --count"
            )
        text = pairs.page(str(self.opened.path), self.reward.name, groups, self._read)
        whole.replace_text(self.output / "index.html", text)
        whole.replace_text(
            self.output / "metadata.json", json.dumps(rows, indent=1, ensure_ascii=False)
        )
        return [f"{name:<20}{value:g}" for name, value in pairs.summary(groups).items()]

    def _warn_cut(self) -> None:
        cut = [prompt for prompt in self.prompts if self.run.encoder.is_cut(prompt)]
        if cut:
            logger.warning(
                "the end of %d prompts is not used, because they are too long for a text encoder: "
                "%r and others",
                len(cut),
                cut[0],
            )

    def _all(self) -> list[tuple[str, int]]:
        return [(prompt, number) for prompt in self.prompts for number in range(self.count)]

    def _name(self, prompt: str, number: int) -> str:
        return f"{VIDEOS}/{key(prompt)[:16]}-{self.asked.seed + number}.mp4"

    def _path(self, prompt: str, number: int) -> Path:
        return self.output / self._name(prompt, number)

    def _read(self, name: str) -> UInt8[np.ndarray, "F H W 3"]:
        return media.read_clip(self.output / name, 0, self.size[0], 1)

    def _key(self, prompt: str, number: int) -> str:
        """Return the key of a video's reward."""
        if (prompt, number) not in self.keys:
            content = hashlib.blake2b(self._path(prompt, number).read_bytes(), digest_size=16)
            self.keys[prompt, number] = key(self.reward.name, prompt, content.hexdigest())
        return self.keys[prompt, number]

    def _unrated(self, received: Received) -> bool:
        """Return whether a video that exists has no reward."""
        keys = (self._key(*one) for one in self._all() if self._path(*one).is_file())
        return any(one not in received.rewards for one in keys)

    def _rate(self, received: Received) -> None:
        """Ask for the missing rewards, a prompt at a time, and keep them."""
        dropped = 0
        with tqdm(total=len(self.prompts), desc="rewards", unit="prompt") as progress:
            for prompt in self.prompts:
                keys = {n: self._key(prompt, n) for n in range(self.count)}
                missing = [n for n, one in keys.items() if one not in received.rewards]
                if missing:
                    frames = np.stack([self._read(self._name(prompt, n)) for n in missing])
                    found = self.reward(frames, [prompt] * len(missing)).tolist()
                    received.add({keys[n]: value for n, value in zip(missing, found, strict=True)})
                values = {n: received.rewards.get(one, math.nan) for n, one in keys.items()}
                self.rewards |= {(prompt, n): value for n, value in values.items()}
                dropped += any(map(math.isnan, values.values()))
                check_dropped(dropped, len(self.prompts), self.reward.name)
                progress.update()

    def _group(self, prompt: str) -> Group:
        numbers = range(self.count)
        files = tuple(self._name(prompt, n) for n in numbers)
        return Group(prompt, files, tuple(self.rewards[prompt, n] for n in numbers))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line; a prompt that comes twice counts once.

    Raises ValueError, with the line, for a prompt that cannot be a caption, and for an empty file.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts {path} is not a text file in UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    for number, line in enumerate(lines, 1):
        if line.strip() and (reason := caption_of(line.strip())):
            raise ValueError(f"--prompts {path}: line {number}: {reason}")
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt")
    return list(dict.fromkeys(prompts))
