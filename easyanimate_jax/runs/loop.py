"""`train(config)` runs the schedule from its first update, or resumes it, and goes to its end.

The position in the schedule is one integer, the number of updates made. The stage, the batch, all
random draws and the learning rate follow from it. So a run that was stopped and resumed makes the
same updates as an uninterrupted one.

Each stage has its own mesh. Only the code that traces a program sets it.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.evaluation.rewards import RewardError
from easyanimate_jax.runs.batches import held_out_loaders, make_loaders, place, with_empty
from easyanimate_jax.runs.config import TrainConfig, to_json
from easyanimate_jax.runs.groups import GroupSampler, check_groups
from easyanimate_jax.runs.home import open_home
from easyanimate_jax.runs.journal import Journal
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.runs.position import Position, check_resume, check_weights, position_at
from easyanimate_jax.runs.programs import Programs
from easyanimate_jax.runs.recovery import Recovery
from easyanimate_jax.runs.samples import Sampler
from easyanimate_jax.runs.states import States, open_checkpoints
from easyanimate_jax.runs.validation import Validator
from easyanimate_jax.runs.visits import VisitLoader
from easyanimate_jax.storage.whole import replace_text
from easyanimate_jax.training.checkpoint import NotFiniteError, StorageError, named_leaves
from easyanimate_jax.training.metrics import now, read_rows
from easyanimate_jax.training.profiler import Profiler
from easyanimate_jax.training.program import samples_groups
from easyanimate_jax.training.safety.cloud_goodput import CloudGoodput, open_sink
from easyanimate_jax.training.safety.divergence import DivergedError
from easyanimate_jax.training.safety.exits import DIVERGED, DONE, FOUND, PREEMPTED, STORAGE
from easyanimate_jax.training.safety.faults import NO_FAULTS, Faults
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.safety.preemption import Preemption
from easyanimate_jax.training.save_clock import SaveClock
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.training.trackers import check_trackers
from easyanimate_jax.weights.fingerprint import fingerprint
from easyanimate_jax.weights.steps import steps_in

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    faults: Faults = NO_FAULTS,
    *,
    profile: range = range(0),
    began: float | None = None,
) -> int:
    """Run the schedule to its end, or until SIGTERM; return the process's exit code.

    The run resumes from the newest checkpoint of `config.run` if there is one. The updates
    `profile`, counted from 1, are traced. The time to the first update counts from `began` on the
    clock `metrics.now`, by default from this call. Raises ValueError, before anything is written,
    for data, models or checkpoints that do not fit the config, for a run folder in use, and for a
    step that does not fit the devices' memory.
    """
    folder, called = config.folder, now()
    check_trackers(config.trackers)
    meshes = stage_meshes(config)
    loaders = make_loaders(config, meshes)
    held_out = held_out_loaders(config, meshes, loaders)
    check_newest(config, loaders)
    sink = open_sink(config.goodput_job, process=jax.process_index())
    stop, profiler = Preemption(), Profiler(folder, profile)
    try:
        check_groups(config, loaders)
        with contextlib.ExitStack() as stack:
            home = stack.enter_context(open_home(config))
            setup = now() - called
            monitor = stack.enter_context(open_monitor(config, sink))
            stack.enter_context(profiler)
            run = Run(
                config, meshes, loaders, monitor, faults, held_out=held_out, before_done=home.keep
            )
            before = {"imports": called - (began or called), "setup": setup}
            run.journal.startup = lambda: before | monitor.spent()
            step, state = run.states.newest() or (0, run.states.first())
            home.begun = True
            if jax.process_index() == 0:
                replace_text(folder / "config.json", to_json(config))
            profiler.begin(step)
            finished, step = run.stages(step, state, stop, profiler)
            monitor.enter("save")
            run.states.checkpoints.close(step)
    except DivergedError as error:
        logger.error("diverged: %s", error)
        return DIVERGED
    except StorageError as error:
        logger.error("storage: %s", error)
        return STORAGE
    except RewardError as error:
        logger.error("reward: %s", error)
        return PREEMPTED
    return DONE if finished else PREEMPTED


def open_monitor(config: TrainConfig, sink: CloudGoodput | None = None) -> Monitor:
    """Return the monitor of this process."""
    process = jax.process_index()
    return Monitor(config.folder, process=process, hang_seconds=config.hang_seconds, sink=sink)


def check_newest(config: TrainConfig, loaders: dict[str, Loader]) -> None:
    """Raise ValueError if the newest readable checkpoint of the run does not belong to the config.

    Damaged checkpoints are left to `Checkpoints.restore`.
    """
    steps = steps_in(config.checkpoints)
    for step in reversed(steps.complete()):
        try:
            meta = steps.meta(step)
        except ValueError:
            continue
        check_resume(meta, config, plan_hashes(loaders))
        check_weights(meta, loaders[meta["stage"]].records.header.get("weights", {}))
        return


def plan_hashes(loaders: dict[str, Loader]) -> dict[str, str]:
    """Return the hash of each stage's plan."""
    return {name: loader.plan.hash for name, loader in loaders.items()}


class Run:
    """A training run with its states, programs, journal and recovery; `stages` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        meshes: Mapping[str, Mesh],
        loaders: dict[str, Loader],
        monitor: Monitor,
        faults: Faults = NO_FAULTS,
        held_out: dict[str, Loader] | None = None,
        before_done: Callable[[], None] = lambda: None,
    ):
        self.config, self.meshes, self.loaders = config, meshes, loaders
        self.monitor, self.faults = monitor, faults
        self.key = jax.random.key(config.seed)
        self.encoders = {x.encoder for x in loaders.values() if isinstance(x, VisitLoader)}
        for encoder in self.encoders:
            encoder.announce = self._encode_program
        held = held_out or {}
        self.programs = Programs(config.step, meshes, loaders, monitor, config.folder, held)
        checkpoints = open_checkpoints(config, faults=faults, before_done=before_done)
        self.states = States(
            config, meshes, self.key, plan_hashes(loaders), self.programs, checkpoints, monitor
        )
        self.recovery = Recovery(config, loaders)
        self.journal = Journal(config, meshes[config.stages[0].name])
        self.sampler = Sampler(config, meshes, held)
        self.validator = Validator(config, meshes, held)
        self.groups = GroupSampler(config, meshes, loaders, self.programs, monitor)
        self.save_clock = SaveClock(config.save_minutes)

    def stages(
        self, step: int, state: TrainState, stop: Preemption, profiler: Profiler
    ) -> tuple[bool, int]:
        """Make all updates after the first `step`; return (schedule finished, updates made).

        After a stop request the state is saved and the schedule is not finished.
        """
        self._open(step)
        if step:  # the run may have ended between this checkpoint and its validation
            before = position_at(self.config, step - 1)
            self._validate(before, state, step, border=before.last)
        while where := position_at(self.config, step):
            state = self.states.for_stage(state, where.stage)
            self._validate(where, state, step, border=where.step == 0)
            self.recovery.enter()
            for length, batch, waited in self.batches(where):
                where = position_at(self.config, step)
                try:
                    with profiler.update(where.made + 1, self.monitor):
                        state = self.update(where, length, batch, waited, state)
                except RewardError:  # before the step, so the state is whole
                    self._keep(step, state)
                    raise
                profiler.ended(where.made + 1, state.step, self.monitor)
                stopping = stop.asked()
                self._save(where, state, due=stopping)
                if self.recovery.reason:
                    event = self.recovery.evidence(where, self.journal.row["step"], state)
                    state = None
                    step, state = self.recovery.go_back(where, event, self.states)
                    self._open(step)
                    self.save_clock.restart()
                    break
                step = where.made + 1
                self._sample(where, state)
                self._validate(where, state, step, border=where.last)
                if stopping:
                    self._close(step)
                    logger.warning("asked to stop: saved at step %d", step)
                    return False, step
                if where.last:
                    break
        self._close(step)
        return True, step

    def batches(self, first: Position) -> Iterator[tuple[int, Batch, float]]:
        """Yield (token length, batch on the host, seconds waited) of the stage from `first` on."""
        loader = self.loaders[first.stage.name]
        start = first.step + self.recovery.offset(first)
        read = loader.batches(start)
        for position in itertools.count(start):
            self.monitor.enter("data", first.made + position - start)
            began = now()
            length, batch = next(read)
            waited = now() - began
            if (value := self.faults.value(position)) is not None:
                batch = batch._replace(mean=np.full_like(batch.mean, value))
            yield length, with_empty(batch, first.stage, loader), waited

    def update(
        self, where: Position, length: int, batch: Batch, waited: float, state: TrainState
    ) -> TrainState:
        """Return the state after one update; its metrics are fetched during the next update."""
        began, stage = now(), where.stage
        program = self.programs(stage, length)
        first = self.programs.first_run(stage, length)
        self.monitor.enter("compile" if first else "step", where.made)
        self.faults.before_step(where.made)
        rate = stage.learning_rate_at(where.step)
        arrays = self._arrays(where, length, batch, state)
        dispatched = now()
        state, metrics = program(state, arrays, self.key, jnp.float32(rate))
        seconds = self.journal.meter.time(dispatched, metrics)
        self.recovery.see(self.journal.flush())
        bad = len(self.loaders[stage.name].bad)
        self.journal.add(
            *(where, length, batch, rate, bad, metrics),
            waited=waited,
            flops=self.programs.flops(stage, length),
            seconds=None if first else seconds,
        )
        self.states.checkpoints.poll()
        first_made = where.step == 0 or self.journal.startup is not None
        shown = first_made or _every(self.config.log_every, where.made + 1)
        if shown:
            jax.block_until_ready(metrics)  # the wait is a part of this update's seconds
        tokens = batch.weight.size * length
        self.journal.progress.add(waited + now() - began, tokens, waited)
        if shown:
            self.recovery.see(self.journal.flush())
            self.journal.show(where)
        return state

    def _arrays(self, where: Position, length: int, batch: Batch, state: TrainState) -> Batch:
        """Return a batch on the devices, with sampled videos if the stage's step reads them."""
        arrays = place(batch, self.meshes[where.stage.name])
        if not samples_groups(where.stage):
            return arrays
        position = where.step + self.recovery.offset(where)
        return self.groups(where.stage, length, position, state, arrays, self.key)

    def replay(self, step: int, state: TrainState) -> dict:
        """Make the next update; return its loss, gradient norm and the fingerprints of all arrays.

        The buffers of `state` are donated. Raises ValueError at the end of the schedule.
        """
        where = position_at(self.config, step)
        if where is None:
            raise ValueError(f"checkpoint {step} ends the schedule: replay an earlier one")
        state = self.states.for_stage(state, where.stage)
        length, batch, _ = next(self.batches(where))
        rate = jnp.float32(where.stage.learning_rate_at(where.step))
        arrays = self._arrays(where, length, batch, state)
        state, metrics = self.programs(where.stage, length)(state, arrays, self.key, rate)
        prints = {name: int(fingerprint(x)) for name, x in named_leaves(state).items()}
        return prints | {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    def _save(self, where: Position, state: TrainState, *, due: bool) -> None:
        """Save if `due`, at the end of a stage, or by steps or time; report a non-finite state."""
        made = where.made + 1
        due = due or where.last or _every(self.config.save_every, made)
        if not (due or self.save_clock.meets(made)):
            return
        self.recovery.see(self.journal.flush())
        if self.recovery.reason or not (due or self.save_clock.due(made)):
            return
        self.save_clock.restart()
        try:
            self.states.save(where, state)
        except NotFiniteError as error:
            self.recovery.not_finite(where.made, str(error))

    def _keep(self, step: int, state: TrainState) -> None:
        """Save the state after `step` updates before the run ends with an error."""
        if step:
            with contextlib.suppress(NotFiniteError):
                self.states.save(position_at(self.config, step - 1), state)
        self._close(step)
        self.states.checkpoints.close(step)

    def _sample(self, where: Position, state: TrainState) -> None:
        every = self.config.samples.every
        if every and (where.last or _every(every, where.made + 1)):
            self.recovery.see(self.journal.flush())
            self.monitor.enter("sample")
            self.sampler(where.stage, self.states.whole(state), where.made + 1)

    def _open(self, step: int) -> None:
        self.journal.open(step)
        self.validator.open(step, self.journal.writer)
        self.sampler.writer = self.journal.writer

    def _validate(self, where: Position, state: TrainState, made: int, *, border: bool) -> None:
        """Validate a state of `made` updates with the clips of a stage, if that is due."""
        if self.validator.due(where.stage, made, border=border):
            self.recovery.see(self.journal.flush())
            self.monitor.enter("validate")
            self.validator(where.stage, state, made)

    def _close(self, step: int) -> None:
        encode_programs = sum(len(encoder.programs) for encoder in self.encoders)
        self.journal.close(step, len(self.programs), encode_programs)

    def _encode_program(self, text: str) -> None:
        """Enter "compile" when the encoder compiles for a new shape: this is no wait for data."""
        self.monitor.enter("compile")
        logger.info(text)


def replay(config: TrainConfig, step: int) -> int:
    """Make the update after checkpoint `step` twice from the files; return 0 if the bits are equal.

    The two results are compared with each other and with the loss and gradient norm that the run
    logged; nothing is saved. A difference on the same devices means a silent hardware error; then 1
    is returned. The run must not be in progress. Raises ValueError without such a checkpoint.
    """
    meshes = stage_meshes(config)
    loaders = make_loaders(config, meshes)
    with open_home(config), open_monitor(config) as monitor:
        rows = read_rows(config.folder)
        logged = next((row for row in rows if row["step"] == step), None)
        if logged is None:
            raise ValueError(f"metrics.jsonl of {config.run} has no step {step}; replay a made one")
        run = Run(config, meshes, loaders, monitor)
        first, second = (run.replay(step, run.states.at(step)) for _ in range(2))
        run.states.checkpoints.close()
    names = [name for name in first if first[name] != second[name]]
    names += [f"{name}, as logged" for name in ("loss", "grad_norm") if first[name] != logged[name]]
    logger.info("step %d made twice: %s differs", step, ", ".join(names) or "nothing")
    return FOUND if names else DONE


def _every(count: int, step: int) -> bool:
    """Return whether an action that is due every `count` steps is due at `step`; 0 is never."""
    return count > 0 and step % count == 0
