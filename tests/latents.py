"""Prepared latents of random numbers, for runs that learn nothing from them."""

import json
from pathlib import Path

import numpy as np

from easyanimate_jax.data.index import INDEX_TYPES
from easyanimate_jax.data.records import write_set, write_texts


def random_latents(
    folder: Path,
    grids: dict[str, tuple[int, int, int]],
    widths: tuple[int, int],
    pairs: bool = False,
    **meta,
) -> None:
    """Five records per set with two captions each, and the states of the empty prompt.

    With `pairs` a record also has a worse clip. The set named "image" holds images; "medium" and
    "large" hold two draws of the image condition. widths: of the two text encoders; meta: further
    entries of each set's metadata.
    """
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float16)

    for name, (T, gh, gw) in grids.items():
        draws = 2 * (name in ("medium", "large"))
        made = {"condition_draws": draws} | ({"pairs": True} if pairs else {})
        records, rows = [], []
        for clip in range(5):
            N = T * gh * gw
            record = {"mean": draw(N, 64), "logvar": draw(N, 64) - 4}
            record |= {"text0": draw(2, 4, widths[0]), "text1": draw(2, 3, widths[1])}
            words = json.dumps([f"caption {clip}", f"标题 {clip}"]).encode()
            record["captions"] = np.frombuffer(words, np.uint8)
            if draws:
                record |= {
                    "condition_mean": draw(draws, N, 64),
                    "condition_logvar": draw(draws, N, 64) - 4,
                    "condition_mask": draw(draws, N, 4),
                    "condition_flag": np.ones(draws, np.float16),
                }
            if pairs:
                drawn = ("mean", "logvar", "condition_mean", "condition_logvar")
                record |= {f"worse_{n}": record[n] + draw() for n in drawn if n in record}
            records.append(record)
            kind = "image" if name == "image" else "video"
            sizes = (4 * T - 3, 16 * gh, 16 * gw, T, gh, gw, N, 512, 512)
            values = (f"{clip}.mp4", kind, *sizes, 2, "")
            rows.append(dict(zip(INDEX_TYPES, values, strict=True)))
        write_set(folder / name, {"set": made, **meta}, records, rows)
    empty = np.zeros((1, 4, widths[0])), np.zeros((1, 3, widths[1]))
    write_texts(folder / "empty.safetensors", empty)
