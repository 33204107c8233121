"""Cut and score films into a table of clips."""

import sys
from pathlib import Path

import tyro

from easyanimate_jax.prepare import funnel
from easyanimate_jax.prepare.captions import Server
from easyanimate_jax.prepare.curate import Rules, curate

DEFAULTS = Rules()


def main(arguments: list[str]) -> int:
    return tyro.cli(_curate, args=arguments, prog="python -m easyanimate_jax curate")


def _curate(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    rules: tyro.conf.OmitArgPrefixes[Rules] = DEFAULTS,
    captioner: Server | None = None,
    part: int = 0,
    parts: int = 1,
) -> int:
    """Cut and score the films of SOURCE into the table OUT/clips.parquet."""
    try:
        rows = curate(source, out, rules, captioner=captioner, part=part, parts=parts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"part {part} of {parts} is done" if rows is None else funnel.text(rows))
    return 0
