"""Cut and score films into a table of clips."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, subcommand

from easyanimate_jax.commands import parse
from easyanimate_jax.prepare.captions import RewritingServer, Server
from easyanimate_jax.prepare.cluster import check_ray
from easyanimate_jax.prepare.embeddings import AlignmentServer, EmbeddingServer
from easyanimate_jax.prepare.films import Rules
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE, FOUND, PREEMPTED

HELP = """Cut and score the films of SOURCE into the table OUT/clips.parquet.

No video is rewritten: a clip is a span of a file. Run the same command to resume; finished films
are kept. OUT/funnel.html shows how many clips each rule removed.

--score mine:BEAUTY adds a score of your own: mine.py holds BEAUTY = Score("beauty", function), with
the class easyanimate_jax.prepare.scores.Score. --embed mine:CLIP drops near-duplicates by vectors:
CLIP = Embedding("clip", function), with the class easyanimate_jax.prepare.embeddings.Embedding.
Models behind OpenAI-compatible servers may caption clips, rewrite captions, compare captions with
frames, and give vectors. End the command with one or more of

  captioner:server --captioner.url http://localhost:8000/v1 --captioner.model NAME
  rewriter:server --rewriter.url http://localhost:8001/v1 --rewriter.model NAME
  aligner:server --aligner.url http://localhost:8002/v1 --aligner.model NAME --aligner.low 0.2
  embedder:server --embedder.url http://localhost:8002/v1 --embedder.model NAME

Several addresses after --captioner.url share the clips. One that goes away is tried again; if none
answers for 10 minutes, the exit code is 42: run the same command again later."""


@dataclass(frozen=True)
class Options:
    """The arguments of `curate`."""

    source: Positional[Place]
    """Source of clips, or a folder of films without captions."""
    out: Positional[Place]
    """Folder to write the table to."""
    rules: OmitArgPrefixes[Rules] = Rules()
    """Limits that a clip must meet."""
    captioner: Server | None = None
    """Server that captions clips; by default a clip has the captions of its film."""
    rewriter: Annotated[RewritingServer, subcommand("server")] | None = None
    """Server that rewrites captions; by default captions stay as they are."""
    aligner: Annotated[AlignmentServer, subcommand("server")] | None = None
    """Server that compares the final captions with frames; its score is `alignment`."""
    embedder: Annotated[EmbeddingServer, subcommand("server")] | None = None
    """Server that gives vectors of clips, to find near-duplicates."""
    embed: str | None = None
    """Your own embedding MODULE:NAME, to find near-duplicates by vectors of clips."""
    score: UseAppendAction[tuple[str, ...]] = ()
    """Your own score MODULE:NAME, beside the built-in ones. Repeat it for several scores."""
    links: Path | None = None
    """Folder that links in the source may lead into, such as the cache of a hub."""
    part: str = "0/1"
    """Process only this part of the films: 0/8 to 7/8 share the work between eight hosts."""
    engine: Literal["process", "ray"] = "process"
    """"process" cuts films in this process; "ray" on the CPUs of a Ray cluster, as in `prepare`."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `curate`; return the exit code."""
    return parse.run(partial(_curate, arguments))


def _curate(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "curate", HELP)
    part, parts = parse.part_of(own.part)
    if own.engine == "ray":
        check_ray()
        parse.check_no_part(own.part)
    if own.embed and own.embedder:
        raise ValueError("--embed and embedder:server are both given; give one of them")
    if isinstance(own.out, Path):
        parse.check_folder("OUT", own.out)
    from easyanimate_jax.prepare.curate import curate
    from easyanimate_jax.prepare.embeddings import (
        alignment_score,
        named_embedding,
        server_embedding,
    )
    from easyanimate_jax.prepare.model_steps import Models
    from easyanimate_jax.prepare.scores import SCORES, named_score

    scores = (*SCORES, *map(named_score, own.score))
    scores += (alignment_score(own.aligner),) if own.aligner else ()
    embedding = named_embedding(own.embed) if own.embed else None
    if own.embedder:
        embedding = server_embedding(own.embedder)
    models = Models(own.captioner, own.rewriter, embedding)
    options = {"part": (part, parts), "links": own.links}
    source, out = own.source, own.out
    if own.engine == "ray":
        from easyanimate_jax.prepare.film_tasks import on_cluster

        source, out = source.absolute(), out.absolute()  # as other processes find them
        options["finish"] = on_cluster
    try:
        funnel = curate(source, out, own.rules, scores, models, **options)
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return PREEMPTED
    if funnel is None and own.engine == "ray":
        print(f"error: {out} is not complete; run the same command again", file=sys.stderr)
        return FOUND
    print(f"part {part} of {parts} is done" if funnel is None else funnel.text())
    return DONE
