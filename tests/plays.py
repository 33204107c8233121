"""Pairs of configs, at the stop of a run and at its restart, played in the real training.

    python tests/plays.py FOLDER        some pairs, and what else is played here
    python tests/plays.py FOLDER all    all pairs

The transformer has one block, and a stage a few steps. A program of its own, because the checks of
types would take most of the time.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from latents import random_latents

from easyanimate_jax.commands.train import ending, run_config
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.mmdit import MMDiTConfig
from easyanimate_jax.runs import loop, programs, states
from easyanimate_jax.runs.batches import make_loaders, place
from easyanimate_jax.runs.config import TrainConfig, to_json
from easyanimate_jax.runs.position import check_resume, position_at
from easyanimate_jax.sharding import make_mesh
from easyanimate_jax.training.checkpoint import describe, named_leaves
from easyanimate_jax.training.optimizer import OptimizerConfig
from easyanimate_jax.training.program import StepConfig, microbatch_rows
from easyanimate_jax.training.safety.faults import Faults
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import input_channels, widen_state
from easyanimate_jax.weights.run_folder import complete_steps, read_meta

PAIRS = 200

# Two sets of eight tokens with conditions, and one without: all stages of a task share programs.
SETS = {name: (1, 2, 4) for name in ("image", "medium", "large")}
TINY = MMDiTConfig(
    depth=1,
    mmdit_depth=0,
    heads=2,
    head_width=16,
    text_widths=(8, 12),
    text_norm=False,
    round_time=False,
    time_width=16,
    dtype="float32",
)
STAGE = partial(Stage, batch_size=2, steps=2, learning_rate=1e-2, warmup=0)
FIRST = TrainConfig(
    source="",
    prepared="latents",
    vae="",
    text="",
    run="",
    model=TINY,
    process=Flow(stratified=True, train_shift=6.0),
    sets=tuple(
        LatentSet(name, Budget(8, (8,), (64,), frames=1), condition_draws=2 * (name != "image"))
        for name in SETS
    ),
    stages=(STAGE("one", "image"), STAGE("two", "medium"), STAGE("three", "large", task="i2v")),
    optimizer=OptimizerConfig(max_grad_norm=1.0, eps=1e-8),
    ema_decay=0.5,
    save_every=1,
    save_minutes=0.0,
    keep=9,
    hang_seconds=0.0,
    log_every=0,
)


def with_stage(config, index, **changes):
    stages = list(config.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(config, stages=tuple(stages))


def change(rng: random.Random, config: TrainConfig) -> TrainConfig:
    """Change one thing of a config. Raises ValueError where the config itself is impossible."""
    index = rng.randrange(len(config.stages))
    stage, moved = config.stages[index], rng.sample(config.stages, len(config.stages))
    of_stage = {
        "steps": rng.randint(1, 4),
        "batch_size": rng.randint(1, 2),
        "microbatch": rng.choice([None, 1]),
        "learning_rate": rng.choice([1e-2, 3e-2]),
        "end_learning_rate": rng.choice([None, 1e-3]),
        "warmup": rng.choice([0, 3]),
        "task": rng.choice(["t2v", "i2v"]),
        "data": rng.choice(list(SETS)),
        "name": rng.choice([stage.name, "other"]),
        "weights": rng.choice([(), (("image", 2.0),)]),
    }
    which = rng.randrange(len(config.sets))
    sets = list(config.sets)
    sets[which] = replace(sets[which], min_side=rng.choice([0, 16]))
    of_run = {
        "seed": rng.choice([42, 7]),
        "text_drop": rng.choice([0.1, 0.5]),
        "ema_decay": rng.choice([0.5, 0.9]),
        "optimizer": replace(config.optimizer, b2=0.9, matrices=rng.choice(["adam", "muon"])),
        "process": rng.choice([replace(config.process, train_shift=1.0), DDPM()]),
        "model": replace(TINY, heads=rng.choice([1, 2])),
        "sets": tuple(sets),
        "keep": rng.choice([1, 9]),
        "save_every": rng.choice([0, 1, 2]),
        "log_every": rng.choice([0, 1]),
    }
    kind = rng.choice(["stage", "stage", "stage", "run", "run", "fewer", "more", "order"])
    if kind == "stage":
        name = rng.choice(list(of_stage))
        return with_stage(config, index, **{name: of_stage[name]})
    if kind == "run":
        name = rng.choice(list(of_run))
        return replace(config, **{name: of_run[name]})
    if kind == "fewer":
        return replace(config, stages=config.stages[: 1 + index])
    if kind == "more":
        place = rng.randint(0, len(config.stages))
        new = replace(stage, name=f"more {len(config.stages)}")
        return replace(config, stages=(*config.stages[:place], new, *config.stages[place:]))
    return replace(config, stages=tuple(moved))


def several(rng: random.Random, config: TrainConfig, count: int) -> TrainConfig:
    for _ in range(count):
        with contextlib.suppress(ValueError):  # impossible: refused where it is written
            config = change(rng, config)
    return config


@cache
def at_the_stop(group: int) -> tuple[TrainConfig, int]:
    """A config of short stages, and the updates after which it stops, perhaps its last."""
    rng = random.Random(group)
    config = several(rng, FIRST, rng.randint(0, 3))
    total = sum(stage.steps for stage in config.stages)
    return config, rng.randint(1, total)


@cache
def pair(number: int) -> tuple[TrainConfig, int, TrainConfig]:
    """The config at the stop, the updates made there, and the config at the restart."""
    before, made = at_the_stop(number // 10)
    rng = random.Random(1000 + number)
    return before, made, several(rng, before, rng.randint(0, 3))


FREE = {"steps", "microbatch", "learning_rate", "end_learning_rate", "warmup"}
FREE |= {"control_drop", "reference_drop"}


def refusals(before: TrainConfig, made: int, after: TrainConfig) -> set[str]:
    """Words of which a refusal has one, by the table of docs/reliability.md; none if it fits."""
    walked = [(i, n) for i, s in enumerate(before.stages) for n in range(s.steps)]
    index, own = walked[made - 1]
    began = before.stages[index]
    names = [[stage.name for stage in config.stages[: index + 1]] for config in (before, after)]
    if before.seed != after.seed or names[0] != names[1]:
        return {"seed", "went through stages"}
    found = {
        field.name
        for old, new in zip(before.stages[: index + 1], after.stages, strict=False)
        for field in dataclasses.fields(Stage)
        if getattr(old, field.name) != getattr(new, field.name)
        and field.name not in (FREE if old is began else {"microbatch"})
    }
    if after.stages[index].steps < own + 1:
        found.add("steps")
    if not found and before.set(began.data) != after.set(began.data):
        found.add("min_side")
    found |= {"heads"} if before.model.heads != after.model.heads else set()
    if before.optimizer.matrices != after.optimizer.matrices:
        found.add("matrices")
    return found | ({"process"} if type(before.process) is not type(after.process) else set())


@dataclasses.dataclass(frozen=True)
class Stop(Faults):
    """Asks for a stop by a real signal, which is honoured after the update `made`."""

    made: int = 0

    def before_step(self, step: int) -> None:
        if step + 1 == self.made:
            os.kill(os.getpid(), signal.SIGTERM)


class Plays:
    """Runs in one folder; equal steps are compiled once."""

    def __init__(self, folder: Path):
        random_latents(folder / "latents", SETS, (8, 12))
        self.folder, self.mesh = folder, make_mesh(FIRST.mesh)
        self.loaders = cache(lambda c: make_loaders(c, {s.name: self.mesh for s in c.stages}))
        self.first = cache(self._first)

    def place(self, config: TrainConfig, run: str) -> TrainConfig:
        return replace(config, prepared=str(self.folder / "latents"), run=str(self.folder / run))

    def stopped(self, group: int) -> Path:
        """The folder of a run that was stopped; it is trained once."""
        config, made = at_the_stop(group)
        config = self.place(config, f"stopped{group}")
        if not Path(config.run).exists():
            ends = made == sum(stage.steps for stage in config.stages)
            assert loop.train(config, Stop(made=0 if ends else made)) == (0 if ends else 42)
        return Path(config.run)

    def uninterrupted(self, before: TrainConfig, made: int, after: TrainConfig):
        """The state that one process makes under the rule: `made` updates by one config, then more.

        Written without positions, checkpoints and the loop of the training.
        """
        old = [(before, s, n) for s in before.stages for n in range(s.steps)][:made]
        stage, own = old[-1][1].name, old[-1][2]
        new = [(after, s, n) for s in after.stages for n in range(s.steps)]
        at = [(s.name, n) for _, s, n in new].index((stage, own))
        settings = StepConfig(before.model, before.optimizer, Flow(), ema_decay=0.5)
        state = jax.tree.map(jnp.array, self.first(settings, before.seed))
        for config, stage, step in [*old, *new[at + 1 :]]:
            if input_channels(state) != stage.in_channels:
                settings = config.step.with_channels(stage.in_channels)
                placed = states.abstract_state(settings, self.mesh)[1]
                widen = jax.jit(widen_state, static_argnums=1, out_shardings=placed)
                state = widen(state, stage.in_channels)
            loader = self.loaders(self.place(config, "x"))[stage.name]
            length, batch = loader.batch(step)
            rate = jnp.float32(stage.learning_rate_at(step))
            texts = tuple(len(text) for text in loader.empty)
            _, program = programs.compile_stage(
                config.step, stage, self.mesh, tokens=length, text_lengths=texts, memory=2**40
            )
            with jax.set_mesh(self.mesh):
                key = jax.random.key(config.seed)
                state, _ = program(state, place(batch, self.mesh), key, rate)
        return {
            "state": describe(named_leaves(state._replace(ema=None))),
            "ema": describe(named_leaves(state.ema)),
        }

    def _first(self, settings, seed):
        make, placed, _ = states.abstract_state(settings.with_channels(16), self.mesh)
        with jax.set_mesh(self.mesh):
            key = jax.random.fold_in(jax.random.key(seed), 1)
            return jax.jit(make, out_shardings=placed)(key)

    def judge(self, number: int) -> bool:
        """Assert that `check_resume` follows the rule for a pair; return whether it refuses."""
        before, made, after = pair(number)
        old, new = (loop.plan_hashes(self.loaders(self.place(c, "x"))) for c in (before, after))
        stage = position_at(before, made - 1).stage
        meta = {"step": made, "stage": stage.name, "seed": before.seed, "plan": old[stage.name]}
        words, message = refusals(before, made, after), ""
        try:
            check_resume(meta | {"config": json.loads(to_json(before))}, after, new)
        except ValueError as error:
            message = str(error)
        assert bool(message) == bool(words), (number, words, message)
        assert not words or any(word in message for word in words), (number, words, message)
        return bool(words)

    def restart(self, number: int) -> None:
        """Play a pair, and assert that it is refused whole or ends in the bits of the rule."""
        before, made, after = pair(number)
        run = self.folder / f"run{number}"
        shutil.copytree(self.stopped(number // 10), run)
        after, words = self.place(after, run.name), refusals(before, made, after)
        there, files = complete_steps(run / "checkpoints"), content(run)
        if words:
            code, error = command(after)
            assert code == 2, (number, words, error)
            assert error.startswith("error: ") and error.count("\n") == 1, error
            assert any(word in error for word in words), (number, words, error)
            assert content(run) == files, number
            shutil.rmtree(run)
            return
        total = sum(stage.steps for stage in after.stages)
        if number % 2 and made + 1 < total:  # another stop on the way
            assert loop.train(after, Stop(made=made + 1)) == 42
        code, error = command(after)
        assert code == 0, (number, error)
        step, meta = read_meta(run)
        assert step == total, number
        assert meta["arrays"] == self.uninterrupted(before, made, after), number
        gone = set(there) - set(complete_steps(run / "checkpoints"))
        same = is_same_schedule(before, after)
        assert not gone or (same and after.keep == 1), (number, gone)
        shutil.rmtree(run)


def command(config: TrainConfig) -> tuple[int, str]:
    """The exit code of `train`, and what it wrote to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as written:
        code = ending(partial(run_config, config))
    return code, written.getvalue()


def is_same_schedule(*configs: TrainConfig) -> bool:
    a, b = (
        replace(config, run="", prepared="", keep=1, save_every=1, log_every=1)
        for config in configs
    )
    return a == b


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its time and its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def share_programs() -> None:
    """Make the training trace and compile equal programs once."""
    compiled, compile_stage = {}, programs.compile_stage

    def once(config, stage, mesh, **options):
        rows = stage.in_channels, stage.batch_size, microbatch_rows(stage, mesh), stage.save
        key = config, rows, options["tokens"], options["text_lengths"]
        if key not in compiled:
            compiled[key] = compile_stage(config, stage, mesh, **options)
        return compiled[key]

    programs.compile_stage = once
    states.abstract_state = cache(states.abstract_state)


def damaged(plays: Plays) -> None:
    """A refusal writes nothing, also where the newest checkpoint is damaged."""
    group = next(g for g in range(PAIRS // 10) if at_the_stop(g)[0].save_every == 1)
    config, made = at_the_stop(group)
    run = plays.folder / "damaged"
    shutil.copytree(plays.stopped(group), run)
    meta = run / "checkpoints" / str(made) / "meta" / "metadata"
    meta.write_bytes(meta.read_bytes()[:-9])
    files = content(run)
    code, error = command(plays.place(replace(config, seed=7), run.name))
    assert code == 2 and f"checkpoint {made - 1} belongs to" in error, (code, error)
    assert content(run) == files


def by_time(plays: Plays) -> None:
    """Saves by time change no bit, and a run resumes from any of them."""
    config = plays.place(replace(FIRST, save_every=0, save_minutes=1e-9), "timed")
    folder, expected = Path(config.run) / "checkpoints", plays.uninterrupted(FIRST, 6, FIRST)
    for kept in (0, 3):
        for step in range(kept + 1, 7):
            shutil.rmtree(folder / str(step), ignore_errors=True)
        assert loop.train(config) == 0
        assert complete_steps(folder) == [1, 2, 3, 4, 5, 6]
        assert read_meta(config.run)[1]["arrays"] == expected


def cheap(number: int) -> bool:
    """Whether a pair needs no program that others do not need."""
    configs = pair(number)[::2]
    shapes = {(s.batch_size, s.microbatch) for c in configs for s in c.stages}
    return {c.step for c in configs} == {FIRST.step} and shapes == {(2, None)}


if __name__ == "__main__":
    share_programs()
    all_plays, whole = Plays(Path(sys.argv[1])), sys.argv[2:] == ["all"]
    refused = {number for number in range(PAIRS) if all_plays.judge(number)}
    assert PAIRS / 4 < len(refused) < PAIRS * 3 / 4, len(refused)
    few = [n for n in range(30) if cheap(n)]  # of three runs that were stopped
    some = [n for n in few if n not in refused][:5] + [n for n in few if n in refused]
    for one in range(PAIRS) if whole else some:
        all_plays.restart(one)
    damaged(all_plays)
    by_time(all_plays)
    print(f"{PAIRS if whole else len(some)} pairs, {len(refused)} of {PAIRS} refused")
