"""Print the contents of a source of clips, and its problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE

HELP = """Print the contents of a source of clips: clips, sizes, durations, captions, and every
problem with its row or line."""


@dataclass(frozen=True)
class Options:
    """The arguments of `sources`."""

    source: Positional[Place]
    """Folder with a metadata.json or csv, tar files, TFDS data set, or parquet table; also gs://
    and s3://."""
    links: Path | None = None
    """Folder that links in the source may lead into, such as the cache of a hub."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `sources`; return the exit code."""
    return parse.run(partial(_sources, arguments))


def _sources(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "sources", HELP)
    from easyanimate_jax.data.sources.report import describe

    print(describe(own.source, own.links))
    return DONE
