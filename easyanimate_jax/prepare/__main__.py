"""`python -m easyanimate_jax.prepare CONFIG [--field value ...]`: encode a config's latent sets."""

import sys

import jax

from easyanimate_jax.config import load
from easyanimate_jax.convert.folder import load_vae
from easyanimate_jax.prepare import fingerprint, prepare
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.text.encode import TextEncoder


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for what the user can repair, with one line that says how."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        config = load(arguments[0], arguments[1:])
        with jax.set_mesh(make_mesh(MeshConfig())):  # every device here, not the training's mesh
            prepare(
                config.source,
                config.prepared,
                config.sets,
                load_vae(config.vae),
                TextEncoder.load(config.text),
                config.samples.prompts,
                config.seed,
                weights={"vae": fingerprint(config.vae), "text": fingerprint(config.text)},
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
