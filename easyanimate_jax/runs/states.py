"""The training state of a run: initialise, restore, widen for a stage, and save it."""

import json
import logging
from collections.abc import Mapping
from functools import partial

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.storage import Kernels
from easyanimate_jax.runs.config import TrainConfig, to_json
from easyanimate_jax.runs.position import Position, check_resume, is_kept, position_at
from easyanimate_jax.runs.programs import Programs
from easyanimate_jax.sharding import moved
from easyanimate_jax.training.checkpoint import Checkpoints
from easyanimate_jax.training.post.reward import reward_weights
from easyanimate_jax.training.program import abstract_state, graph_of, make_state, with_adapters
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import (
    Judge,
    TrainState,
    input_channels,
    keeping,
    whole,
    widen_state,
)
from easyanimate_jax.weights.adapters import to_continue
from easyanimate_jax.weights.defaults import of_source
from easyanimate_jax.weights.folder import load_start, load_vae
from easyanimate_jax.weights.identity import weights_print

logger = logging.getLogger(__name__)


GIVEN = dict.fromkeys(("frozen", "teacher", "judge"))  # fields that no checkpoint holds


class States:
    """Makes, restores and saves the states of a run, sharded over the mesh of their stage.

    The state after an update is on the mesh of that update's stage, until the next stage begins.
    The step is compiled and compared with a device's memory before any array is made, so a run that
    does not fit fails at once.
    """

    def __init__(
        self,
        config: TrainConfig,
        meshes: Mapping[str, Mesh],
        key: PRNGKeyArray,
        plans: Mapping[str, str],
        programs: Programs,
        checkpoints: Checkpoints,
        monitor: Monitor,
    ):
        self.config, self.meshes, self.key, self.plans = config, meshes, key, plans
        self.programs, self.checkpoints, self.monitor = programs, checkpoints, monitor
        # The identity of the frozen weights, which no checkpoint holds.
        frozen = config.step.partial or config.step.taught
        self.base = weights_print(config.init, config.init_step) if frozen else None
        taught = of_source(config.init, config.init_step) if config.step.taught else None
        self.teacher = taught and taught._asdict()  # how the teacher is sampled

    def first(self) -> TrainState:
        """Return the first state, with new weights or those of `config.init`, sharded.

        Adapters begin with the product of `config.init_lora`. Raises ValueError if it does not fit.
        """
        start = {}
        if path := self.config.init_lora:
            start = to_continue(path, self.config.step.model, self.config.lora)
        stage = self.config.stages[0]
        self.programs.check(stage)
        self.monitor.enter("start")
        with jax.set_mesh(self.meshes[stage.name]):
            return self._start(stage, start)._replace(judge=self._judge(stage))

    def _start(self, stage: Stage, start: Mapping) -> TrainState:
        """Return the first state on the mesh of a stage, with the first stage's input channels."""
        settings = self.config.step
        make, placed, _ = self._abstract(stage, self.config.stages[0].in_channels)
        placed = placed._replace(judge=None)
        key = jax.random.fold_in(self.key, 1)
        if not self.config.init:
            return jax.jit(make, out_shardings=placed)(key)
        logger.info("starting from the weights of %s", self.config.init)
        model = self._init(stage, settings.frozen if settings.partial else "float32")

        def around(model, key, start):
            def make(config, key):
                return with_adapters(model, config, key, start)

            return make_state(settings, key, make)

        return jax.jit(around, out_shardings=placed, donate_argnums=0)(model, key, start)

    def newest(self, *, before: int | None = None) -> tuple[int, TrainState] | None:
        """Return (updates made, state) of the newest good checkpoint; None if there is none.

        With `before`, only earlier checkpoints count. Raises ValueError for a checkpoint that does
        not fit the config.
        """
        self.monitor.enter("restore")

        def like(meta: dict) -> TrainState:
            for change in check_resume(meta, self.config, self.plans):
                logger.warning("changed since checkpoint %d: %s", meta["step"], change)
            if meta.get("base") != self.base:
                raise ValueError(_other_base(meta, self.config, self.base))
            place = position_at(self.config, meta["step"])
            if place:
                self.programs.check(place.stage)
                self.monitor.enter("restore")
            return self._abstract(self._made_in(meta), meta["in_channels"])[2]._replace(**GIVEN)

        found = self.checkpoints.restore(like, before=before)
        if found is None:
            return None
        step, state, meta = found
        if self.base is not None:
            stage = self._made_in(meta)
            with jax.set_mesh(self.meshes[stage.name]):
                given = self._given(stage, meta["in_channels"])
                state = state._replace(**given, judge=self._judge(stage))
        logger.info("resuming at step %d (stage %r)", step, meta["stage"])
        return step, state

    def _made_in(self, meta: Mapping) -> Stage:
        """Return the stage of a checkpoint's last update."""
        return next(stage for stage in self.config.stages if stage.name == meta["stage"])

    def _given(self, stage: Stage, in_channels: int) -> dict:
        """Return what no checkpoint of a stage holds, {field: weights}, with so many channels."""
        settings = self.config.step
        if settings.partial:
            name, weights = "frozen", self._start(stage, {}).frozen
        else:
            name, weights = "teacher", self._init(stage, settings.frozen)
        if in_channels != self.config.stages[0].in_channels:
            placed = getattr(self._abstract(stage, in_channels)[1], name)
            widen = jax.jit(widen_state, static_argnums=1, out_shardings=placed)
            weights = widen(weights, in_channels)
        return {name: weights}

    def _judge(self, stage: Stage) -> Judge | None:
        """Return the autoencoder and the weights of the run's reward, if it has one."""
        if self.config.step.reward is None:
            return None
        names, vae = self.config.step.reward
        judge = Judge(load_vae(vae), {name: reward_weights(name) for name in names})
        return jax.device_put(judge, self._abstract(stage, stage.in_channels)[1].judge)

    def _init(self, stage: Stage, kernels: Kernels) -> MMDiT:
        """Return the model of `config.init` with the first stage's input channels."""
        settings = self.config.step
        return load_start(
            self.config.init,
            settings.with_channels(self.config.stages[0].in_channels).model,
            mesh=self.meshes[stage.name],
            step=self.config.init_step,
            kernels=kernels,
            exact=settings.exact,
        )

    def whole(self, state: TrainState) -> MMDiT:
        """Return the averaged model of a state; the trained one if the run keeps no average."""
        graph = graph_of(self.config.step.with_channels(input_channels(state)))
        return whole(graph, state.model if state.ema is None else state.ema, state.frozen)

    def at(self, step: int) -> TrainState:
        """Return the state of checkpoint `step`. Raises ValueError if it is missing or damaged."""
        found = self.newest(before=step + 1)
        if found is None or found[0] != step:
            raise ValueError(f"{self.config.run} has no good checkpoint {step} to replay from")
        return found[1]

    def for_stage(self, state: TrainState, stage: Stage) -> TrainState:
        """Return the state with mesh, input channels and kept activations of a stage.

        Its arrays are donated.
        """
        state = keeping(state, self.config.step.model.save)
        have = input_channels(state)
        _, placed, _ = self._abstract(stage, have)
        if state.step.sharding != placed.step:
            state = moved(state, placed)
            axes = " x ".join(f"{n} {size}" for n, size in self.meshes[stage.name].shape.items())
            logger.info("stage %r: the state is now on the mesh %s", stage.name, axes)
        if have != stage.in_channels:
            _, placed, _ = self._abstract(stage, stage.in_channels)
            widen = jax.jit(widen_state, static_argnums=1, out_shardings=placed)
            state = widen(state, stage.in_channels)
            logger.info("stage %r: input channels %d -> %d", stage.name, have, stage.in_channels)
        self.programs.check(stage)
        settled = self.config.step.of_stage(self.programs.settled(stage))
        return keeping(state, settled.model.save)

    def save(self, place: Position, state: TrainState) -> None:
        """Start to write the state after the update at `place`.

        Raises NotFiniteError, and saves nothing, if an array is not finite.
        """
        step, records = place.made + 1, self.programs.loaders[place.stage.name].records
        self.monitor.enter("save", step)
        meta = {
            "step": step,
            "stage": place.stage.name,
            "in_channels": place.stage.in_channels,
            "plan": self.plans[place.stage.name],
            "weights": records.header.get("weights", {}),  # fingerprints of VAE and text encoders
            "base": self.base,
            "teacher": self.teacher,
            "seed": self.config.seed,
            "config": json.loads(to_json(self.config)),
        }
        self.checkpoints.save(step, state._replace(**GIVEN), meta)

    def _abstract(self, stage: Stage, in_channels: int):
        """Return (function key -> state, its shardings on the mesh of a stage, it as shapes)."""
        return abstract_state(self.config.step.with_channels(in_channels), self.meshes[stage.name])


def open_checkpoints(config: TrainConfig, **options) -> Checkpoints:
    """Return the `Checkpoints` of a run folder, with the config's rules for which to keep."""
    keep_if = partial(is_kept, config=config)
    rules = {"keep": config.keep, "keep_every": config.keep_every, "keep_if": keep_if}
    return Checkpoints(config.checkpoints, **rules, **options)


def _other_base(meta: Mapping, config: TrainConfig, base: str | None) -> str:
    """Return why a checkpoint does not belong to the frozen weights of a config."""
    trained = f"checkpoint {meta['step']} was trained"
    if meta.get("base") is None:
        return (
            f"{trained} without frozen weights beside it, and this config needs those of "
            f"init, {config.init}, as a teacher or below adapters: start in a new run folder"
        )
    if base is None:
        return (
            f"{trained} beside frozen weights, and this config has none: set lora, train and the "
            f"objectives as they were, or start in a new run folder"
        )
    return (
        f"{trained} beside weights with fingerprint {meta['base']}, and those of {config.init} "
        f"have {base}; put the same weights there, or start in a new run folder"
    )
