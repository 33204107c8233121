"""Describe a stage's plan for an index as text: clips used and left out, shapes, lengths, steps.

The index is a prepared set, whose shapes are fixed, or a table of source clips. For source clips
this module chooses the shapes that `prepare` will choose.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from easyanimate_jax.data.buckets import (
    Budget,
    Clips,
    choose_all,
    fit_budget,
    grid_of,
    num_tokens,
)
from easyanimate_jax.data.index import Column
from easyanimate_jax.data.plan.plan import CYCLE, Plan, is_text
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.times import clip_frames
from easyanimate_jax.facts import CELL

Rows = Mapping[str, Column]  # of an index

ROWS = 16  # rows of a histogram
ASPECTS = ((0.8, "wide"), (1.25, "square"), (np.inf, "tall"))  # upper limits of height / width


def choose(latent_set: LatentSet, table: dict[str, np.ndarray]) -> tuple[dict, Counter, tuple]:
    """Return the index that `prepare` would write, clips left out by reason, and best lengths.

    `table` has a row per source clip: clip, kind, frames (in the file), fps, height, width,
    quality, word. The best lengths are those that need the least padding for these clips.
    """
    side = np.minimum(table["height"], table["width"])
    kind = np.isin(table["kind"], np.array(latent_set.kinds).astype(table["kind"].dtype))
    large = side >= latent_set.min_side
    good = table["quality"] >= latent_set.min_quality
    left_out = Counter(
        {
            f"not of kind {' or '.join(latent_set.kinds)}": int(np.sum(~kind)),
            f"smaller than {latent_set.min_side} pixels": int(np.sum(kind & ~large)),
            f"of quality below {latent_set.min_quality}": int(np.sum(kind & large & ~good)),
        }
    )
    rows = np.flatnonzero(kind & large & good)
    rule = latent_set.reference_rate, latent_set.fps
    frames = clip_frames(table["frames"][rows], table["fps"][rows], *rule)
    clips = Clips(frames, table["height"][rows], table["width"][rows], table["word"][rows])
    if not len(rows):
        return {}, left_out, ()
    choice = choose_all(latent_set.budget, clips)
    used = choice.shape >= 0
    for number, reason in enumerate(choice.reasons):
        left_out[reason] += int(np.sum(~used & (choice.reason == number)))
    shapes = np.array([(*s, *grid_of(*s), num_tokens(*s)) for s in choice.shapes], np.int32)
    columns = shapes.reshape(-1, 7)[choice.shape[used]].T
    names = ("frames", "height", "width", "T", "gh", "gw", "tokens")
    index = dict(zip(names, columns, strict=True)) | {
        "clip": table["clip"][rows][used],
        "kind": table["kind"][rows][used],
        "source_height": clips.height[used],
        "source_width": clips.width[used],
    }
    return index, left_out, _fitted(latent_set.budget, clips)


def _fitted(budget: Budget, clips: Clips) -> tuple[int, ...]:
    try:
        return fit_budget(budget, clips).lengths
    except ValueError:
        return ()


def describe_stage(
    stage, latent_set: LatentSet, table: dict | None, index: Rows, seed: int, held_out: float = 0.0
) -> str:
    """Return the report of one stage.

    `table` holds the source clips; if it is None, `index` holds the rows of a prepared set.
    """
    began = time.perf_counter()
    left_out, fitted = Counter(), ()
    if table is not None:
        index, left_out, fitted = choose(latent_set, table)
    head = f"{stage.name}: {stage.task}, set {latent_set.name}, batch {stage.batch_size:,}"
    reasons = [f"  left out {n:>12,}  {why}" for why, n in left_out.items() if n]
    if not len(index.get("clip", ())):
        return "\n".join([head, "  no clip is left", *reasons])
    plan = Plan(
        index,
        lengths=latent_set.budget.lengths,
        batch_size=stage.batch_size,
        seed=seed,
        name=stage.name,
        weights=stage.weights,
        held_out=held_out,
    )
    used = sum(len(group) for bucket in plan.buckets for group in bucket.groups)
    if used < len(index["clip"]):
        reasons.append(
            f"  left out {len(index['clip']) - used:>12,}  weight 0, held out, or too long"
        )
    lines = [
        head,
        f"  used     {used:>12,}  clips, {_share(index['kind'], 'video')} of them videos",
        *reasons,
        f"  tokens   {int(index['tokens'].sum(dtype=np.int64)):>12,}  real in an epoch; "
        f"real / computed {plan.token_efficiency:.4f}",
        f"  steps    {plan.steps_per_epoch:>12,.1f}  an epoch; the stage's {stage.steps:,} are "
        f"{stage.steps / plan.steps_per_epoch:.2f} epochs",
        "  length       clips   steps of 1000   clips of a batch",
    ]
    for length, bucket, turns in zip(plan.lengths, plan.buckets, plan.turns, strict=True):
        ids = np.concatenate(bucket.groups)
        often = turns / CYCLE * plan.steps_per_epoch * stage.batch_size / bucket.weight
        lines.append(
            f"  {length:>6}{len(ids):>12,}{turns:>16,}   {_share(index['kind'][ids], 'video')} "
            f"videos" + (f"; seen {often:.1f} times as often as others" if often > 1.5 else "")
        )
    lines += _histogram(index)
    if fitted and fitted != latent_set.budget.lengths:
        budget = replace(latent_set.budget, lengths=fitted)
        better, _, _ = choose(replace(latent_set, budget=budget), table)
        now, then = _efficiency(index, plan.lengths), _efficiency(better, fitted)
        if len(better["tokens"]) > len(index["tokens"]) or then > now:
            lines.append(
                f"  lengths={fitted} would use {len(better['tokens']):,} clips, real / computed "
                f"{then:.4f} instead of {now:.4f}"
            )
    return "\n".join([*lines, f"  built in {time.perf_counter() - began:.1f} s"])


def _efficiency(index: Rows, lengths) -> float:
    """Return real / computed tokens if every clip comes once."""
    tokens = index["tokens"][index["tokens"] <= lengths[-1]]
    padded = np.array(lengths)[np.searchsorted(lengths, tokens)]
    return float(tokens.sum(dtype=np.int64) / padded.sum(dtype=np.int64))


def _share(kind: Column, name: str) -> str:
    return f"{100 * is_text(kind, name).mean():.0f} %"


def _histogram(index: Rows) -> list[str]:
    """Return lines of the most frequent (resolution, frames, aspect), with their clip counts."""
    size = np.sqrt(index["height"].astype(float) * index["width"] / CELL**2)
    size = np.round(size / 4).astype(np.int64) * 4 * CELL  # side of a square of equal area
    ratio = index["height"] / index["width"]
    aspect = np.searchsorted([a for a, _ in ASPECTS], ratio)
    key = (size << 20) | (index["frames"].astype(np.int64) << 4) | aspect
    keys, counts = np.unique(key, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:ROWS]
    lines = [f"  resolution x frames x aspect, {len(order)} of {len(keys)}"]
    for k, n in zip(keys[order].tolist(), counts[order].tolist(), strict=True):
        lines.append(
            f"    about {k >> 20:>5}^2 x {k >> 4 & 0xFFFF:>3}  {ASPECTS[k & 15][1]:<8}"
            f"{n:>12,}  {100 * n / counts.sum():5.1f} %"
        )
    return lines
