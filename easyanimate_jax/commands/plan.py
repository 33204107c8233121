"""Print which clips each step of a config trains on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.storage.stores import Place, place
from easyanimate_jax.training.safety.exits import DONE

HELP = """Print the plan of each stage of a config: clips, shapes, token lengths, and their fill.

Every field of the config is an option, `--field value`; `CONFIG --help` lists them."""


@dataclass(frozen=True)
class Options:
    """The arguments of `plan`."""

    config: Positional[str]
    """Python file that defines `config`, such as configs/demo.py."""
    index: Positional[Place | None] = None
    """Folder that `prepare` wrote, parquet table of clips, or any source of clips. For a table or a
    source, shapes are chosen as `prepare` chooses them. By default the config's `prepared`."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `plan`; return the exit code."""
    return parse.run(partial(_plan, arguments))


def _plan(arguments: Sequence[str]) -> int:
    own, config = parse.options_and_config(Options, arguments, "plan", HELP, ("TrainConfig",))
    from easyanimate_jax.data.plan.report import describe_stage
    from easyanimate_jax.data.records import Records
    from easyanimate_jax.data.sources import read

    index = own.index or place(config.prepared)
    began = time.perf_counter()
    prepared = any((index / s.name / "header.json").is_file() for s in config.sets)
    table = None if prepared else read.table(index, config.links)
    if table is not None:
        seconds = time.perf_counter() - began
        print(f"{len(table['clip']):,} clips of {index}, read in {seconds:.1f} s")
    for stage in config.stages:
        rows = Records(index / stage.data).index if prepared else {}
        print()
        latents, share = config.set(stage.data), config.validation.share
        print(describe_stage(stage, latents, table, rows, config.seed, share))
    return DONE
