"""Write prompts of the captioned world to a text file, one a line, for the verb `pairs`.

    python -m demos.prompts OUT --count 500

They are of the combinations that training shows. Every second one is in Chinese.
"""

from pathlib import Path

import tyro

from demos import world
from easyanimate_jax.commands.parse import registry


def main(out: tyro.conf.Positional[Path], count: int = 500, seed: int = 0) -> None:
    """Write `count` different prompts of clips to the text file OUT.

    Raises ValueError if the world has not so many.
    """
    found = list(dict.fromkeys(world.prompts("seen", 4 * count, seed)))
    if len(found) < count:
        raise ValueError(f"--count {count}: only {len(found)} different prompts; ask for fewer")
    texts = [p.zh if number % 2 else p.en for number, p in enumerate(found[:count])]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(texts) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main, registry=registry())
