"""Loaders of a config's stages, and their batches as global arrays on their meshes."""

import logging
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from easyanimate_jax.data.held_out import HeldOut
from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records, texts_key
from easyanimate_jax.prepare.encode import Encoder
from easyanimate_jax.prepare.prepare import prompts_key
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.runs.visits import VisitLoader
from easyanimate_jax.sharding import activation_spec
from easyanimate_jax.storage.stores import place as place_of
from easyanimate_jax.training.program import batch_shardings, microbatch_rows, reads_empty
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.weights.folder import load_vae
from easyanimate_jax.weights.identity import fingerprint
from easyanimate_jax.weights.pretrained import model_place

logger = logging.getLogger(__name__)


def make_loaders(config: TrainConfig, meshes: Mapping[str, Mesh]) -> dict[str, Loader]:
    """Return {stage name: loader}; a loader reads prepared latents, or decodes the clips itself.

    `meshes` gives the mesh of each stage. Raises ValueError for latent sets that are missing or
    were prepared with other models.
    """
    records = {s.name: Records(place_of(config.prepared) / s.name) for s in _used(config)}
    _check(config, records)
    encoder = None
    if any(latents.pixels for latents in _used(config)):
        devices = meshes[config.stages[0].name].devices.flat
        own = [d for d in devices if d.process_index == jax.process_index()]
        encoder = Encoder(load_vae(config.vae), own, most=1, announce=logger.info)
    return {
        s.name: _loader(config, s, meshes[s.name], records[s.data], encoder) for s in config.stages
    }


def held_out_loaders(
    config: TrainConfig, meshes: Mapping[str, Mesh], loaders: Mapping[str, Loader]
) -> dict[str, Loader]:
    """Return {stage name: loader of its held-out clips} beside the loaders of the training clips.

    Nothing of a row is dropped, and its draws follow from its clip. Empty without a share to hold
    out. Raises ValueError for a stage without a held-out clip.
    """
    share = config.validation.share
    return {
        stage.name: held_out_loader(
            config,
            stage,
            meshes[stage.name],
            loaders[stage.name].records,
            share,
            getattr(loaders[stage.name], "encoder", None),
        )
        for stage in (config.stages if share else ())
    }


def held_out_loader(
    config: TrainConfig, stage: Stage, mesh, records: Records, share: float, encoder=None
) -> Loader:
    """Return the loader of the clips that a share of the records holds out; 1 means all."""
    settings = config.validation
    plan = HeldOut(
        records.index,
        lengths=config.set(stage.data).budget.lengths,
        batch_size=microbatch_rows(stage, mesh),
        seed=settings.seed,
        name=stage.name,
        share=share,
        most=settings.clips,
    )
    options = {"text_drop": 0.0, "draw_by": plan.keys}
    return _reader(config, stage, mesh, records, plan, encoder, options)


def place(batch: Batch, mesh) -> Batch:
    """Return a batch of host arrays as global arrays on `mesh`.

    Rows are sharded over `data` and `fsdp`, tokens over `context`.
    """

    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]),
        batch,
        batch_shardings(mesh, batch),
    )


def with_empty(batch: Batch, stage: Stage, loader: Loader) -> Batch:
    """Return a batch with the states of the empty caption, if the step of the stage reads them."""
    if not reads_empty(stage):
        return batch
    count = len(batch.weight)
    empty = tuple(np.broadcast_to(text, (count, 1, *text.shape)) for text in loader.empty)
    return batch._replace(empty=empty)


def split(loader: Loader, stage: Stage, mesh: Mesh) -> None:
    """Make the microbatches of a loader, from now on, those of its stage, whose choice is made."""
    loader.microbatch = microbatch_rows(stage, mesh)
    loader.rows = held_rows(stage, mesh, jax.process_index())
    if isinstance(loader.plan, HeldOut):
        loader.plan.split(loader.microbatch)


def held_rows(stage: Stage, mesh: Mesh, process: int) -> frozenset[int]:
    """Return the rows of a microbatch that the devices of a process hold.

    The process reads these rows. They need not be neighbours: a host of a TPU slice is a block of
    its torus.
    """
    rows = microbatch_rows(stage, mesh)
    sharding = NamedSharding(mesh, activation_spec(mesh, (rows,), ("batch",)))
    places = sharding.devices_indices_map((rows,)).items()
    own = {range(rows)[at[0]] for device, at in places if device.process_index == process}
    return frozenset(row for part in own for row in part)


def _used(config: TrainConfig) -> list:
    return [config.set(name) for name in dict.fromkeys(stage.data for stage in config.stages)]


def _check(config: TrainConfig, records: dict[str, Records]) -> None:
    """Raise ValueError for a latent set that was prepared with other settings or models.

    Only process 0 computes the fingerprints, because they read every byte of the models.
    """
    for latents in _used(config):
        made = records[latents.name].header["set"]
        for name in ("pixels", "pairs"):
            want = getattr(latents, name)
            if made.get(name, False) != want:
                raise ValueError(
                    f"{records[latents.name].folder} was prepared with {name}={not want}, and the "
                    f"config says {want}; change the set, or prepare it again in another folder"
                )
        _check_prompts(config, records[latents.name].header.get("weights", {}))
    if jax.process_index():
        return
    for kind, folder in (("vae", config.vae), ("text", config.text)):
        prints = {r.header.get("weights", {}).get(kind) for r in records.values()} - {None}
        if prints and model_place(folder).is_dir() and prints != {fingerprint(folder)}:
            raise ValueError(
                f"{config.prepared} was prepared with another {kind} than {folder} now holds; "
                f"restore the model, or prepare again in another folder"
            )


def _check_prompts(config: TrainConfig, weights: dict[str, str]) -> None:
    """Raise ValueError unless `prepare` has encoded the config's sample prompts."""
    prompts, path = config.samples.prompts, place_of(config.prepared) / "prompts.safetensors"
    if not (prompts and config.samples.every):
        return
    have = texts_key(path) if path.is_file() else "none"
    if have not in ("", prompts_key(prompts, weights)):  # "": by an earlier version
        raise ValueError(
            f"{path} {'is missing' if have == 'none' else 'holds other sample prompts'}: the "
            f"config's samples.prompts are {', '.join(map(repr, prompts))[:200]}; run python -m "
            f"easyanimate_jax prepare with this config again, which keeps what did not change"
        )


def _loader(config: TrainConfig, stage: Stage, mesh, records: Records, encoder) -> Loader:
    latents = config.set(stage.data)
    plan = Plan(
        records.index,
        lengths=latents.budget.lengths,
        batch_size=stage.batch_size,
        seed=config.seed,
        name=stage.name,
        weights=stage.weights,
        held_out=config.validation.share,
    )
    options = {
        "text_drop": config.text_drop,
        "drops": (stage.control_drop, stage.reference_drop, stage.picture_drop),
    }
    return _reader(config, stage, mesh, records, plan, encoder, options)


def _reader(config: TrainConfig, stage: Stage, mesh, records, plan, encoder, options) -> Loader:
    options |= {
        "task": stage.task,
        "microbatch": microbatch_rows(stage, mesh),
        "rows": held_rows(stage, mesh, jax.process_index()),
        "quarantine": config.folder / "quarantine.jsonl",
    }
    latents = config.set(stage.data)
    if latents.pixels:
        return VisitLoader(records, plan, latents, encoder, **options)
    return Loader(records, plan, **options)
