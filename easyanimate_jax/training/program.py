"""The train step as a jitted program: sharded state, sharded batch, donated buffers.

`train.py` runs this program, and the verb `aot` compiles the same one for absent devices.
"""

import dataclasses
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.facts import LATENT_CHANNELS, PATCH
from easyanimate_jax.models.lora import LoRAConfig, attach
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.models.storage import store
from easyanimate_jax.sharding import AnyMesh, activation_spec, shardings
from easyanimate_jax.training.optimizer import OptimizerConfig, make_optimizer
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import TrainState, init_state, train_step

# Vector memory that one operation may use, by device kind; the default is 16 MiB. v5p has 64 MiB
# per core, v6e has 128 MiB; other trainers for these chips use the same limits. Larger tiles make
# matrix products a sixth faster by the compiler's estimate, and the backward pass of Splash needs
# the memory for its long blocks of keys.
COMPILER_OPTIONS = {
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
}


class StepConfig(NamedTuple):
    """The settings of a run's train step that do not depend on the stage."""

    model: MMDiTConfig
    optimizer: OptimizerConfig
    process: DDPM | Flow
    ema_decay: float
    lora: LoRAConfig | None = None  # the adapters, which are then all that is trained


def make_model(model: MMDiTConfig, lora: LoRAConfig | None, key: PRNGKeyArray) -> MMDiT:
    """Return a new model; with `lora` its kernels are stored as there, with adapters beside."""
    made = MMDiT(model, rngs=nnx.Rngs(params=key))
    if lora is not None:
        store(made, lora.base)
        attach(made, lora, key=jax.random.fold_in(key, 1))
    return made


@cache
def graph_of(model: MMDiTConfig, lora: LoRAConfig | None) -> nnx.GraphDef:
    """Return the structure of the model that `make_model` returns."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return nnx.graphdef(jax.eval_shape(partial(make_model, model, lora), key))


@cache
def abstract_state(
    model: MMDiTConfig,
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
    lora: LoRAConfig | None = None,
):
    """Return (function key -> state, the state's shardings, the state as placed shapes)."""
    make = partial(init_state, partial(make_model, model, lora), optimizer)
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
    """Return the sharded shapes of a batch as the loader makes it.

    Arrays begin with (microbatches, rows). The last microbatch is padded with rows of weight 0.
    """
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
    """Return the rows of a microbatch, padded to a multiple of the devices that shard rows."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = min(stage.microbatch or stage.batch_size, stage.batch_size)
    return -(-rows // parts) * parts


def batch_shardings(mesh: AnyMesh, batch: Batch) -> Batch:
    """Return the shardings of a batch: rows over `data` and `fsdp`.

    `context` shards rows too if there are enough, and tokens otherwise.
    """

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


def step_program(config: StepConfig, placed: TrainState, stage: Stage):
    """Return the jitted train step of a stage; it donates the state and keeps its shardings."""
    step = partial(
        train_step,
        optimizer=make_optimizer(config.optimizer),
        process=config.process,
        ema_decay=config.ema_decay,
        batch_size=stage.batch_size,
    )
    if config.lora is not None:
        model = dataclasses.replace(config.model, in_channels=stage.in_channels)
        step = partial(step, graph=graph_of(model, config.lora), dropout=config.lora.dropout)
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
