"""Checks that each stage of a config fits its set, its teacher, its reward and the others."""

import itertools

from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.diffusion.samplers import walk
from easyanimate_jax.diffusion.tasks import TASKS
from easyanimate_jax.evaluation.rewards import open_reward
from easyanimate_jax.training.post.objectives import (
    NegativeAwareFinetuning,
    RewardBackpropagation,
    Rewarded,
)
from easyanimate_jax.training.program import reads_pairs
from easyanimate_jax.training.stages import Stage

MOST_DECAY = 0.99  # of the average that samples the videos of `NegativeAwareFinetuning`


def check_stages(config) -> None:
    """Raise ValueError for a stage that does not fit its set, teacher, reward or neighbours."""
    names = [s.name for s in config.sets]
    for stage in config.stages:
        _check_teacher(config, stage)
        if stage.data not in names:
            raise ValueError(
                f"stage {stage.name!r} reads latent set {stage.data!r}, and the config has "
                f"{names}. Add the set, or correct the stage's `data`."
            )
        _check_data(stage, config.set(stage.data))
        try:
            config.step.of_stage(stage)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from error
        _check_reward(config, stage)
    for before, stage in itertools.pairwise(config.stages):
        if stage.in_channels < before.in_channels:
            raise ValueError(
                f"stage {stage.name!r} trains {stage.task} with {stage.in_channels} input "
                f"channels after {before.in_channels} of stage {before.name!r}: channels only "
                f"grow; put the stage before those of more channels, or give it another task"
            )
    for group in (names, [s.name for s in config.stages]):
        if len(set(group)) < len(group):
            raise ValueError(f"names must differ: {group}")


def rewards_of(config) -> set[str]:
    """Return the names of the rewards whose gradient the stages of a run use."""
    objectives = (stage.objective for stage in config.stages)
    return {
        name for one in objectives if isinstance(one, RewardBackpropagation) for name in one.rewards
    }


def _check_reward(config, stage: Stage) -> None:
    """Raise ValueError for a stage that cannot be trained by its reward, or whose reward is none.

    Its module is imported.
    """
    objective = stage.objective
    if not isinstance(objective, Rewarded):
        return
    if TASKS[stage.task].is_control:
        raise ValueError(
            f"stage {stage.name!r} trains {stage.task} with a reward: it samples from captions "
            f"alone; use the task t2v or i2v"
        )
    try:
        for name in objective.rewards:
            open_reward(name)
        if isinstance(objective, RewardBackpropagation):
            walk(config.process, steps=objective.steps, times=objective.times)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}, reward: {error}") from error
    if isinstance(objective, NegativeAwareFinetuning) and config.ema_decay > MOST_DECAY:
        raise ValueError(
            f"stage {stage.name!r} has the objective NegativeAwareFinetuning, whose videos are "
            f"sampled by the averaged weights, and TrainConfig.ema_decay={config.ema_decay} hardly "
            f"moves them; use 0.5 to 0.9, at most {MOST_DECAY}"
        )


def _check_teacher(config, stage: Stage) -> None:
    """Raise ValueError for a stage whose objective has no teacher."""
    if stage.objective is not None:
        what = f"stage {stage.name!r} has the objective {type(stage.objective).__name__}"
        if not config.init:
            raise ValueError(
                f"{what}, whose teacher is `init`, and init is empty; give the path of a "
                f"trained model"
            )
        if config.train:
            raise ValueError(
                f"{what}, and `train` trains a part of the teacher's own weights; use `lora`, "
                f"or train all weights"
            )


def _check_data(stage: Stage, latents: LatentSet) -> None:
    """Raise ValueError if a latent set does not hold what a stage reads."""
    if stage.task == "i2v" and not (latents.condition_draws or latents.pixels):
        raise ValueError(
            f"stage {stage.name!r} trains {stage.task}, and latent set {stage.data!r} "
            f"holds no conditioning; give the set `condition_draws` of 1 or more."
        )
    if TASKS[stage.task].is_control and not latents.control:
        raise ValueError(
            f"stage {stage.name!r} trains {stage.task}, and latent set {stage.data!r} "
            f"holds no control; give the set one: 'file', 'camera' or an operator's name."
        )
    if reads_pairs(stage) and not latents.pairs:
        raise ValueError(
            f"stage {stage.name!r} has the objective DirectPreference, and latent set "
            f"{latents.name!r} holds single clips; give the set `pairs=True`, and its table a "
            f"column worse_file_path"
        )
    if latents.pairs and not reads_pairs(stage):
        raise ValueError(
            f"stage {stage.name!r} trains on single clips, and latent set {latents.name!r} holds "
            f"pairs; give the stage the objective DirectPreference, or add a set without `pairs`"
        )
