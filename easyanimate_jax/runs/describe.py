"""A summary of a config's schedule in numbers; it uses no device (the verb `describe`)."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from easyanimate_jax.diffusion.times import NUM_TRAIN_TIMES
from easyanimate_jax.models.layers import matches
from easyanimate_jax.models.lora import LoRAConfig
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import RULES, MeshConfig, is_variable
from easyanimate_jax.training.program import abstract_judge, make_state
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.weights.module import named_weights

GRID = 10_000  # equal shares of the training times, of which a histogram shows the middles


def describe_run(config: TrainConfig) -> str:
    """Return a config's stages, buckets, parameter count and state bytes per device, as text."""
    settings = config.step.with_channels(config.stages[-1].in_channels)
    model = settings.model
    state = jax.eval_shape(partial(make_state, settings), jax.random.key(0))
    state = state._replace(judge=abstract_judge(settings))
    sizes = {name: x.size for name, x in named_weights(state.model).items()}
    adapters = sum(size for name, size in sizes.items() if "adapter" in name.split("."))
    trained = sum(sizes.values()) - adapters
    parameters = trained + sum(x.size for x in jax.tree.leaves(state.frozen))
    lines = [
        f"model    {model.depth} blocks ({model.mmdit_depth} with their own text weights), width "
        f"{model.width} = {model.heads} heads x {model.head_width}, {parameters:,} parameters",
        *_lora_lines(config.adapters, adapters),
        *_part_lines(config, sizes, trained),
        *_optimizer_lines(config),
        f"process  {config.process}",
        *_time_lines(config),
        *_mesh_lines(config, state),
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
        if stage.objective is not None:
            lines.append(f"{'':<16}{stage.objective}, taught by {config.init}")
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


def _time_lines(config: TrainConfig) -> list[str]:
    """Return a histogram of the training times, by tenths of the noise.

    Times that depend on the tokens have two: for the shortest and for the longest clips.
    """
    lengths = {n for latents in config.sets for n in latents.budget.lengths}
    columns = {}
    for length in sorted({min(lengths), max(lengths)}):
        u = (jnp.arange(GRID) + 0.5) / GRID
        times = config.process.time_of(u, jnp.full(GRID, length))
        shares, _ = np.histogram(times, np.linspace(0, NUM_TRAIN_TIMES, 11))
        columns.setdefault(tuple(shares / GRID), []).append(f"{length:,}")
    lines = []
    for shares, names in columns.items():
        whom = "all lengths" if len(columns) == 1 else f"{', '.join(names)} tokens"
        lines += [f"times    drawn in training, of {whom}; by noise, from clean to noise:"]
        for tenth, share in enumerate(shares):
            bar = "#" * round(share * 200)
            lines += [f"         {tenth / 10:.1f} to {tenth / 10 + 0.1:.1f} {share:>6.1%} {bar}"]
    return lines


def _lora_lines(lora: LoRAConfig | None, parameters: int) -> list[str]:
    """Return a line about the adapters, if there are any, and the size of an exported file."""
    if lora is None:
        return []
    return [
        f"lora     rank {lora.rank}, alpha {lora.alpha:g}, beside {', '.join(lora.targets)}: "
        f"{parameters:,} parameters, {2 * parameters / 1e9:.2f} GB as a file in bfloat16"
    ]


def _part_lines(config: TrainConfig, sizes: dict[str, int], trained: int) -> list[str]:
    """Return lines about the weights that are trained and the type of the frozen ones."""
    if not config.step.partial:
        return []
    lines = []
    left = {name: size for name, size in sizes.items() if "adapter" not in name.split(".")}
    for pattern, factor in config.train:
        found = [name for name in left if matches(name, [pattern])]
        count = sum(left.pop(name) for name in found)
        lines += [f"train    {pattern}: {count:,} parameters at {factor:g} x the learning rate"]
    own = f"{trained:,} weights of the model" if trained else "none of the model's own weights"
    return [*lines, f"frozen   all others in {config.frozen}; trained are {own}"]


def _optimizer_lines(config: TrainConfig) -> list[str]:
    """Return a line about the update rules and what is kept for them."""
    rule = {"adam": "Adam", "muon": "Adam; Muon for the blocks' matrices"}
    rule["adafactor"] = "Adam; Adafactor for the blocks' matrices"
    average = f"averaged with decay {config.ema_decay:g}" if config.ema_decay else "not averaged"
    return [
        f"updates  {rule[config.optimizer.matrices]}, moments in {config.optimizer.moments}; the "
        f"weights are {average}"
    ]


def _mesh_lines(config: TrainConfig, state: TrainState) -> list[str]:
    """Return lines about the meshes of the stages."""
    stages = {}
    for stage in config.stages:
        stages.setdefault(config.mesh_of(stage), []).append(stage.name)
    lines = []
    for mesh, names in stages.items():
        whose = f" in {', '.join(names)}" if len(stages) > 1 else ""
        lines += _lines_of_mesh(mesh, whose, state)
    return lines


def _lines_of_mesh(mesh: MeshConfig, whose: str, state: TrainState) -> list[str]:
    """Return lines with a mesh and the bytes of training state per device, without gradients."""
    sizes = dataclasses.asdict(mesh)
    if sizes["fsdp"] == -1:
        what = f"{mesh}{whose}: fsdp takes the devices it finds; give a number to see bytes"
        return [f"mesh     {what}"]

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
    held |= {"teacher": state.teacher, "critic and its moments": state.critic}
    held |= {"decoder and reward": state.judge}
    held = {name: bytes_of(tree) / 1e9 for name, tree in held.items() if tree is not None}
    parts = ", ".join(f"{name} {size:.2f}" for name, size in held.items())
    return [
        f"mesh     {' x '.join(f'{k} {v}' for k, v in sizes.items())} = "
        f"{math.prod(sizes.values())} devices{whose}",
        f"state    {sum(held.values()):.2f} GB a device: {parts}",
    ]
