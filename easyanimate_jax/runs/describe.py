"""A summary of a config's schedule in numbers; it uses no device (the verb `describe`)."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np

from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import RULES, MeshConfig, is_variable
from easyanimate_jax.training.optimizer import make_optimizer
from easyanimate_jax.training.program import make_model
from easyanimate_jax.training.step import TrainState, init_state


def describe_run(config: TrainConfig) -> str:
    """Return a config's stages, buckets, parameter count and state bytes per device, as text."""
    model = dataclasses.replace(config.model, in_channels=config.stages[-1].in_channels)
    make = partial(
        init_state, partial(make_model, model, config.adapters), make_optimizer(config.optimizer)
    )
    state = jax.eval_shape(make, jax.random.key(0))
    trained, frozen = (
        sum(x.size for x in jax.tree.leaves(part)) for part in (state.model, state.frozen)
    )
    parameters = frozen or trained
    lines = [
        f"model    {model.depth} blocks ({model.mmdit_depth} with their own text weights), width "
        f"{model.width} = {model.heads} heads x {model.head_width}, {parameters:,} parameters",
        *_lora_lines(config.adapters, trained),
        f"process  {config.process}",
        *_mesh_lines(config.mesh, state),
        "",
        f"{'stage':<16}{'task':<12}{'set':<12}{'batch':>7}{'steps':>9}{'samples':>14}"
        f"{'tokens':>16}{'learning rate':>15}",
    ]
    total_samples = total_tokens = 0
    for stage in config.stages:
        samples = stage.batch_size * stage.steps
        tokens = samples * config.set(stage.data).budget.lengths[-1]
        total_samples, total_tokens = total_samples + samples, total_tokens + tokens
        lines.append(
            f"{stage.name:<16}{stage.task:<12}{stage.data:<12}{stage.batch_size:>7,}"
            f"{stage.steps:>9,}{samples:>14,}{tokens:>16.3e}{stage.learning_rate:>15.1e}"
        )
    steps = sum(stage.steps for stage in config.stages)
    lines += [f"{'all':<47}{steps:>9,}{total_samples:>14,}{total_tokens:>16.3e}"]
    for budget in dict.fromkeys(latents.budget for latents in config.sets):
        lines += ["", f"nominal {budget.tokens:,} tokens"]
        for latents in config.sets:
            if latents.budget == budget:
                kinds = " and ".join(f"{kind}s" for kind in latents.kinds)
                best = f", quality >= {latents.min_quality}" if latents.min_quality else ""
                lines += [f"  set {latents.name}: {kinds}, short side >= {latents.min_side}{best}"]
        by_size = {}
        for (frames, height, width), tokens, length in budget.describe():
            by_size.setdefault((length, tokens, frames), []).append(f"{height}x{width}")
        for (length, tokens, frames), sizes in sorted(by_size.items()):
            lines += [f"  {length:>6} <- {tokens:>6} tokens: {frames} frames of {', '.join(sizes)}"]
    return "\n".join(lines)


def _lora_lines(lora: LoRAConfig | None, parameters: int) -> list[str]:
    """Return a line about the adapters, if there are any, and the size of an exported file."""
    if lora is None:
        return []
    return [
        f"lora     rank {lora.rank}, alpha {lora.alpha:g}, beside {', '.join(lora.targets)}: "
        f"{parameters:,} parameters, {2 * parameters / 1e9:.2f} GB as a file in bfloat16; the "
        f"kernels of the model are frozen in {lora.base}"
    ]


def _mesh_lines(mesh: MeshConfig, state: TrainState) -> list[str]:
    """Return lines with the mesh and the bytes of training state per device, without gradients."""
    sizes = dataclasses.asdict(mesh)
    if sizes["fsdp"] == -1:
        return [f"mesh     {mesh}: fsdp takes the devices it finds; give a number to see bytes"]

    def bytes_of(tree) -> float:
        total = 0.0
        for variable in jax.tree.leaves(tree, is_leaf=is_variable):
            names = [RULES[axis] for axis in getattr(variable, "out_sharding", None) or () if axis]
            parts = math.prod(sizes[n] for name in names if name for n in np.atleast_1d(name))
            # For some weights the optimizer keeps no moment, and this sum is 0.
            total += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variable)) / parts
        return total

    held = {"weights": state.model, "their average": state.ema}
    held |= {"the optimizer's moments": state.opt_state, "frozen weights": state.frozen}
    held = {name: bytes_of(tree) / 1e9 for name, tree in held.items() if tree is not None}
    parts = ", ".join(f"{name} {size:.2f}" for name, size in held.items())
    return [
        f"mesh     {' x '.join(f'{k} {v}' for k, v in sizes.items())} = "
        f"{math.prod(sizes.values())} devices",
        f"state    {sum(held.values()):.2f} GB a device: {parts}",
    ]
