"""Encode the clips of a config to records."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.prepare.cluster import Kind, check_ray
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.storage.stores import Place, place
from easyanimate_jax.training.safety.exits import DONE, FOUND, PREEMPTED
from easyanimate_jax.weights.pretrained import model_place

HELP = """Encode the clips of a config to records: latents and text states, for every set.

Run the same command to resume; finished shards are kept. Every field of the config is an option,
`--field value`; `CONFIG --help` lists them. Example:

  python -m easyanimate_jax prepare configs/demo.py --source my/clips --prepared my/latents

On many machines, plan once, and then let each make its part of the shards:

  python -m easyanimate_jax prepare CONFIG --step plan
  python -m easyanimate_jax prepare CONFIG --step work --part 3/128

Or let a Ray cluster share the work: the one that RAY_ADDRESS names, else one on this machine, which
is started and ended. The exit code is 0 if all is made, and 1 if a shard could not be made:

  python -m easyanimate_jax prepare CONFIG --engine ray"""


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare`."""

    config: Positional[str]
    """Python file that defines `config`, such as configs/demo.py."""
    part: str = "0/1"
    """Make only this part of the shards: 0/8 to 7/8 share the work between eight hosts."""
    step: Literal["all", "plan", "work"] = "all"
    """"plan" reads the source and writes manifests; "work" makes the shards of these manifests."""
    engine: Literal["process", "ray"] = "process"
    """"process" makes the shards in this process, on its devices; "ray" on a Ray cluster."""
    devices: Kind = "any"
    """Devices of the hosts of a Ray cluster that encode; "any": TPUs, else GPUs, else CPUs."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `prepare`; return the exit code."""
    set_up_jax()
    return parse.run(partial(_prepare, arguments))


def _prepare(arguments: Sequence[str]) -> int:
    own, config = parse.options_and_config(Options, arguments, "prepare", HELP, ("TrainConfig",))
    part, prepared = parse.part_of(own.part), place(config.prepared)
    check_engine(own)
    if isinstance(prepared, Path):
        for latent_set in config.sets:
            parse.check_folder("--prepared", prepared / latent_set.name)
        FolderLock(prepared, option="--prepared", part=part).look()  # no device yet
    import jax

    from easyanimate_jax.prepare import engine
    from easyanimate_jax.prepare.prepare import make_sets, plan_sets
    from easyanimate_jax.sharding import MeshConfig, make_mesh
    from easyanimate_jax.weights.identity import fingerprint

    weights = {"vae": fingerprint(config.vae), "text": fingerprint(config.text)}
    if own.step != "work":
        source, options = (config.source, config.links), {"weights": weights, "part": part}
        plan_sets(source, prepared, config.sets, config.seed, **options)
    if own.step == "plan":
        print(f"{prepared}: planned; make the shards with --step work")
        return DONE
    prompts, load = config.samples.prompts, partial(load_models, *_models(config))
    if own.engine == "ray":
        options = {"weights": weights, "devices": own.devices}
        try:
            if engine.make_sets(prepared, config.sets, load, prompts, config.seed, **options):
                return DONE
        except ConnectionError as error:
            print(f"error: {error}", file=sys.stderr)
            return PREEMPTED
        print(f"error: {prepared} is not complete; run the same command again", file=sys.stderr)
        return FOUND
    with jax.set_mesh(make_mesh(MeshConfig())):  # all local devices, not the training's mesh
        models, options = load(), {"weights": weights, "part": part}
        whole = make_sets(prepared, config.sets, *models, prompts, config.seed, **options)
    if not whole:
        print(f"part {own.part} is done; other parts are not")
    return DONE


def load_models(vae: str | Place, text: str | Place) -> tuple:
    """Return the VAE and the text encoder of two folders, on the current mesh."""
    from easyanimate_jax.text.encode import TextEncoder
    from easyanimate_jax.weights.folder import load_vae

    return load_vae(vae), TextEncoder.load(text)


def _models(config) -> tuple[Place, Place]:
    """Return the folders of the models, as another process finds them."""
    return model_place(config.vae).absolute(), model_place(config.text).absolute()


def check_engine(own: Options) -> None:
    """Raise ValueError for options that do not fit the engine, or if Ray is not installed."""
    if own.engine == "ray":
        check_ray()
        parse.check_no_part(own.part)
    elif own.devices != "any":
        raise ValueError(f"--devices {own.devices} chooses hosts of a cluster; add --engine ray")
