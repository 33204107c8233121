"""The train step as a compiled program: placed state, placed batch, donated buffers.

What `trainer` runs and what `aot` compiles for devices that are not there is made here, once.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.facts import LATENT_CHANNELS, PATCH
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.sharding import AnyMesh, activation_spec, shardings
from easyanimate_jax.training.optimizer import OptimizerConfig
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import TrainState, init_state, train_step

# Vector memory that one operation may take, by device kind: all 64 MiB of a core of v5p, 96 of the
# 128 of v6e, as other trainers for them have it, instead of 16. Products get larger tiles, a sixth
# faster by the compiler's own estimate, and Splash's backward pass its long blocks of keys.
COMPILER_OPTIONS = {
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
}


class StepConfig(NamedTuple):
    """What a run's train step depends on beside its stage."""

    model: MMDiTConfig
    optimizer: OptimizerConfig
    process: DDPM | Flow
    ema_decay: float


@cache
def abstract_state(model: MMDiTConfig, optimizer: optax.GradientTransformation, mesh: AnyMesh):
    """(function of a key that makes the state, its shardings, the state as placed shapes)."""
    make = partial(init_state, lambda key: MMDiT(model, rngs=nnx.Rngs(params=key)), optimizer)
    shapes = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    placed = shardings(mesh, shapes)
    return make, placed, _place(shapes, placed)


def abstract_batch(
    model: MMDiTConfig,
    mesh: AnyMesh,
    *,
    batch_size: int,
    microbatch: int,
    tokens: int,
    text_lengths: tuple[int, ...],
) -> Batch:
    """The placed shapes of a batch as the loader makes it, its last microbatch filled up."""
    rows = -(-batch_size // microbatch), microbatch
    channels = LATENT_CHANNELS * PATCH**2
    extra = (model.in_channels - LATENT_CHANNELS) * PATCH**2

    def array(*shape: int, dtype=jnp.float16):
        return jax.ShapeDtypeStruct((*rows, *shape), dtype)

    batch = Batch(
        mean=array(tokens, channels),
        logvar=array(tokens, channels),
        grid=array(3, dtype=jnp.int32),
        lengths=array(dtype=jnp.int32),
        texts=tuple(map(array, text_lengths, model.text_widths)),
        condition=array(tokens, extra, dtype=jnp.float32) if extra else None,
        weight=array(dtype=jnp.float32),
    )
    return _place(batch, batch_shardings(mesh, batch))


def microbatch_rows(stage: Stage, mesh: AnyMesh) -> int:
    """Rows that go through the network at once: the stage's, filled up to whole devices."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = min(stage.microbatch or stage.batch_size, stage.batch_size)
    return -(-rows // parts) * parts


def batch_shardings(mesh: AnyMesh, batch: Batch) -> Batch:
    """Rows over data and fsdp; over context go rows too where there are enough, tokens else."""

    def place(x, *axes: str | None):
        rest = (None,) * (x.ndim - 2 - len(axes))
        return NamedSharding(mesh, activation_spec(mesh, x.shape, (None, "batch", *axes, *rest)))

    return Batch(
        mean=place(batch.mean, "tokens"),
        logvar=place(batch.logvar, "tokens"),
        grid=place(batch.grid),
        lengths=place(batch.lengths),
        texts=tuple(place(text) for text in batch.texts),
        condition=None if batch.condition is None else place(batch.condition, "tokens"),
        weight=place(batch.weight),
    )


def step_program(
    optimizer: optax.GradientTransformation,
    process,
    ema_decay: float,
    placed: TrainState,
    batch_size: int,
):
    """The jitted train step; the state is donated and comes back where it was."""
    settings = {"process": process, "ema_decay": ema_decay, "batch_size": batch_size}
    step = partial(train_step, optimizer=optimizer, **settings)
    device = placed.step.mesh.devices.flat[0]
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, placed.step),
        compiler_options=COMPILER_OPTIONS.get(device.device_kind),
    )


def _place(shapes, placed):
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed
    )
