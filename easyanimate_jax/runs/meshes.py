"""The meshes of a run: all stages have the same devices, and each may have a mesh of its own."""

from jax.sharding import Mesh

from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import make_mesh
from easyanimate_jax.training.program import abstract_state
from easyanimate_jax.training.stages import Stage


def stage_meshes(config: TrainConfig) -> dict[str, Mesh]:
    """Return {stage name: mesh over all devices}; stages with equal axes share one mesh.

    Raises ValueError for a mesh with another number of devices or one that does not divide the
    weights, and for a stage's own mesh that its batch does not fill.
    """
    meshes, made = {}, {}
    for index, stage in enumerate(config.stages):
        axes = config.mesh_of(stage)
        try:
            if axes not in made:
                made[axes] = make_mesh(axes)
            meshes[stage.name] = made[axes]
            abstract_state(config.step.with_channels(stage.in_channels), made[axes])
            _check_rows(stage, made[axes])
        except ValueError as error:
            if stage.mesh is None:
                raise
            raise ValueError(f"stage {stage.name!r}, stages.{index}.mesh: {error}") from error
    return meshes


def _check_rows(stage: Stage, mesh: Mesh) -> None:
    """Raise ValueError if a stage's own mesh has devices that would compute padding alone.

    The mesh of a config may have them, because it is that of all its stages.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if stage.mesh is not None and groups > stage.batch_size:
        raise ValueError(
            f"data x fsdp = {groups} groups of devices have different rows, and a batch has "
            f"{stage.batch_size}; use at most {stage.batch_size} groups, and more devices along "
            f"context"
        )
