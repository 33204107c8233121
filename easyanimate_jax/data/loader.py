"""Batches of encoded clips: the plan's records, read ahead by grain's threads.

Letters beyond the legend: A microbatches of a global batch, P token width. A row's draws (which
caption, caption or none, which mask) come from seed, stage, step and row alone, so a loader that
starts at step k delivers what one that walked there would have.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import grain
import numpy as np

from easyanimate_jax.data.plan import Plan
from easyanimate_jax.data.records import Records, read_texts

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches
FOREVER = 2**40  # steps


class Batch(NamedTuple):
    """Latent statistics as tokens, zero past `lengths`. Rows of weight 0 fill microbatches up."""

    mean: np.ndarray  # (A, B, N, P) of the normalised latents
    logvar: np.ndarray  # (A, B, N, P)
    grid: np.ndarray  # (A, B, 3) int32: latent frames, token rows, token columns
    lengths: np.ndarray  # (A, B) int32
    texts: tuple[np.ndarray, ...]  # (A, B, L, width) each
    condition: np.ndarray | None  # (A, B, N, extra * 4), mask channel first
    weight: np.ndarray  # (A, B), 1 or 0


class Loader:
    """Reads `plan` from `records`, in microbatches of `microbatch` rows.

    A caption is replaced by the empty prompt with probability `text_drop` (spec 5.3).
    """

    def __init__(
        self,
        records: Records,
        plan: Plan,
        *,
        task: Literal["t2v", "i2v"],
        microbatch: int,
        text_drop: float,
    ):
        if task not in ("t2v", "i2v"):
            raise ValueError(
                f"stage {plan.name!r}: task {task!r} has no loader; use 't2v' or 'i2v'"
            )
        if task == "i2v" and not records.header["set"]["condition_draws"]:
            raise ValueError(
                f"stage {plan.name!r} is i2v, and {records.folder} was prepared without "
                f"condition_draws; set them and prepare again"
            )
        self.records, self.plan, self.task = records, plan, task
        self.microbatch, self.text_drop = microbatch, text_drop
        self.empty = read_texts(records.folder.parent / "empty.safetensors")
        self.name_word = int.from_bytes(hashlib.blake2b(plan.name.encode()).digest()[:8], "little")

    def batches(self, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """(token length, batch) of the stage's own steps `start`, `start` + 1, ... without end."""
        steps = grain.MapDataset.range(start, FOREVER)
        return iter(steps.map(self.batch).to_iter_dataset(READ))

    def batch(self, step: int) -> tuple[int, Batch]:
        length, ids = self.plan(int(step))
        rows = [self._row(int(step), row, int(record)) for row, record in enumerate(ids)]
        micro = self.microbatch
        accumulate = -(-len(rows) // micro)

        def stack(name: str, dtype=np.float32) -> np.ndarray:
            """The rows' field, zero-padded to the length and to whole microbatches."""
            width = rows[0][name].shape[1:]
            out = np.zeros((accumulate * micro, length, *width), dtype)
            for place, row in zip(out, rows, strict=False):
                place[: len(row[name])] = row[name]
            return out.reshape(accumulate, micro, *out.shape[1:])

        def fill(values: list, padding) -> np.ndarray:
            """One value per row, and `padding` for the rows that fill up the last microbatch."""
            out = np.stack(values + [padding] * (accumulate * micro - len(rows)))
            return out.reshape(accumulate, micro, *out.shape[1:])

        one = np.ones(
            3, np.int32
        )  # padding rows are one token long, so that their numbers are finite
        return length, Batch(
            mean=stack("mean"),
            logvar=stack("logvar"),
            grid=fill([row["grid"] for row in rows], one),
            lengths=fill([row["grid"].prod(dtype=np.int32) for row in rows], one[0]),
            texts=tuple(
                fill([row["texts"][i] for row in rows], empty[0])
                for i, empty in enumerate(self.empty)
            ),
            condition=stack("condition") if self.task == "i2v" else None,
            weight=fill([np.float32(1)] * len(rows), np.float32(0)),
        )

    def _row(self, step: int, row: int, record: int) -> dict:
        rng = np.random.default_rng([self.plan.seed, self.name_word, step, row])
        arrays, index = self.records[record], self.records.index
        caption = rng.integers(index["num_captions"][record])
        dropped = rng.random() < self.text_drop
        texts = [
            empty[0] if dropped else arrays[f"text{i}"][caption].astype(np.float32)
            for i, empty in enumerate(self.empty)
        ]
        grid = np.array([index[axis][record] for axis in ("T", "gh", "gw")], np.int32)
        fields = {"mean": arrays["mean"], "logvar": arrays["logvar"], "grid": grid, "texts": texts}
        if self.task == "i2v":
            fields["condition"] = _condition(rng, arrays)
        return fields


def _condition(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One of the clip's conditionings (spec 6.1): (N, 4 + P), the mask and a sample of the masked
    video's latents; all zero where its flag is."""
    draw = rng.integers(len(arrays["condition_flag"]))
    mean, logvar, mask, flag = (
        arrays[f"condition_{name}"][draw].astype(np.float32)
        for name in ("mean", "logvar", "mask", "flag")
    )
    noise = rng.standard_normal(mean.shape, np.float32)
    return flag * np.concatenate([mask, mean + np.exp(logvar / 2) * noise], axis=-1)
