"""Print what a source of clips holds, and what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax.commands import parse

HELP = """Print what a source of clips holds: clips, sizes, durations, captions, and every problem
with its row or line."""


@dataclass(frozen=True)
class Options:
    source: Positional[str]
    """Folder with a metadata.json or csv, tar files, TFDS data set, or parquet table."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_sources, arguments))


def _sources(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "sources", HELP)
    from easyanimate_jax.data.sources.report import describe

    print(describe(own.source))
    return 0
