"""Encode the clips of a config to records."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training.safety.exits import DONE

HELP = """Encode the clips of a config to records: latents and text states, for every set.

Run the same command to resume; finished shards are kept. Every field of the config is an option,
`--field value`; `CONFIG --help` lists them. Example:

  python -m easyanimate_jax prepare configs/demo.py --source my/clips --prepared my/latents

On many machines, plan once, and then let each make its part of the shards:

  python -m easyanimate_jax prepare CONFIG --step plan
  python -m easyanimate_jax prepare CONFIG --step work --part 3/128"""


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare`."""

    config: Positional[str]
    """Python file that defines `config`, such as configs/demo.py."""
    part: str = "0/1"
    """Make only this part of the shards: 0/8 to 7/8 share the work between eight hosts."""
    step: Literal["all", "plan", "work"] = "all"
    """"plan" reads the source and writes manifests; "work" makes the shards of these manifests."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `prepare`; return the exit code."""
    set_up_jax()
    return parse.run(partial(_prepare, arguments))


def _prepare(arguments: Sequence[str]) -> int:
    own, config = parse.options_and_config(Options, arguments, "prepare", HELP, ("TrainConfig",))
    part, prepared = parse.part_of(own.part), place(config.prepared)
    if isinstance(prepared, Path):
        for latent_set in config.sets:
            parse.check_folder("--prepared", prepared / latent_set.name)
        FolderLock(prepared, option="--prepared", part=part).look()  # no device yet
    import jax

    from easyanimate_jax.prepare.prepare import make_sets, plan_sets
    from easyanimate_jax.sharding import MeshConfig, make_mesh
    from easyanimate_jax.text.encode import TextEncoder
    from easyanimate_jax.weights.folder import load_vae
    from easyanimate_jax.weights.identity import fingerprint

    weights = {"vae": fingerprint(config.vae), "text": fingerprint(config.text)}
    options = {"weights": weights, "part": part}
    if own.step != "work":
        source = config.source, config.links
        plan_sets(source, prepared, config.sets, config.seed, **options)
    if own.step == "plan":
        print(f"{prepared}: planned; make the shards with --step work")
        return DONE
    with jax.set_mesh(make_mesh(MeshConfig())):  # all local devices, not the training's mesh
        models = load_vae(config.vae), TextEncoder.load(config.text), config.samples.prompts
        whole = make_sets(prepared, config.sets, *models, config.seed, **options)
    if not whole:
        print(f"part {own.part} is done; other parts are not")
    return DONE
