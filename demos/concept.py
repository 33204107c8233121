"""Write clips of a direction that the captioned world never shows, to teach it by a LoRA.

    python -m demos.concept OUT

writes `OUT/metadata.json` with an English and a Chinese caption for each file: `CLIPS` clips of
objects that move northeast, and `PRIOR` clips of the world, which keep the known directions. The
other attributes are a random choice, and the prompts of the test are another one.
"""

import itertools
from pathlib import Path

import numpy as np
import tyro

from demos import world
from demos.world import BACKGROUNDS, COLOURS, NEW_DIRECTIONS, Prompt
from easyanimate_jax.commands.parse import registry

CLIPS, PRIOR, PROMPTS = 24, 48, 48
SIDES = (128,)  # as `SampleConfig` of the demo: the small token length takes them at half the size
SEED = 7


def prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of the clips and those of the test; no combination is in both."""
    triples = tuple(itertools.product(COLOURS, BACKGROUNDS, NEW_DIRECTIONS))
    found: dict[Prompt, None] = {}
    for prompt in world.moving(triples, np.random.default_rng(SEED)):
        found[prompt] = None
        if len(found) == CLIPS + PROMPTS:
            return list(found)[:CLIPS], list(found)[CLIPS:]


def main(out: tyro.conf.Positional[Path]) -> None:
    """Write the clips of the new direction, and clips of known ones, into the folder OUT."""
    shown = prompts()[0] + world.prompts("seen", PRIOR, SEED)
    world.write_folder(out, [(prompt, SIDES) for prompt in shown], SEED)


if __name__ == "__main__":
    tyro.cli(main, registry=registry())
