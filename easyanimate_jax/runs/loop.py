"""`train(config)`: mesh, state, stages, logging, samples, checkpoints, preemption and resume.

The one place that knows every room. The schedule's position is one integer, the global step: the
stage, the batch, every random draw and the learning rate follow from it, so a run that was stopped
anywhere and started again makes the same updates.
"""

import dataclasses
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from easyanimate_jax import processes
from easyanimate_jax.data import media, records
from easyanimate_jax.data.loader import Batch
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import LatentDiffusion, Request, text_to_video
from easyanimate_jax.memory import device_memory
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.runs.batches import make_loaders, place
from easyanimate_jax.runs.config import TrainConfig, to_json
from easyanimate_jax.runs.visits import VisitLoader
from easyanimate_jax.sharding import make_mesh
from easyanimate_jax.training.checkpoint import (
    Checkpoints,
    NotFiniteError,
    StorageError,
    named_leaves,
)
from easyanimate_jax.training.compile import compile_stage
from easyanimate_jax.training.fits import memory_line, refusal
from easyanimate_jax.training.metrics import MetricsWriter, Progress, clock, now
from easyanimate_jax.training.optimizer import make_optimizer
from easyanimate_jax.training.program import abstract_state, microbatch_rows
from easyanimate_jax.training.safety.cloud_goodput import open_sink
from easyanimate_jax.training.safety.divergence import (
    SKIP_BATCHES,
    Detector,
    DivergedError,
    Returns,
)
from easyanimate_jax.training.safety.exits import DIVERGED, DONE, PREEMPTED, STORAGE
from easyanimate_jax.training.safety.faults import stop_if_asked, value_asked
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.safety.preemption import Preemption
from easyanimate_jax.training.stages import Stage, boundaries, stage_at
from easyanimate_jax.training.step import TrainState, init_state, widen_state
from easyanimate_jax.weights.fingerprint import fingerprint
from easyanimate_jax.weights.folder import load_mmdit, load_vae


def train(config: TrainConfig) -> int:
    """Run the schedule to its end, or until SIGTERM; returns the process's exit code.

    Starts at the newest checkpoint of `config.run` if there is one. Raises ValueError, before any
    device work, for data, models or checkpoints that do not fit the config, and, before a stage's
    first step, for a step that does not fit the devices' memory.
    """
    run = Path(config.run)
    sink = open_sink(config.goodput_job, process=jax.process_index())
    mesh = make_mesh(config.mesh)
    loaders = make_loaders(config, mesh)
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    if jax.process_index() == 0:
        (run / "config.json").write_text(to_json(config))
    monitor = Monitor(run, process=jax.process_index(), hang_seconds=config.hang_seconds, sink=sink)
    stop = Preemption()
    try:
        checkpoints = open_checkpoints(config)
        with jax.set_mesh(mesh):
            schedule = Schedule(config, mesh, checkpoints, loaders, monitor)
            finished = schedule.run(stop)
        monitor.enter("save")
        checkpoints.close(schedule.step)
    except DivergedError as error:
        print(f"\ndiverged: {error}", file=sys.stderr, flush=True)
        return DIVERGED
    except StorageError as error:
        print(f"\nstorage: {error}", file=sys.stderr, flush=True)
        return STORAGE
    finally:
        monitor.close()
    return DONE if finished else PREEMPTED


def replay(config: TrainConfig, step: int) -> int:
    """Make the step after checkpoint `step` twice, each time from the files, and compare the bits.

    They are compared with each other and with the loss that the run wrote then, and forgotten. A
    difference, on the same devices, is a silent error of some hardware. Returns 0, or 1 if there is
    one. The run must not be under way. Raises ValueError if there is no such checkpoint.
    """
    run = Path(config.run)
    mesh = make_mesh(config.mesh)
    loaders = make_loaders(config, mesh)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = next((row for row in lines if row["step"] == step), None)
    if logged is None:
        raise ValueError(f"{run / 'metrics.jsonl'} has no step {step}; replay one that was made")
    monitor = Monitor(run, process=jax.process_index(), hang_seconds=config.hang_seconds)
    checkpoints = open_checkpoints(config)
    with jax.set_mesh(mesh):
        schedule = Schedule(config, mesh, checkpoints, loaders, monitor, at=step)
        first = schedule.replay()
        schedule.state = schedule.restore(at=step)[1]
        second = schedule.replay()
    checkpoints.close()
    monitor.close()
    names = [name for name in first if first[name] != second[name]]
    names += [f"{name}, as logged" for name in ("loss", "grad_norm") if first[name] != logged[name]]
    print(f"step {step} made twice: {', '.join(names) or 'nothing'} differs", flush=True)
    return 1 if names else 0


def open_checkpoints(config: TrainConfig) -> Checkpoints:
    return Checkpoints(
        Path(config.run) / "checkpoints",
        keep=config.keep,
        keep_steps=boundaries(config.stages),
        keep_every=config.keep_every,
    )


class Schedule:
    """The loop over stages and steps, and the state it carries."""

    def __init__(
        self,
        config: TrainConfig,
        mesh,
        checkpoints: Checkpoints,
        loaders: dict,
        monitor: Monitor,
        at: int | None = None,
    ):
        """Starts at the newest checkpoint, or at the named one, or at the first step."""
        self.config, self.mesh, self.checkpoints, self.loaders = config, mesh, checkpoints, loaders
        self.monitor, self.run_folder = monitor, Path(config.run)
        self.encoders = {x.encoder for x in loaders.values() if isinstance(x, VisitLoader)}
        for encoder in self.encoders:
            encoder.announce = self._encode_program
        self.key = jax.random.key(config.seed)
        self.optimizer = make_optimizer(config.optimizer)
        self.programs = {}  # (input channels, batch, microbatch, token length) -> compiled step
        self.ran = set()  # (input channels, token length) of the programs that ran
        self.returns = Returns(self.run_folder)
        self.main = jax.process_index() == 0
        self.sampler = Sampler(config)
        self.progress = Progress()
        self.step, self.state = self.restore(at=at) or (0, self._first_state())
        self.diverged = None  # why the run has to go back
        self.pending = None  # metrics of the step under way, fetched one step later

    def run(self, stop: Preemption) -> bool:
        """Make every step that is left. False if `stop` was asked; the state is then saved."""
        begin, stages = now(), self.config.stages
        self._open_metrics()
        while self.step < boundaries(stages)[-1]:
            index, first = stage_at(stages, self.step)
            self._enter(stages[index])
            for stage_step, (bucket, batch) in enumerate(
                self._batches(stages[index], first), start=first
            ):
                self._update(stages[index], stage_step, bucket, batch)
                stopping = stop.asked()
                ended = stage_step + 1 == stages[index].steps
                if ended or stopping or self.step % self.config.save_every == 0:
                    self._save(stages[index])
                if self.diverged:
                    self._go_back(stages[index])
                    break
                if ended or self.step % self.config.samples.every == 0:
                    self._flush()
                    self.monitor.enter("sample")
                    self.sampler(self.state.ema, self.step)
                if stopping:
                    self._close(begin)
                    self._say(f"asked to stop: saved at step {self.step}")
                    return False
                if ended:
                    break
        self._close(begin)
        return True

    def replay(self) -> dict:
        """Loss, gradient norm and all fingerprints after the next step, which ends the state."""
        index, stage_step = stage_at(self.config.stages, self.step)
        stage = self.config.stages[index]
        self._enter(stage)
        length, batch = next(self._batches(stage, stage_step))
        rate = jnp.float32(stage.learning_rate_at(stage_step))
        state, metrics = self._program(stage, length)(self.state, batch, self.key, rate)
        prints = {name: int(fingerprint(x)) for name, x in named_leaves(state).items()}
        return prints | {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    def restore(
        self, *, before: int | None = None, at: int | None = None
    ) -> tuple[int, TrainState] | None:
        """The newest good checkpoint, earlier than `before` or the one `at`, if that is given."""
        self.monitor.enter("restore")
        if at is not None:
            before = at + 1

        def like(meta: dict) -> TrainState:
            self._check_position(meta)
            self._check_memory(meta["step"])
            return self._abstract(meta["in_channels"])[2]

        found = self.checkpoints.restore(like, before=before)
        if at is not None and (found is None or found[0] != at):
            raise ValueError(f"{self.run_folder} has no good checkpoint {at} to replay from")
        if found is None:
            return None
        step, state, meta = found
        self._say(f"resuming at step {step} (stage {meta['stage']!r})")
        return step, state

    def _go_back(self, stage: Stage) -> None:
        """Return to a checkpoint from before the trouble, and leave out the batches around it."""
        reason, first_bad, last_bad = self.diverged, self.detector.first_bad, self.row["step"]
        if self.main:
            self.writer.close()
        self.checkpoints.finish()
        stages, offset = self.config.stages, self.returns.offset(stage.name)
        start = boundaries(stages)[stages.index(stage)] - stage.steps
        positions = range(max(first_bad, start) - start + offset, last_bad - start + offset + 1)
        plan = self.loaders[stage.name].plan
        event = {
            "step": last_bad,
            "reason": reason,
            "stage": stage.name,
            "batches": {p: plan(p)[1].tolist() for p in positions},
            "weights": {
                name: f"{int(fingerprint(x)):08x}"
                for name, x in named_leaves(self.state.model).items()
            },
        }
        # A checkpoint made at step k holds the updates before k.
        self.state = None
        step, state = self.restore(before=first_bad + 1) or (0, self._first_state())
        # Whatever the distance, the bad batches are not met again.
        skip = max(SKIP_BATCHES, last_bad + 1 - max(step, start))
        self.returns.add(event | {"returned_to": step, "offset": offset + skip}, self.main)
        self.checkpoints.drop_after(step)
        self._say(
            f"{reason} at step {last_bad}: back to step {step}, without {skip} batches of stage "
            f"{stage.name!r}"
        )
        self.step, self.state, self.pending, self.diverged = step, state, None, None
        self._open_metrics()

    def _open_metrics(self) -> None:
        if self.main:
            self.writer = MetricsWriter(self.run_folder, self.step)

    def _encode_program(self, text: str) -> None:
        """A clip of a new shape: no wait for data."""
        self.monitor.enter("compile")
        self._say(text)

    def _say(self, text: str) -> None:
        if self.main:
            print(f"\n{text}", flush=True)

    def _first_state(self) -> TrainState:
        """Fresh weights, or those of `config.init`, each device reading its own part of them."""
        self._check_memory(0)
        in_channels = self.config.stages[0].in_channels
        make, placed, like = self._abstract(in_channels)
        self.monitor.enter("start")
        if not self.config.init:
            return jax.jit(make, out_shardings=placed)(jax.random.fold_in(self.key, 1))
        self._say(f"starting from the weights of {self.config.init}")
        model = load_mmdit(
            self.config.init,
            mesh=self.mesh,
            in_channels=in_channels,
            config=like.model.config,
            step=self.config.init_step,
        )

        def around(model):
            return init_state(lambda _: model, self.optimizer, self.key)

        return jax.jit(around, out_shardings=placed, donate_argnums=0)(model)

    def _check_position(self, meta: dict) -> None:
        """Raises ValueError for a checkpoint of another seed, schedule or data."""
        step = meta["step"]
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
        self.detector = Detector()  # losses of another stage are no measure
        have = self.state.model.config.in_channels
        _, placed, _ = self._abstract(stage.in_channels)
        if have != stage.in_channels:
            widen = partial(widen_state, in_channels=stage.in_channels)
            self.state = jax.jit(widen, out_shardings=placed)(self.state)
            self._say(f"stage {stage.name!r}: input channels {have} -> {stage.in_channels}")
        self._check_memory(self.step)

    def _check_memory(self, step: int) -> None:
        """Compile the stage of a step at its longest bucket; ValueError if a device is too small.

        Before arrays are made, so that a run that cannot be starts nothing.
        """
        index, _ = stage_at(self.config.stages, step)
        if index < len(self.config.stages):  # else the schedule has ended
            stage = self.config.stages[index]
            self._program(stage, max(self.loaders[stage.name].plan.lengths))

    def _program(self, stage: Stage, length: int) -> jax.stages.Compiled:
        """The stage's compiled train step at a token length."""
        rows = microbatch_rows(stage, self.mesh)
        key = stage.in_channels, stage.batch_size, rows, length
        if key not in self.programs:
            self.monitor.enter("compile")
            report, program = compile_stage(
                self.config.step,
                stage,
                self.mesh,
                tokens=length,
                text_lengths=tuple(len(text) for text in self.loaders[stage.name].empty),
                memory=device_memory(),
            )
            if not report.fits:
                raise ValueError(refusal(report))
            self._say(memory_line(report))
            self.programs[key] = program
            processes.wait(f"program {len(self.programs)}")
        return self.programs[key]

    def _batches(self, stage: Stage, first: int):
        """The stage's batches from its own step `first` on, as global arrays."""
        first += self.returns.offset(stage.name)
        batches = self.loaders[stage.name].batches(first)
        for position in itertools.count(first):
            self.monitor.enter("data", self.step)
            began = now()
            bucket, batch = next(batches)
            self.waited = now() - began
            self.real_tokens = int(np.sum(batch.lengths * batch.weight))
            if (value := value_asked(position)) is not None:
                batch = batch._replace(mean=np.full_like(batch.mean, value))
            yield bucket, place(batch, self.mesh)

    def _update(self, stage: Stage, stage_step: int, bucket: int, batch: Batch) -> None:
        began = now()
        program = self._program(stage, bucket)
        # The first run waits for processes that compile more slowly.
        known = (stage.in_channels, bucket) in self.ran
        self.monitor.enter("step" if known else "compile", self.step)
        self.ran.add((stage.in_channels, bucket))
        stop_if_asked(self.step)
        rate = stage.learning_rate_at(stage_step)
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
                "real_tokens": self.real_tokens,
                "tokens": tokens,
                "bad_records": len(self.loaders[stage.name].bad),
            },
        )
        self.step += 1
        self.checkpoints.poll()
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
        if self.main:
            self.writer.write(self.row)
        self.pending = None
        bad = self.detector.see(self.row["step"], self.row["loss"], self.row["grad_norm"])
        self.diverged = self.diverged or bad

    def _show(self, stage: Stage, stage_step: int) -> None:
        if not self.main:
            return
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
        """Save, unless the state is not fit to be: that is a divergence."""
        self._flush()
        if self.diverged:
            return
        self.monitor.enter("save", self.step)
        meta = {
            "step": self.step,
            "stage": stage.name,
            "in_channels": stage.in_channels,
            "plan": self.loaders[stage.name].plan.hash,
            "weights": self.loaders[stage.name].records.header.get("weights", {}),
            "seed": self.config.seed,
            "config": json.loads(to_json(self.config)),
        }
        try:
            self.checkpoints.save(self.step, self.state, meta)
        except NotFiniteError as error:
            self.detector.first_bad = self.step - 1
            self.diverged = str(error)

    def _close(self, begin: float) -> None:
        self._flush()
        if not self.main:
            return
        self.writer.close()
        summary = {
            "steps": self.step,
            "seconds": now() - begin,
            "compiled_train_programs": len(self.programs),
            "compiled_encode_programs": sum(len(encoder.programs) for encoder in self.encoders),
        }
        (Path(self.config.run) / "summary.json").write_text(json.dumps(summary, indent=1))
        print(
            f"\n{self.step} steps in {clock(now() - begin)}, {len(self.programs)} train programs",
            flush=True,
        )


class Sampler:
    """Writes what the averaged weights make of the config's prompts, always from the same noise."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.run) / "samples"
        # Sampling has its own programs, which are not made for arrays of several processes.
        self.prompts = config.samples.prompts if jax.process_count() == 1 else ()
        if self.prompts:
            self.vae = load_vae(config.vae)
            self.texts = records.read_texts(Path(config.prepared) / "prompts.safetensors")
            self.empty = records.read_texts(Path(config.prepared) / "empty.safetensors")

    def __call__(self, model: MMDiT, step: int) -> None:
        samples = self.config.samples
        if not self.prompts:
            return
        request = Request(
            self.texts,
            self.empty,
            size=(samples.frames, samples.height, samples.width),
            seeds=[samples.seed] * len(self.prompts),
            sampling=Sampling(steps=samples.steps, guidance=samples.guidance),
        )
        videos = text_to_video(LatentDiffusion(model, self.vae, self.config.process), request)
        self.folder.mkdir(exist_ok=True)
        np.savez_compressed(self.folder / f"{step:07d}.npz", videos=videos)
        media.write_png(self.folder / f"{step:07d}.png", media.contact_sheet(videos))
