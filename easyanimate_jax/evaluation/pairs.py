"""Pairs of videos by their rewards: the best and the worst of each prompt, and their page."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.evaluation import web

SHOWN = 24  # pairs on the page
WIDTH = 320  # pixels of a video on the page

Read = Callable[[str], UInt8[np.ndarray, "F H W 3"]]


class Group(NamedTuple):
    """The videos of one prompt and their rewards; NaN is a reward that is missing."""

    prompt: str
    files: tuple[str, ...]  # relative to the folder of the results
    rewards: tuple[float, ...]

    @property
    def dropped(self) -> bool:
        """Return whether a reward of the group is missing, so that it gives no pair."""
        return not np.isfinite(self.rewards).all()

    @property
    def row(self) -> dict | None:
        """Return the pair as a row of `metadata.json`: the first best and the first worst video.

        None if all rewards are equal, or if the group is dropped.
        """
        if self.dropped or min(self.rewards) == max(self.rewards):
            return None
        best, worst = int(np.argmax(self.rewards)), int(np.argmin(self.rewards))
        return {
            "file_path": self.files[best],
            "worse_file_path": self.files[worst],
            "text": self.prompt,
            "type": "video",
            "reward": self.rewards[best],
            "worse_reward": self.rewards[worst],
        }


def summary(groups: Sequence[Group]) -> dict:
    """Return the numbers of prompts, videos, pairs, ties and dropped prompts, and mean rewards."""
    kept = [group for group in groups if not group.dropped]
    rows = [row for group in kept if (row := group.row)]
    found = {
        "prompts": len(groups),
        "videos": sum(len(group.files) for group in groups),
        "pairs": len(rows),
        "ties": len(kept) - len(rows),
        "dropped": len(groups) - len(kept),
    }
    if rows:
        found["mean of all"] = float(np.mean([r for group in kept for r in group.rewards]))
        found["mean of the better"] = float(np.mean([row["reward"] for row in rows]))
        found["mean of the worse"] = float(np.mean([row["worse_reward"] for row in rows]))
    return found


def page(title: str, reward: str, groups: Sequence[Group], read: Read) -> str:
    """Return the HTML page; `read(file)` returns the frames of a video.

    It shows `SHOWN` pairs at most, from the largest difference of rewards to the smallest.
    """
    rows = sorted(filter(None, (group.row for group in groups)), key=_gap, reverse=True)
    picks = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int)
    gaps = [_gap(row) for row in rows]
    chart = web.line_chart(
        {"difference": ([float(n + 1) for n in range(len(gaps))], gaps)},
        x_label="pairs, by difference",
    )
    numbers = web.table(["", "value"], list(summary(groups).items()))
    about = web.note(f"Rewards of {reward}. A prompt with a missing reward is dropped.")
    return web.page(
        title,
        [
            ("Figures", numbers + about),
            ("Difference of the rewards of a pair", chart),
            ("Pairs, the better one left", "".join(_pair(rows[i], read) for i in picks)),
        ],
    )


def _gap(row: Mapping) -> float:
    return row["reward"] - row["worse_reward"]


def _pair(row: Mapping, read: Read) -> str:
    shown = []
    for name, reward in (("file_path", "reward"), ("worse_file_path", "worse_reward")):
        frames = read(row[name])
        caption = f"{row[reward]:.4g} ({row[name]})"
        shown.append(web.video(frames, caption, WIDTH / frames.shape[2]))
    return f"<div>{web.note(row['text'])}{''.join(shown)}</div>"
