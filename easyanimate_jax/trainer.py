"""`train(config)`: mesh, state, stages, logging, samples, checkpoints, preemption and resume.

The one place that knows every room. The schedule's position is one integer, the global step: the
stage, the batch, every random draw and the learning rate follow from it, so a run that was stopped
anywhere and started again makes the same updates.
"""

import dataclasses
import json
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from easyanimate_jax.config import TrainConfig, to_json
from easyanimate_jax.convert import load_mmdit, load_vae
from easyanimate_jax.data import media, records
from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.data.plan import Plan
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.pipelines import text_to_video
from easyanimate_jax.sharding import make_mesh
from easyanimate_jax.training.checkpoint import Checkpoints, remove_unfinished
from easyanimate_jax.training.metrics import MetricsWriter, Progress, clock, now
from easyanimate_jax.training.optimizer import make_optimizer
from easyanimate_jax.training.program import (
    abstract_state,
    batch_shardings,
    microbatch_rows,
    step_program,
)
from easyanimate_jax.training.stages import Stage, boundaries, stage_at
from easyanimate_jax.training.step import TrainState, init_state, widen_state

DONE, PREEMPTED = 0, 42  # exit codes


def train(config: TrainConfig) -> int:
    """Run the schedule to its end, or until SIGTERM; returns the process's exit code.

    Starts at the newest checkpoint of `config.run` if there is one. Raises ValueError, before any
    device work, for data, models or checkpoints that do not fit the config.
    """
    run = Path(config.run)
    mesh = make_mesh(config.mesh)
    loaders = {stage.name: make_loader(config, stage, mesh) for stage in config.stages}
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(to_json(config))
    remove_unfinished(run / "checkpoints")
    checkpoints = Checkpoints(
        run / "checkpoints", keep=config.keep, keep_steps=boundaries(config.stages)
    )
    stop = Preemption()
    with jax.set_mesh(mesh):
        schedule = Schedule(config, mesh, checkpoints, loaders)
        finished = schedule.run(stop)
    checkpoints.close()
    return DONE if finished else PREEMPTED


class Preemption:
    """Turns SIGTERM into a question the loop asks between steps."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self.asked = True


class Schedule:
    """The loop over stages and steps, and the state it carries."""

    def __init__(self, config: TrainConfig, mesh, checkpoints: Checkpoints, loaders: dict):
        self.config, self.mesh, self.checkpoints, self.loaders = config, mesh, checkpoints, loaders
        self.key = jax.random.key(config.seed)
        self.optimizer = make_optimizer(config.optimizer)
        self.step_programs = {}  # input channels -> the jitted train step
        self.step, self.state = self._start()
        self.writer = MetricsWriter(Path(config.run), self.step)
        self.progress = Progress()
        self.pending = None  # metrics of the step under way, fetched one step later
        self.sampler = Sampler(config)

    def run(self, stop: Preemption) -> bool:
        """Make every step that is left. False if `stop` was asked; the state is then saved."""
        begin, stages = now(), self.config.stages
        while self.step < boundaries(stages)[-1]:
            index, first = stage_at(stages, self.step)
            self._enter(stages[index])
            for batch_number, (bucket, batch) in enumerate(
                self._batches(stages[index], first), start=first
            ):
                self._update(stages[index], batch_number, bucket, batch)
                ended = batch_number + 1 == stages[index].steps
                if ended or stop.asked or self.step % self.config.save_every == 0:
                    self._save(stages[index])
                if ended or self.step % self.config.samples.every == 0:
                    self._flush()
                    self.sampler(self.state.ema, self.step)
                if stop.asked:
                    self._close(begin)
                    print(f"\nasked to stop: saved at step {self.step}", flush=True)
                    return False
                if ended:
                    break
        self._close(begin)
        return True

    def _start(self) -> tuple[int, TrainState]:
        latest = self.checkpoints.latest()
        if latest is None:
            return 0, self._first_state()
        meta = self.checkpoints.meta(latest)
        self._check_position(latest, meta)
        *_, like = self._abstract(meta["in_channels"])
        print(f"resuming at step {latest} (stage {meta['stage']!r})", flush=True)
        return latest, self.checkpoints.restore(latest, like)

    def _first_state(self) -> TrainState:
        """Fresh weights, or those of `config.init`, each device reading its own part of them."""
        in_channels = self.config.stages[0].in_channels
        make, placed, like = self._abstract(in_channels)
        if not self.config.init:
            return jax.jit(make, out_shardings=placed)(jax.random.fold_in(self.key, 1))
        print(f"starting from the weights of {self.config.init}", flush=True)
        model = load_mmdit(
            self.config.init, mesh=self.mesh, in_channels=in_channels, config=like.model.config
        )

        def around(model):
            return init_state(lambda _: model, self.optimizer, self.key)

        return jax.jit(around, out_shardings=placed, donate_argnums=0)(model)

    def _check_position(self, step: int, meta: dict) -> None:
        stage = next((s for s in self.config.stages if s.name == meta["stage"]), None)
        if stage is None or meta["seed"] != self.config.seed:
            raise ValueError(
                f"checkpoint {step} belongs to stage {meta['stage']!r} and seed {meta['seed']}, "
                f"and the config has no such run; restore the config, or start in a new run folder."
            )
        plan = self.loaders[stage.name].plan
        if meta["plan"] != plan.hash:
            raise ValueError(
                f"checkpoint {step} was made with plan {meta['plan']} of stage {stage.name!r}, and "
                f"the prepared data now gives {plan.hash}. Restore the data, or start a new run."
            )

    def _abstract(self, in_channels: int):
        """(function of a key that makes the state, its shardings, the state as shapes)."""
        model = dataclasses.replace(self.config.model, in_channels=in_channels)
        return abstract_state(model, self.optimizer, self.mesh)

    def _enter(self, stage: Stage) -> None:
        have = self.state.model.config.in_channels
        _, placed, _ = self._abstract(stage.in_channels)
        if have != stage.in_channels:
            widen = partial(widen_state, in_channels=stage.in_channels)
            self.state = jax.jit(widen, out_shardings=placed)(self.state)
            print(f"stage {stage.name!r}: input channels {have} -> {stage.in_channels}", flush=True)
        if stage.in_channels not in self.step_programs:
            self.step_programs[stage.in_channels] = step_program(
                self.optimizer, self.config.process, self.config.ema_decay, placed
            )

    def _batches(self, stage: Stage, first: int):
        """The stage's batches from its own step `first` on, as global arrays."""
        batches = self.loaders[stage.name].batches(first)
        while True:
            began = now()
            bucket, batch = next(batches)
            self.waited = now() - began
            yield bucket, place(batch, self.mesh)

    def _update(self, stage: Stage, stage_step: int, bucket: int, batch: Batch) -> None:
        began = now()
        rate = stage.learning_rate_at(stage_step)
        program = self.step_programs[stage.in_channels]
        self.state, metrics = program(self.state, batch, self.key, jnp.float32(rate))
        self._flush()
        tokens = batch.weight.size * bucket
        self.pending = (
            metrics,
            {
                "step": self.step,
                "stage": stage.name,
                "task": stage.task,
                "bucket": bucket,
                "learning_rate": rate,
                "real_tokens": int(np.sum(np.asarray(batch.lengths) * np.asarray(batch.weight))),
                "tokens": tokens,
            },
        )
        self.step += 1
        self.progress.add(self.waited + now() - began, tokens, self.waited)
        if self.step % self.config.log_every == 0 or stage_step == 0:
            self._flush()
            self._show(stage, stage_step)

    def _flush(self) -> None:
        if self.pending is None:
            return
        metrics, row = self.pending
        self.row = row | {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.row["seconds"] = round(self.progress.window[-1][0], 4) if self.progress.window else 0.0
        self.writer.write(self.row)
        self.pending = None

    def _show(self, stage: Stage, stage_step: int) -> None:
        later = self.config.stages[self.config.stages.index(stage) + 1 :]
        stage_left = self._tokens(stage) * (stage.steps - stage_step - 1)
        self.progress.show(
            f"{stage.name} {stage_step + 1}/{stage.steps}  step {self.step}"
            f"/{boundaries(self.config.stages)[-1]}  loss {self.row['loss']:.4f}"
            f"  grad {self.row['grad_norm']:.3f}  bucket {self.row['bucket']}",
            stage_left,
            stage_left + sum(self._tokens(s) * s.steps for s in later),
        )

    def _tokens(self, stage: Stage) -> int:
        return stage.batch_size * self.config.set(stage.data).budget.lengths[-1]

    def _save(self, stage: Stage) -> None:
        meta = {
            "step": self.step,
            "stage": stage.name,
            "in_channels": stage.in_channels,
            "plan": self.loaders[stage.name].plan.hash,
            "seed": self.config.seed,
            "config": json.loads(to_json(self.config)),
        }
        self.checkpoints.save(self.step, self.state, meta)

    def _close(self, begin: float) -> None:
        self._flush()
        self.writer.close()
        compiled = sum(program._cache_size() for program in self.step_programs.values())
        summary = {
            "steps": self.step,
            "seconds": now() - begin,
            "compiled_train_programs": compiled,
        }
        (Path(self.config.run) / "summary.json").write_text(json.dumps(summary, indent=1))
        print(
            f"\n{self.step} steps in {clock(now() - begin)}, {compiled} train programs", flush=True
        )


class Sampler:
    """Writes what the averaged weights make of the config's prompts, always from the same noise."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.run) / "samples"
        if config.samples.prompts:
            self.vae = load_vae(config.vae)
            self.texts = records.read_texts(Path(config.prepared) / "prompts.safetensors")
            self.empty = records.read_texts(Path(config.prepared) / "empty.safetensors")

    def __call__(self, model: MMDiT, step: int) -> None:
        samples = self.config.samples
        if not samples.prompts:
            return
        videos = text_to_video(
            model,
            self.vae,
            self.config.process,
            self.texts,
            self.empty,
            frames=samples.frames,
            height=samples.height,
            width=samples.width,
            steps=samples.steps,
            guidance=samples.guidance,
            seeds=[samples.seed] * len(samples.prompts),
        )
        self.folder.mkdir(exist_ok=True)
        np.savez_compressed(self.folder / f"{step:07d}.npz", videos=videos)
        media.write_png(self.folder / f"{step:07d}.png", media.contact_sheet(videos))


def make_loader(config: TrainConfig, stage: Stage, mesh) -> Loader:
    """The loader of one stage over its prepared latents."""
    prepared = records.Records(Path(config.prepared) / stage.data)
    plan = Plan(
        prepared.index,
        lengths=config.set(stage.data).budget.lengths,
        batch_size=stage.batch_size,
        seed=config.seed,
        name=stage.name,
    )
    return Loader(
        prepared,
        plan,
        task=stage.task,
        microbatch=microbatch_rows(stage, mesh),
        text_drop=config.text_drop,
    )


def place(batch: Batch, mesh) -> Batch:
    """A batch of host arrays as global arrays: rows over data and fsdp, tokens over context."""

    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]),
        batch,
        batch_shardings(mesh, batch),
    )
