"""Cut and score films into a table of clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.prepare.captions import Server
from easyanimate_jax.prepare.curate import Rules

HELP = """Cut and score the films of SOURCE into the table OUT/clips.parquet.

Nothing is rewritten: a clip is a span of a file. Finished films are kept, so a stopped command
resumes. OUT/funnel.html says what was left out at every step. To caption clips by a model behind an
OpenAI-compatible server, end the command with

  captioner:server --captioner.url http://localhost:8000/v1 --captioner.model NAME"""


@dataclass(frozen=True)
class Options:
    source: Positional[Path]
    """Source of clips, or a folder of films without captions."""
    out: Positional[Path]
    """Folder of the table."""
    rules: OmitArgPrefixes[Rules] = Rules()
    """Limits of a clip."""
    captioner: Server | None = None
    """Server that captions clips; left out, clips have the captions of their film."""
    part: str = "0/1"
    """Cut and score only this part of the films: 0/8 to 7/8 share the work, on any hosts."""


def main(arguments: Sequence[str]) -> int:
    return parse.run(partial(_curate, arguments))


def _curate(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "curate", HELP)
    part, parts = parse.part_of(own.part)
    from easyanimate_jax.prepare import funnel
    from easyanimate_jax.prepare.curate import curate

    rows = curate(own.source, own.out, own.rules, captioner=own.captioner, part=part, parts=parts)
    print(f"part {part} of {parts} is done" if rows is None else funnel.text(rows))
    return 0
