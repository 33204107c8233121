"""`train(config)` trains a video autoencoder on a folder of clips.

    OUTPUT/checkpoints          as in the run folder of a transformer; they stay after the end
    OUTPUT/metrics.jsonl        with tensorboard/, goodput.jsonl and heartbeats/ beside it
    OUTPUT/pictures/500.png     held-out clips, and below them their reconstructions
    OUTPUT/weights.safetensors, config.json, vae_report.json    at the end

The position is one integer, the global step. Stage, crops, noise and learning rate follow from it,
so the result of a resumed training is bit-identical to that of an uninterrupted one.
"""

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from easyanimate_jax import processes
from easyanimate_jax.data import media
from easyanimate_jax.facts import SPACE_FACTOR, TIME_FACTOR
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.training.checkpoint import Checkpoints, NotFiniteError, StorageError
from easyanimate_jax.training.metrics import MetricsWriter, Progress, now
from easyanimate_jax.training.profiler import Profiler
from easyanimate_jax.training.safety.exits import DIVERGED, DONE, PREEMPTED, STORAGE
from easyanimate_jax.training.safety.faults import NO_FAULTS, Faults
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.safety.preemption import Preemption
from easyanimate_jax.training.save_clock import SaveClock
from easyanimate_jax.training.trackers import check_trackers, open_trackers
from easyanimate_jax.training.vae.config import VAEStage, VAETrainConfig
from easyanimate_jax.training.vae.crops import Clips, Crops, batches, split_clips
from easyanimate_jax.training.vae.measure import HeldOut, local, with_statistics
from easyanimate_jax.training.vae.step import VAEState, abstract_state, compile_step, first_state
from easyanimate_jax.weights import run_folder
from easyanimate_jax.weights.folder import load_vae
from easyanimate_jax.weights.module import save_module

logger = logging.getLogger(__name__)

# Fields of a config that say where and when a training writes, and change no update.
FREE = {"data", "output", "save_every", "save_minutes", "log_every", "picture_every", "trackers"}
FREE |= {"hang_seconds"}


def train(config: VAETrainConfig, faults: Faults = NO_FAULTS, *, profile: range = range(0)) -> int:
    """Run the schedule to its end, or until SIGTERM; return the process's exit code.

    The training resumes from the newest checkpoint in `config.output` if there is one. The updates
    `profile`, counted from 1, are traced. It writes the finished model, its latent statistics and
    `vae_report.json` there. Raises ValueError, before anything is written, if data, `init` or
    checkpoints do not fit the config.
    """
    check_trackers(config.trackers)
    output, mesh = Path(config.output), make_mesh(MeshConfig())
    clips = split_clips(config.data, config.links)
    _check_crops(config, clips, mesh)
    start = _load_start(config, mesh)
    position = Position(config, config.vae if start is None else start.config, clips.digest)
    position.check_newest(output)
    stop, process, profiler = Preemption(), jax.process_index(), Profiler(output, profile)
    try:
        with contextlib.ExitStack() as stack:
            if _main():
                lock = FolderLock(output, option="--output", mode=0o700)
                stack.enter_context(lock).begun = True
            output.mkdir(parents=True, exist_ok=True)
            monitor = stack.enter_context(
                Monitor(output, process=process, hang_seconds=config.hang_seconds)
            )
            checkpoints = Checkpoints(
                output / "checkpoints", keep=2, keep_if=position.is_kept, faults=faults
            )
            found = _restore(position, mesh, checkpoints, monitor)
            state = found or first_state(config, mesh, start)
            del start  # its arrays are in the state, or not needed
            training = Training(position, mesh, clips, checkpoints, monitor, state, faults)
            profiler.begin(training.step)
            ended = training.run(stop, stack.enter_context(profiler))
            monitor.enter("save")
            checkpoints.close(training.step)
            if ended:
                training.finish()
    except NotFiniteError as error:
        logger.error("diverged: %s", error)
        return DIVERGED
    except StorageError as error:
        logger.error("storage: %s", error)
        return STORAGE
    return DONE if ended else PREEMPTED


class Position(NamedTuple):
    """Everything that the state after a step depends on, as checkpoints store it."""

    config: VAETrainConfig
    network: VAEConfig  # with the latent statistics of `init`, if there is one
    data: str  # digest of the clips

    def meta(self, step: int) -> dict:
        """Return the metadata of the checkpoint made after `step` updates."""
        return {
            "step": step,
            "stage": f"vae {1 + self.config.number_at(step - 1)}",
            "class": run_folder.VAE,
            "position": self._depends_on(step),
            "config": dataclasses.asdict(self.config),
        }

    def check(self, meta: dict) -> None:
        """Raise ValueError for a checkpoint of another training; the message names what differs.

        Stages that begin after the checkpoint may differ, and so may learning rates and the weights
        of the losses.
        """
        step, saved = meta["step"], meta.get("position", {})
        here = json.loads(json.dumps(self._depends_on(step)))
        other = [
            f"{name} {saved.get(name)!r}, not {value!r}"
            for name, value in here.items()
            if saved.get(name) != value
        ]
        if other:
            raise ValueError(
                f"checkpoint {step} in {self.config.output} was made with {'; '.join(other)}. "
                f"Restore the config and the data, or start in a new output folder."
            )

    def is_kept(self, meta: dict) -> bool:
        """Return whether another schedule made a checkpoint, so that it is never deleted."""
        here = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return any(meta["config"].get(n) != here[n] for n in set(here) - FREE)

    def check_newest(self, output: Path) -> None:
        """Call `check` on the newest readable checkpoint of a folder; the folder is not changed."""
        run_folder.check_format(output)
        for step in reversed(run_folder.complete_steps(output / "checkpoints")):
            try:
                meta = run_folder.read_step_meta(output / "checkpoints" / str(step))
            except ValueError:  # damaged: `Checkpoints` sets it aside
                continue
            return self.check(meta)

    def _depends_on(self, step: int) -> dict:
        config, stages, left = self.config, [], step
        for stage in config.stages:
            if left > 0:
                stages.append(dataclasses.replace(stage, steps=min(stage.steps, left)))
            left -= stage.steps
        return {
            "seed": config.seed,
            "data": self.data,
            "vae": dataclasses.asdict(self.network),
            "stages": [dataclasses.asdict(stage) for stage in stages],
            "controls": config.controls,
            "hidden_frames": config.hidden_frames,
            "decoder_only": config.decoder_only,
            "matrices": config.matrices,
            "judges": config.discriminator_start is not None,
        }


def _check_crops(config: VAETrainConfig, clips: Clips, mesh: Mesh) -> None:
    """Raise ValueError if no clip is large enough for a stage, or if a batch does not divide."""
    for stage in config.stages:
        Crops(clips.trained_on, config.seed).fitting(stage)
        if stage.batch_size % mesh.size:
            raise ValueError(
                f"{stage}: batch_size does not divide over {mesh.size} devices; "
                f"use a multiple of {mesh.size}."
            )
    try:
        Crops(clips.held_out, config.seed).fitting(config.stages[-1])
    except ValueError as error:
        raise ValueError(f"clips that are held out of the training: {error}") from error


def _load_start(config: VAETrainConfig, mesh: Mesh) -> CausalVAE | None:
    """Return the autoencoder of `config.init`, or None for "".

    Raises ValueError if its config differs from `config.vae`.
    """
    if not config.init:
        return None
    start = load_vae(config.init, dtype=config.vae.dtype, mesh=mesh)
    statistics = {name: getattr(start.config, name) for name in ("latent_mean", "latent_scale")}
    if start.config != dataclasses.replace(config.vae, **statistics):
        raise ValueError(
            f"{config.init} holds {start.config}, and the config's vae is {config.vae}; make them "
            f"alike"
        )
    return start


def _restore(
    position: Position, mesh: Mesh, checkpoints: Checkpoints, monitor: Monitor
) -> VAEState | None:
    """Return the state of the newest good checkpoint, or None if there is no checkpoint."""
    monitor.enter("restore")

    def like(meta: dict) -> VAEState:
        position.check(meta)
        return abstract_state(position.config, mesh, position.network)

    found = checkpoints.restore(like)
    monitor.enter("start")
    if found is None:
        return None
    step, state, meta = found
    logger.info("resuming at step %d (%s)", step, meta["stage"])
    return state


class Training:
    """The training in one process, from its first state to the end or to SIGTERM.

    The buffers of the argument `state` are donated; use the attribute `state` instead.
    """

    def __init__(
        self,
        position: Position,
        mesh: Mesh,
        clips: Clips,
        checkpoints: Checkpoints,
        monitor: Monitor,
        state: VAEState,
        faults: Faults,
    ):
        self.faults = faults
        self.position, self.config, self.mesh = position, position.config, mesh
        self.clips, self.checkpoints, self.monitor = clips, checkpoints, monitor
        self.state, self.step = state, int(state.step)
        self.held_out = HeldOut(clips, self.config)
        self.log = Log(self.config, self.step)
        self.save_clock = SaveClock(self.config.save_minutes)
        self.programs = {}  # (rows, frames, size, whether adversarial) -> compiled step

    def run(self, stop: Preemption, profiler: Profiler) -> bool:
        """Make all remaining steps. Return False after a stop request; the state is then saved."""
        config = self.config
        crops = Crops(self.clips.trained_on, config.seed, config.controls, config.hidden_frames)
        feed = batches(crops, config, self.step, self.mesh)
        stopping = False
        while self.step < config.steps and not stopping:
            self.monitor.enter("data", self.step)
            began = now()
            frames = next(feed)
            with profiler.update(self.step + 1, self.monitor):
                self._update(frames, now() - began)
            profiler.ended(self.step, self.state.step, self.monitor)
            stopping = stop.asked()
            self._tell()
            due = stopping or self.step == config.steps or _due(self.step, config.save_every)
            if not due and self.save_clock.meets(self.step):
                self.log.flush()
                due = self.save_clock.due(self.step)
            if due:
                self._save()
        self.log.close()
        if stopping:
            logger.warning("asked to stop: saved at step %d", self.step)
        return not stopping

    def finish(self) -> None:
        """Write the averaged model, its latent statistics and the report of the training."""
        config, vae = self.config, local(self.state.ema)
        self.monitor.enter("sample")
        psnr, _ = self.held_out(vae, config.steps)
        if not config.decoder_only:
            plain = Crops(self.clips.trained_on, config.seed)
            vae = with_statistics(vae, plain, config.stages[-1], config.steps)
        self.monitor.enter("save")
        if jax.process_index():
            return
        seconds = self.monitor.total
        report = {
            "psnr": psnr,
            "seconds": sum(seconds.values()) - seconds["down"],
            "steps": config.steps,
        }
        output = Path(config.output)
        try:
            save_module(output, vae)
            (output / "vae_report.json").write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"the model could not be written to {output}: {error}") from error
        count = len(self.clips.held_out)
        logger.info("vae finished: %.2f dB on %d held-out clips", psnr, count)

    def _update(self, frames: jax.Array, waited: float) -> None:
        """Make one step from a batch that was waited for `waited` seconds."""
        stage = self.config.stage_at(self.step)
        program = self._program(stage)
        began = now()
        self.monitor.enter("step", self.step)
        self.faults.before_step(self.step)
        self.state, metrics = program(self.state, frames)
        self.step += 1
        self.log.add(self.step, metrics)
        self.checkpoints.poll()
        self.log.progress.add(waited + now() - began, _latents(stage), waited)

    def _program(self, stage: VAEStage) -> jax.stages.Compiled:
        """Return the compiled program of the next step, which belongs to this stage."""
        adversarial = self.config.adversarial(self.step + 1)
        key = stage.batch_size, stage.frames, stage.size, adversarial
        if key not in self.programs:
            self.monitor.enter("compile", self.step)
            self.programs[key] = compile_step(
                self.config, self.mesh, self.state, stage, adversarial=adversarial
            )
            processes.wait(f"vae program {len(self.programs)}")
        return self.programs[key]

    def _tell(self) -> None:
        """Write the metrics and the picture of held-out clips, if they are due after this step."""
        ended = self.step == self.config.steps
        pictures = ended or _due(self.step, self.config.picture_every)
        if not (pictures or _due(self.step, self.config.log_every)):
            return
        row = self.log.flush()
        if pictures:
            self.monitor.enter("sample", self.step)
            psnr, sheet = self.held_out(local(self.state.ema), self.step)
            row |= {"held_out_psnr": psnr}
            self.log.picture(self.step, sheet)
        self.log.write(row)

    def _save(self) -> None:
        """Start to write a checkpoint. Raises NotFiniteError if the state is not finite."""
        self.log.flush()
        self.save_clock.restart()
        self.monitor.enter("save", self.step)
        self.checkpoints.save(self.step, self.state, self.position.meta(self.step))


class Log:
    """The metrics, pictures and progress lines of a training; only process 0 writes."""

    def __init__(self, config: VAETrainConfig, first_step: int):
        self.config, self.progress = config, Progress()
        self.folder = Path(config.output)
        self.writer = None
        if _main():
            fields = json.loads(json.dumps(dataclasses.asdict(config)))
            trackers = open_trackers(config.trackers, self.folder, first_step + 1, fields)
            self.writer = MetricsWriter(self.folder, first_step + 1, trackers)
        self.pending = None  # (step, metrics) of the running update, fetched one update later
        self.row = {}

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Store the metrics of update number `step`, and fetch those of the update before."""
        self.flush()
        self.pending = step, metrics

    def flush(self) -> dict:
        """Return the newest metrics. Raises NotFiniteError if the loss is not finite."""
        if self.pending:
            step, metrics = self.pending
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            self.row, self.pending = {"step": step, **values}, None
            if not np.isfinite(values["loss"]):
                raise NotFiniteError(
                    f"the loss of step {step} is {values['loss']}; this step is not saved. Lower "
                    f"the learning rate and run the command again: it resumes from the newest "
                    f"checkpoint"
                )
        return dict(self.row)

    def picture(self, step: int, sheet: UInt8[np.ndarray, "H W 3"]) -> None:
        """Write a picture of held-out clips to `pictures/STEP.png` and the trackers."""
        if self.writer is None:
            return
        self.writer.picture("held out", step, sheet)
        try:
            (self.folder / "pictures").mkdir(exist_ok=True)
            media.write_png(self.folder / "pictures" / f"{step}.png", sheet)
        except OSError as error:  # a full disk costs the picture, not the training
            logger.error("the picture of step %d was not written: %s", step, error)

    def write(self, row: dict) -> None:
        """Write a row of metrics and print the progress line."""
        if self.writer is None:
            return
        seconds = [s for s, _, _ in self.progress.window]
        self.writer.write(row | {"steps_per_second": len(seconds) / max(1e-9, sum(seconds))})
        step, stages = row["step"], self.config.stages
        number = self.config.number_at(step - 1)
        ends = np.cumsum([stage.steps for stage in stages])
        left = int(ends[number] - step) * _latents(stages[number])
        later = sum(stage.steps * _latents(stage) for stage in stages[number + 1 :])
        shown = "".join(
            f"  {name.replace('_', ' ')} {row[name]:.2f}"
            for name in ("psnr", "held_out_psnr")
            if name in row
        )
        self.progress.show(
            f"vae {number + 1}/{len(stages)}  step {step}/{self.config.steps}"
            f"  loss {row['loss']:.4f}{shown}",
            left,
            left + later,
        )

    def close(self) -> None:
        """Close the metrics file and the trackers."""
        if self.writer is not None:
            self.writer.close()


def _latents(stage: VAEStage) -> int:
    """Return the number of latent positions in a batch, which is proportional to the work."""
    frames = (stage.frames - 1) // TIME_FACTOR + 1
    return stage.batch_size * frames * (stage.size // SPACE_FACTOR) ** 2


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _main() -> bool:
    return jax.process_index() == 0
