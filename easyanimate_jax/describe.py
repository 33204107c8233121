"""`train.py CONFIG --describe`: the whole schedule in numbers, without touching a device."""

import dataclasses
import math

import jax
from flax import nnx

from easyanimate_jax.config import TrainConfig
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.sharding import RULES, MeshConfig

# float32: weights, their average, two Adam moments; the gradient is alive within a step only.
STATE_COPIES = 4


def describe_run(config: TrainConfig) -> str:
    """Stages, buckets with every size, parameters, and state bytes per device, as text."""
    model = dataclasses.replace(config.model, in_channels=config.stages[-1].in_channels)
    weights = jax.eval_shape(lambda key: MMDiT(model, rngs=nnx.Rngs(params=key)), jax.random.key(0))
    variables = jax.tree.leaves(weights, is_leaf=lambda x: hasattr(x, "get_metadata"))
    parameters = sum(math.prod(v.get_value().shape) for v in variables)
    lines = [
        f"model    {model.depth} blocks ({model.mmdit_depth} with their own text weights), width "
        f"{model.width} = {model.heads} heads x {model.head_width}, {parameters:,} parameters",
        f"process  {config.process}",
        *_mesh_lines(config.mesh, variables),
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


def _mesh_lines(mesh: MeshConfig, variables: list) -> list[str]:
    """What one device of the configured mesh holds of the training state."""
    sizes = dataclasses.asdict(mesh)
    if sizes["fsdp"] == -1:
        return [f"mesh     {mesh}: fsdp takes the devices it finds; give a number to see bytes"]
    elements = 0
    for variable in variables:
        names = [RULES[a] if a else None for a in variable.out_sharding or ()]
        flat = [n for name in names if name for n in ((name,) if isinstance(name, str) else name)]
        elements += math.prod(variable.get_value().shape) / math.prod(sizes[n] for n in flat)
    devices = math.prod(sizes.values())
    return [
        f"mesh     {' x '.join(f'{k} {v}' for k, v in sizes.items())} = {devices} devices",
        f"state    {elements * 4 * STATE_COPIES / 1e9:.2f} GB a device "
        f"({STATE_COPIES} float32 copies of {elements / 1e6:,.1f} M weights: weights, average, "
        f"two Adam moments)",
    ]
