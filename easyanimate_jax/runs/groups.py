"""Sampled videos with rewards, for updates of `NegativeAwareFinetuning`.

    RUN/rewards.jsonl   the rewards that were received, by the content of caption and video

An update samples the same videos again when it is repeated, as after a stop. Their rewards are then
those of the file, because a server need not give the same answer twice.
"""

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from easyanimate_jax.data.contents import key
from easyanimate_jax.data.loader import Batch, Group, Loader, captions
from easyanimate_jax.evaluation.rewards import (
    MAX_DROPPED,
    Received,
    Reward,
    RewardError,
    RewardServer,
    open_reward,
)
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.runs.programs import Programs
from easyanimate_jax.training.checkpoint import StorageError
from easyanimate_jax.training.post.nft import advantages
from easyanimate_jax.training.post.objectives import NegativeAwareFinetuning
from easyanimate_jax.training.program import batch_shardings, samples_groups
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import TrainState

WINDOW = 100  # captions of which at most the share `MAX_DROPPED` may have no reward
AT_ONCE = 4  # captions for which a server is asked at the same time


def check_groups(config: TrainConfig, loaders: Mapping[str, Loader]) -> None:
    """Raise an error if a stage cannot sample and rate videos.

    That is ValueError for a set without captions, and `RewardError` for a server that does not
    answer.
    """
    for stage in filter(samples_groups, config.stages):
        captions(loaders[stage.name], 0)
        for reward in _open(config, stage):
            if isinstance(reward, RewardServer) and jax.process_index() == 0:
                reward.check()


class GroupSampler:
    """Samples videos of the captions of a batch, and has them rated."""

    def __init__(
        self,
        config: TrainConfig,
        meshes: Mapping[str, Mesh],
        loaders: Mapping[str, Loader],
        programs: Programs,
        monitor: Monitor,
    ):
        self.meshes, self.loaders = meshes, loaders
        self.programs, self.monitor = programs, monitor
        self.rewards = {s.name: _open(config, s) for s in config.stages if samples_groups(s)}
        self.dropped = deque(maxlen=WINDOW)  # True for a caption without rewards
        process = jax.process_index()
        name = f"rewards-{process}.jsonl" if process else "rewards.jsonl"
        self.received = Received(config.folder / name) if self.rewards else None

    def __call__(
        self, stage: Stage, length: int, position: int, state: TrainState, batch: Batch, draws
    ) -> Batch:
        """Return a batch on the devices with its `group`; rows without a reward weigh nothing.

        `position` is the step of the stage's plan, `draws` the random key of the run. Raises
        `RewardError` if too many captions have no reward, and `StorageError` if the rewards cannot
        be written.
        """
        program = self.programs.groups(stage, length)
        self.monitor.enter("reward")
        latents, frames = program(state, batch, draws)
        asked = captions(self.loaders[stage.name], position)
        rewards = self._rewards(stage, frames, asked)
        good = np.isfinite(rewards).all(axis=(1, 3))
        self._count(good.reshape(-1)[: stage.batch_size], stage)
        weight = np.arange(good.size).reshape(good.shape) < stage.batch_size
        gained = advantages(rewards, list(stage.objective.rewards.values()))
        numbers = (np.nan_to_num(x).astype(np.float32) for x in (gained, rewards))
        placed = batch._replace(
            weight=(weight & good).astype(np.float32), group=Group(latents, *numbers)
        )
        return jax.tree.map(_placed, placed, batch_shardings(self.meshes[stage.name], placed))

    def _count(self, good: np.ndarray, stage: Stage) -> None:
        """Note which captions have rewards. Raises `RewardError` if too many have none."""
        self.dropped.extend(~good)
        if sum(self.dropped) > MAX_DROPPED * WINDOW or not good.any():
            names = ", ".join(reward.name for reward in self.rewards[stage.name])
            raise RewardError(
                f"{sum(self.dropped)} of the last {len(self.dropped)} captions have a video "
                f"without a reward of {names}, and {MAX_DROPPED:.0%} of {WINDOW} may; the log says "
                f"why. Repair the reward and run the same command again, which asks only for what "
                f"is missing"
            )

    def _rewards(
        self, stage: Stage, frames: jax.Array, asked: Mapping[int, str]
    ) -> Float[np.ndarray, "A n B k"]:
        """Return the rewards of all videos, NaN if missing; each process asks for its own part."""
        own, rewards = _own_groups(frames, stage.batch_size), self.rewards[stage.name]
        found = np.full((*frames.shape[:3], len(rewards)), np.nan)
        done: list[tuple[int, int]] = []

        def ask(place: tuple[int, int]) -> None:
            micro, row = place
            lost = sum(np.isnan(found[at, :, b]).any() for at, b in done)
            if lost > MAX_DROPPED * WINDOW:  # it is of no use to wait for the others
                return
            caption = asked[micro * frames.shape[2] + row]
            for number, reward in enumerate(rewards):
                found[micro, :, row, number] = self._group(reward, own[place], caption)
            done.append(place)

        servers = all(isinstance(reward, RewardServer) for reward in rewards)
        with ThreadPoolExecutor(AT_ONCE if servers else 1) as pool:
            for _ in pool.map(ask, own):
                self.monitor.enter("reward")  # the limit of its time is for one caption
        self.monitor.enter("step")
        if jax.process_count() > 1:
            parts = multihost_utils.process_allgather(found)
            found = np.where(np.isfinite(parts), parts, 0).sum(0)
            found[~np.isfinite(parts).any(0)] = np.nan
        return found

    def _group(
        self, reward: Reward, videos: UInt8[np.ndarray, "n F H W 3"], caption: str
    ) -> list[float]:
        """Return the rewards of the videos of a caption, received now or before."""
        keys = [_key(reward, caption, video) for video in videos]
        missing = [n for n, one in enumerate(keys) if one not in self.received.rewards]
        if missing:
            found = reward(videos[missing], [caption] * len(missing)).tolist()
            try:
                self.received.add({keys[n]: x for n, x in zip(missing, found, strict=True)})
            except OSError as error:
                raise StorageError(f"{self.received.path}: {error.strerror or error}") from error
        return [self.received.rewards.get(one, math.nan) for one in keys]


def _open(config: TrainConfig, stage: Stage) -> list[Reward]:
    """Return the rewards of a stage, in the order of their names in its objective."""
    objective: NegativeAwareFinetuning = stage.objective
    settings = {"batch": objective.request, "seconds": objective.seconds}
    settings |= {"tries": objective.tries, "format": objective.format}
    settings["fps"] = config.set(stage.data).fps
    return [open_reward(name, **settings) for name in objective.rewards]


def _key(reward: Reward, caption: str, video: np.ndarray) -> str:
    content = hashlib.blake2b(np.ascontiguousarray(video), digest_size=16)
    return key(reward.name, caption, content.hexdigest())


def _own_groups(frames: jax.Array, batch_size: int) -> dict[tuple[int, int], np.ndarray]:
    """Return {(microbatch, row): frames of its videos} of the rows for which this process asks.

    Each real row is one process's, even if several hold it.
    """
    found = {}
    for shard in frames.addressable_shards:
        if shard.replica_id:
            continue
        data = np.asarray(shard.data)
        micros, rows = (range(frames.shape[axis])[shard.index[axis]] for axis in (0, 2))
        for (i, micro), (j, row) in itertools.product(enumerate(micros), enumerate(rows)):
            if micro * frames.shape[2] + row < batch_size:
                found[micro, row] = data[i, :, j]
    return found


def _placed(x, sharding) -> jax.Array:
    if isinstance(x, jax.Array):
        return x
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
