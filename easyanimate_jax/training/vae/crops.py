"""The crops that a video autoencoder is trained on and measured with.

A crop is a function of (seed, step, row) and nothing else, so a resumed training and any number of
processes see the same batches.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from easyanimate_jax.data import media
from easyanimate_jax.data.control import control_video
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.facts import to_signed
from easyanimate_jax.sharding import batch_sharding
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig

HELD_OUT = 20  # every 20th clip is held out; with fewer clips, the last one
CACHE_BYTES = 2**30  # decoded clips kept in memory
CONTROL_SHARE = 0.25  # of the crops, if the config has controls
HIDDEN_SHARE = 0.25  # of the crops, if the config has hidden frames


class Clips(NamedTuple):
    """The clips of a source: training clips, held-out clips, and a digest of all."""

    trained_on: list[Clip]
    held_out: list[Clip]
    digest: str


def split_clips(source: str, links: str = "") -> Clips:
    """Return the clips of a source, with every `HELD_OUT`-th clip held out.

    The digest covers names, spans, shapes and file sizes, in order. `links` and errors are those of
    `read_clips`.
    """
    clips, _ = read_clips(source, links)
    held_out = set(range(HELD_OUT - 1, len(clips), HELD_OUT)) or {len(clips) - 1}
    rows = [
        [c.name, c.kind, c.first, c.num_frames, c.height, c.width, _num_bytes(c.path)]
        for c in clips
    ]
    digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()
    trained_on = [clip for number, clip in enumerate(clips) if number not in held_out]
    return Clips(trained_on, [clips[number] for number in sorted(held_out)], digest)


def _num_bytes(file: media.File) -> int | None:
    return file.stat().st_size if isinstance(file, Path) else getattr(file, "size", None)


def pixels(frames: UInt8[Array, "B F H W 3"]) -> Float[Array, "B F H W 3"]:
    """Return uint8 frames as float32 video in [-1, 1]."""
    return to_signed(frames)


def hide_frames(
    rng: np.random.Generator, crop: UInt8[np.ndarray, "F H W 3"]
) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the crop with black frames: about 3/4 of those between the first and the last."""
    given = rng.random(len(crop)) < 0.25
    given[[0, -1]] = True
    return crop * given[:, None, None, None]


class Crops:
    """Random crops of a list of clips; decoded frames are cached.

    Each crop is the one with most contrast of four, because plain background teaches nothing.
    `controls` are operators whose signals replace some crops; `hidden` makes frames of some black.
    """

    def __init__(
        self, clips: list[Clip], seed: int, controls: tuple[str, ...] = (), hidden: bool = False
    ):
        self.clips, self.seed, self.controls, self.hidden = clips, seed, controls, hidden
        self.fits: dict[VAEStage, list[Clip]] = {}
        self.cache: dict[str, np.ndarray] = {}
        self.cached_bytes = 0

    def fitting(self, stage: VAEStage) -> list[Clip]:
        """Return the clips that are large enough for the stage. Raises ValueError if none is."""
        if stage not in self.fits:
            self.fits[stage] = [
                clip
                for clip in self.clips
                if clip.num_frames >= stage.frames and min(clip.height, clip.width) >= stage.size
            ]
        if not self.fits[stage]:
            raise ValueError(
                f"{stage}: none of {len(self.clips)} clips has {stage.frames} frames of "
                f"{stage.size}x{stage.size} pixels; use smaller crops, or larger clips."
            )
        return self.fits[stage]

    def batch(self, stage: VAEStage, step: int, rows: range) -> UInt8[np.ndarray, "B F H W 3"]:
        """Return the given rows of the stage's global batch at `step`."""
        clips = self.fitting(stage)
        return np.stack([self._crop(clips, stage, (self.seed, step, row)) for row in rows])

    def _crop(self, clips, stage, seed):
        rng = np.random.default_rng(seed)
        frames = self._frames(clips[rng.integers(len(clips))])
        start = rng.integers(len(frames) - stage.frames + 1)
        tops, lefts = (rng.integers(side - stage.size + 1, size=4) for side in frames.shape[1:3])
        crops = [
            frames[start : start + stage.frames, top : top + stage.size, left : left + stage.size]
            for top, left in zip(tops, lefts, strict=True)
        ]
        crop = max(crops, key=lambda crop: crop[:: max(1, stage.frames - 1), ::4, ::4].std())
        draw = rng.random()
        if self.controls and draw < CONTROL_SHARE:
            return control_video(crop, self.controls[rng.integers(len(self.controls))])
        if self.hidden and draw > 1 - HIDDEN_SHARE:
            return hide_frames(rng, crop)
        return crop

    def _frames(self, clip: Clip) -> UInt8[np.ndarray, "F H W 3"]:
        if clip.name in self.cache:
            return self.cache[clip.name]
        if clip.kind == "image":
            frames = media.read_image(clip.path)[None]
        else:
            frames = media.read_clip(clip.path, clip.first, clip.num_frames)
        if self.cached_bytes + frames.nbytes <= CACHE_BYTES:
            self.cache[clip.name] = frames
            self.cached_bytes += frames.nbytes
        return frames


def batches(crops: Crops, config: VAETrainConfig, first_step: int, mesh) -> Iterator[jax.Array]:
    """Yield the global batches from `first_step` to the end; one batch is loaded ahead."""
    process, processes = jax.process_index(), jax.process_count()

    def load(step):
        stage = config.stage_at(step)
        share = stage.batch_size // processes
        rows = crops.batch(stage, step, range(process * share, (process + 1) * share))
        return jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, first_step)
        for step in range(first_step, config.steps):
            batch = ahead.result()
            ahead = pool.submit(load, min(step + 1, config.steps - 1))
            yield batch
