"""A source of clips as text: what it holds, and what is wrong with it."""

from collections import Counter
from pathlib import Path

import numpy as np

from easyanimate_jax.data.sources import read
from easyanimate_jax.data.sources.rows import KINDS
from easyanimate_jax.storage.stores import Place

SHOWN = 50  # problems


def describe(source: str | Place, links: str | Path | None = None) -> str:
    """Return clips, sizes, durations, captions, and every problem with its row or line."""
    clips, problems = read.read_clips(source, links)
    lines = [f"{source}: {len(clips):,} clips, {sum(len(c.captions) for c in clips):,} captions"]
    for kind in KINDS:
        some = [clip for clip in clips if clip.kind == kind]
        if not some:
            continue
        sizes = Counter((c.height, c.width) for c in some)
        lines.append(f"  {len(some):>9,} {kind}s of {len(sizes):,} sizes")
        lines += [f"  {n:>13,}  {h}x{w}" for (h, w), n in sizes.most_common(8)]
        if kind == "video":
            seconds = np.array([c.num_frames / (c.fps or 1) for c in some])
            low, middle, high = np.percentile(seconds, (5, 50, 95))
            rates = Counter(round(c.fps, 2) for c in some).most_common(4)
            lines.append(
                f"            {seconds.sum() / 3600:,.2f} hours; 5 / 50 / 95 % last {low:.1f} / "
                f"{middle:.1f} / {high:.1f} s; frames a second "
                + ", ".join(f"{r:g} ({n:,})" for r, n in rates)
            )
    if pairs := sum(clip.worse is not None for clip in clips):
        lines.append(f"  {pairs:>9,} pairs of a better and a worse file")
    lines.append(f"  {len(problems):>9,} problems")
    lines += [f"    row {p.row}: {p.file!r}: {p.reason}" for p in problems[:SHOWN]]
    return "\n".join([*lines, *(["    ..."] if len(problems) > SHOWN else [])])
