"""`python -m easyanimate_jax plan CONFIG [INDEX] [--field value ...]`: the plans of a config.

INDEX is what `prepare` wrote (the config's `prepared` folder if left out), a parquet table of
clips, or any source of clips; of the last two, shapes are chosen as `prepare` will choose them.
"""

import sys
import time
from pathlib import Path

from easyanimate_jax.data.plan.report import describe_stage
from easyanimate_jax.data.records import Records
from easyanimate_jax.data.sources import read
from easyanimate_jax.runs.config import load


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for what the user can repair, with one line that says how."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        path, *rest = arguments
        place = rest.pop(0) if rest and not rest[0].startswith("-") else None
        config = load(path, rest)
        place = Path(place or config.prepared)
        began = time.perf_counter()
        prepared = any((place / s.name / "header.json").is_file() for s in config.sets)
        table = None if prepared else read.table(place)
        if table is not None:
            seconds = time.perf_counter() - began
            print(f"{len(table['clip']):,} clips of {place}, read in {seconds:.1f} s")
        for stage in config.stages:
            index = Records(place / stage.data).index if prepared else {}
            print()
            print(describe_stage(stage, config.set(stage.data), table, index, config.seed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
