"""`python -m easyanimate_jax prepare CONFIG [--part K/N] [--field value ...]`: encode its sets.

`--part 0/8` to `--part 7/8` share the work, on any hosts; the last to end makes the index.
"""

import sys

import jax

from easyanimate_jax.prepare.prepare import fingerprint, prepare
from easyanimate_jax.runs.config import load
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.text.encode import TextEncoder
from easyanimate_jax.weights.folder import load_vae


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for what the user can repair, with one line that says how."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        path, *rest = arguments
        part, parts = 0, 1
        if rest[:1] == ["--part"]:
            part, parts = _part(rest[1] if len(rest) > 1 else "")
            rest = rest[2:]
        config = load(path, rest)
        with jax.set_mesh(make_mesh(MeshConfig())):  # every device here, not the training's mesh
            whole = prepare(
                config.source,
                config.prepared,
                config.sets,
                load_vae(config.vae),
                TextEncoder.load(config.text),
                config.samples.prompts,
                config.seed,
                weights={"vae": fingerprint(config.vae), "text": fingerprint(config.text)},
                part=(part, parts),
            )
        if not whole:
            print(f"part {part}/{parts} is done; other parts are not")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"--part {text!r}: give a number and how many there are, as in 0/8 to 7/8")
    return int(part), int(parts)
