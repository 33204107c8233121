"""The batches of a config's stages, as global arrays on its mesh."""

from pathlib import Path

import jax
from jax.sharding import NamedSharding

from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records
from easyanimate_jax.prepare.encode import Encoder
from easyanimate_jax.prepare.prepare import fingerprint
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.runs.visits import VisitLoader
from easyanimate_jax.sharding import activation_spec
from easyanimate_jax.training.program import batch_shardings, microbatch_rows
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.weights.folder import load_vae


def make_loaders(config: TrainConfig, mesh) -> dict[str, Loader]:
    """The loader of every stage, by its name: of prepared latents, or of the clips themselves.

    Raises ValueError for sets that are not there, or were made with other models.
    """
    records = {s.name: Records(Path(config.prepared) / s.name) for s in _used(config)}
    _check(config, records)
    encoder = None
    if any(latents.pixels for latents in _used(config)):
        own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        encoder = Encoder(load_vae(config.vae), own, most=1, announce=print)
    return {s.name: _loader(config, s, mesh, records[s.data], encoder) for s in config.stages}


def place(batch: Batch, mesh) -> Batch:
    """A batch of host arrays as global arrays: rows over data and fsdp, tokens over context."""

    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]),
        batch,
        batch_shardings(mesh, batch),
    )


def own_rows(stage: Stage, mesh) -> tuple[int, int] | None:
    """First and last + 1 of the rows of a microbatch that this process's devices hold."""
    if jax.process_count() == 1:
        return None
    rows = microbatch_rows(stage, mesh)
    sharding = NamedSharding(mesh, activation_spec(mesh, (rows,), ("batch",)))
    held = [
        at[0].indices(rows) for at in sharding.addressable_devices_indices_map((rows,)).values()
    ]
    return min(first for first, *_ in held), max(last for _, last, _ in held)


def _used(config: TrainConfig) -> list:
    return [config.set(name) for name in dict.fromkeys(stage.data for stage in config.stages)]


def _check(config: TrainConfig, records: dict[str, Records]) -> None:
    """Of the models, process 0 reads every byte, as `prepare` did; the others trust it."""
    for latents in _used(config):
        made = records[latents.name].header["set"]
        if made.get("pixels", False) != latents.pixels:
            raise ValueError(
                f"{records[latents.name].folder} was prepared with pixels="
                f"{not latents.pixels}, and the config says {latents.pixels}; change the set, or "
                f"prepare it again in another folder"
            )
    if jax.process_index():
        return
    for kind, folder in (("vae", config.vae), ("text", config.text)):
        prints = {r.header.get("weights", {}).get(kind) for r in records.values()} - {None}
        if prints and Path(folder).is_dir() and prints != {fingerprint(folder)}:
            raise ValueError(
                f"{config.prepared} was prepared with another {kind} than {folder} now holds; "
                f"restore the model, or prepare again in another folder"
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
    )
    options = {
        "task": stage.task,
        "microbatch": microbatch_rows(stage, mesh),
        "text_drop": config.text_drop,
        "rows": own_rows(stage, mesh),
        "quarantine": Path(config.run) / "quarantine.jsonl",
        "drops": (stage.control_drop, stage.reference_drop),
    }
    if latents.pixels:
        return VisitLoader(records, plan, latents, encoder, **options)
    return Loader(records, plan, **options)
