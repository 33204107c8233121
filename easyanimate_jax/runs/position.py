"""The position of a run in its schedule, and the check that a checkpoint fits a config.

A checkpoint stores the number of updates made, the stage, and the config that made it. Finished
stages cannot change. The current stage can get more or fewer steps, another learning rate or mesh,
other kept activations or another microbatch. Stages that have not begun can change freely. A
checkpoint that another schedule made is never deleted.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

from easyanimate_jax.runs.config import TrainConfig, from_json
from easyanimate_jax.training.stages import Stage, stage_at

# Fields that may change in a stage that has begun: they concern only its later steps.
FREE_OF_STAGE = ("steps", "microbatch", "mesh", "save", "learning_rate", "end_learning_rate")
FREE_OF_STAGE += ("warmup", "decay", "decay_power", "control_drop", "reference_drop")
# How the model computes, and the channels of a stage.
FREE_OF_MODEL = ("save", "offload", "dtype", "products", "in_channels")
FREE_OF_FINISHED = ("microbatch", "mesh", "save")  # nothing is computed by them again
# Fields of a config that decide its updates; the others say where and how a run computes and saves.
OF_SCHEDULE = ("model", "process", "sets", "stages", "optimizer", "ema_decay", "text_drop", "seed")
OF_SCHEDULE += ("init", "init_step")


class Position(NamedTuple):
    """A place in the schedule: the stage, its own step from 0, and the updates made in all."""

    stage: Stage
    step: int
    made: int

    @property
    def last(self) -> bool:
        """Return whether the next update is the stage's last one."""
        return self.step + 1 == self.stage.steps


def saved_config(meta: Mapping) -> TrainConfig:
    """Return the config that made a checkpoint. Raises ValueError for one of another version."""
    return from_json(json.dumps(meta["config"]))


def ends_stage(meta: Mapping) -> bool:
    """Return whether a checkpoint is the last of a stage in the schedule that made it."""
    total = 0
    for stage in meta.get("config", {}).get("stages", ()):
        total += stage["steps"]
        if total == meta.get("step"):
            return True
    return False


def is_kept(meta: Mapping, config: TrainConfig) -> bool:
    """Return whether a checkpoint is never deleted by a run of `config`.

    This holds for the last checkpoint of a stage, and for all that another schedule made. Raises
    ValueError for a checkpoint of another version.
    """
    if ends_stage(meta):
        return True
    return _schedule(saved_config(meta)) != _schedule(config)


def check_resume(meta: Mapping, config: TrainConfig, plans: Mapping[str, str]) -> list[str]:
    """Compare a checkpoint with a config; return the changes that are allowed, as lines of text.

    `plans` are the hashes of the config's plans, by stage. Raises ValueError for a change that is
    not allowed; the message names the field, its two values and the repair.
    """
    step, seed = meta["step"], meta["seed"]
    names = [stage.name for stage in config.stages]
    if meta["stage"] not in names or seed != config.seed:
        raise ValueError(
            f"checkpoint {step} belongs to stage {meta['stage']!r} and seed {seed}, and the config "
            f"has another stage or seed; restore the config, or start in a new run folder."
        )
    saved = saved_config(meta)
    index = [stage.name for stage in saved.stages].index(meta["stage"])
    own = step - sum(stage.steps for stage in saved.stages[:index])
    _check_order(step, saved, config, index)
    changed = []
    for before, now in zip(saved.stages[:index], config.stages, strict=False):
        _compare(step, f"stage {now.name!r}, which is finished", before, now, FREE_OF_FINISHED)
    stage = config.stages[index]
    changed += _compare(
        step, f"stage {stage.name!r}, which has begun", saved.stages[index], stage, FREE_OF_STAGE
    )
    if own > stage.steps:
        raise ValueError(
            f"checkpoint {step} has made {own} steps of stage {stage.name!r}, and the config gives "
            f"it {stage.steps}; use {own} or more, or start in a new run folder."
        )
    data = [c.set(stage.data) for c in (saved, config)]
    _compare(step, f"set {stage.data!r}, which stage {stage.name!r} reads", *data, ())
    changed += _compare(step, "model", saved.model, config.model, FREE_OF_MODEL)
    for name in ("matrices", "moments"):
        _same(step, f"{name} of optimizer", *(getattr(c.optimizer, name) for c in (saved, config)))
    _same(step, "process", *(type(c.process).__name__ for c in (saved, config)))
    for name in ("init", "init_step", "lora", "train", *(["frozen"] if saved.step.partial else [])):
        _same(step, name, getattr(saved, name), getattr(config, name))
    _same(step, "validation.share", saved.validation.share, config.validation.share)
    _same(step, "an average (ema_decay above 0)", saved.ema_decay > 0, config.ema_decay > 0)
    _same(step, "a critic (of DistributionMatching)", saved.step.critic, config.step.critic)
    for name in ("process", "optimizer", "ema_decay", "text_drop"):
        changed += _differences(name, getattr(saved, name), getattr(config, name))
    if meta["plan"] != plans[stage.name]:
        raise ValueError(
            f"checkpoint {step} was made with plan {meta['plan']} of stage {stage.name!r}, and "
            f"the prepared data now gives {plans[stage.name]}. Restore the data, or start a new "
            f"run."
        )
    return changed


def check_weights(meta: Mapping, weights: Mapping[str, str]) -> None:
    """Raise ValueError if the latents of a checkpoint's stage are now those of other models.

    `weights` are the fingerprints of the VAE and the text encoders that made the latents.
    """
    for kind, before in meta.get("weights", {}).items():
        if weights.get(kind, before) != before:
            raise ValueError(
                f"checkpoint {meta['step']} was made with data of {kind} {before} in stage "
                f"{meta['stage']!r}, and the prepared data is of {kind} {weights[kind]}; restore "
                f"the data, or start in a new run folder (--run)."
            )


def position_at(config: TrainConfig, made: int) -> Position | None:
    """Return the position of the update after `made` updates; None at the end of the schedule."""
    index, step = stage_at(config.stages, made)
    return Position(config.stages[index], step, made) if index < len(config.stages) else None


def _schedule(config: TrainConfig) -> list:
    """Return the values `OF_SCHEDULE` of a config, without the meshes of its stages."""
    stages = tuple(dataclasses.replace(stage, mesh=None) for stage in config.stages)
    return [getattr(dataclasses.replace(config, stages=stages), name) for name in OF_SCHEDULE]


def _check_order(step: int, saved: TrainConfig, config: TrainConfig, index: int) -> None:
    before, now = ([s.name for s in c.stages[: index + 1]] for c in (saved, config))
    if before != now:
        raise ValueError(
            f"checkpoint {step} went through stages {', '.join(before)}, and the config begins "
            f"with {', '.join(now)}; restore their order, or start in a new run folder."
        )


def _compare(step: int, what: str, before, now, free: tuple[str, ...]) -> list[str]:
    """Return the changes of `free` fields; raise ValueError for a change of any other field."""
    changed = []
    for field in dataclasses.fields(now):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if field.name not in free:
            _same(step, f"{field.name} of {what}", old, new)
        if old != new and field.name != "in_channels":
            changed.append(f"{field.name} of {what}: {old} -> {new}")
    return changed


def _differences(name: str, before, now) -> list[str]:
    if not dataclasses.is_dataclass(now):
        return [] if before == now else [f"{name}: {before} -> {now}"]
    return [
        f"{name}.{field.name}: {getattr(before, field.name)} -> {getattr(now, field.name)}"
        for field in dataclasses.fields(now)
        if getattr(before, field.name) != getattr(now, field.name)
    ]


def _same(step: int, what: str, before, now) -> None:
    if before != now:
        raise ValueError(
            f"checkpoint {step} was made with {what} = {before!r}, and the config has {now!r}; "
            f"restore it, or start in a new run folder (--run)."
        )
