"""The compiled train steps of a run: one for each mesh, input width, batch and token length."""

import json
import logging
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from easyanimate_jax import processes
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.memory import device_memory
from easyanimate_jax.runs.batches import split
from easyanimate_jax.storage.whole import replace_text
from easyanimate_jax.training.auto import Choice, choose, is_auto
from easyanimate_jax.training.compile import StageReport, compile_stage
from easyanimate_jax.training.fits import memory_line, refusal
from easyanimate_jax.training.program import StepConfig, microbatch_rows, samples_groups
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.saving import same_for_all
from easyanimate_jax.training.stages import Stage

logger = logging.getLogger(__name__)

CHOSEN = "chosen.json"  # file of a run with the choices for what is "auto" in its config


class Programs:
    """Compiles the step of a stage at its first use, and keeps the program.

    Stages of equal shapes and meshes share a program. `meshes` give each stage's mesh, `loaders`
    its token lengths and texts, and `held_out` those of its held-out clips. What is "auto" in the
    config is chosen when a stage begins, and kept in the file `CHOSEN` of `folder`: a resumed run
    makes the same bits.
    """

    def __init__(
        self,
        config: StepConfig,
        meshes: Mapping[str, Mesh],
        loaders: Mapping[str, Loader],
        monitor: Monitor,
        folder: Path,
        held_out: Mapping[str, Loader],
    ):
        self.config, self.meshes, self.loaders, self.monitor = config, meshes, loaders, monitor
        self.held_out, self.path = held_out, folder / CHOSEN
        self.compiled: dict[tuple, jax.stages.Compiled] = {}
        self.model_flops: dict[tuple, float] = {}
        self.ran: set[tuple] = set()
        self.chosen: dict[str, Choice] = {}  # by the key of a stage
        self.memory: int | None = None  # bytes of a device

    def __len__(self) -> int:
        return len(self.compiled)

    def __call__(self, stage: Stage, length: int) -> jax.stages.Compiled:
        """Return the compiled step (state, batch, key, learning rate) for a token length.

        Raises ValueError if it does not fit a device's memory; the message lists what takes it.
        """
        return self._compiled(self.settled(stage), length)

    def groups(self, stage: Stage, length: int) -> jax.stages.Compiled:
        """Return the compiled sampler (state, batch, key) of a stage that samples its videos.

        Raises ValueError as a call does.
        """
        return self._compiled(self.settled(stage), length, sampler=True)

    def settled(self, stage: Stage) -> Stage:
        """Return a stage without "auto"; `check` has made the choice."""
        if not is_auto(self.config, stage):
            return stage
        return self.chosen[self._name(stage)].apply(stage)

    def flops(self, stage: Stage, length: int) -> float:
        """Return the model FLOPs of a compiled step, without the sampling of its videos."""
        return self.model_flops[*self._key(self.settled(stage), length), False]

    def check(self, stage: Stage) -> None:
        """Compile the stage at its longest bucket, which decides whether it fits the devices.

        What is "auto" is chosen first, and the loaders of the stage deliver its microbatches.
        Raises ValueError if no choice fits.
        """
        longest = max(self.loaders[stage.name].plan.lengths)
        if is_auto(self.config, stage) and self._name(stage) not in self.chosen:
            self._choose(stage, longest)
        settled = self.settled(stage)
        for loaders in (self.loaders, self.held_out):
            if stage.name in loaders:
                split(loaders[stage.name], settled, self.meshes[stage.name])
        self._compiled(settled, longest)
        if samples_groups(stage):
            self._compiled(settled, longest, sampler=True)

    def first_run(self, stage: Stage, length: int) -> bool:
        """Return whether the program runs for the first time, and remember that it ran.

        The first run waits for processes that compile more slowly.
        """
        key = self._key(self.settled(stage), length)
        first = key not in self.ran
        self.ran.add(key)
        return first

    def _compiled(self, stage: Stage, length: int, *, sampler: bool = False) -> jax.stages.Compiled:
        key = (*self._key(stage, length), sampler)
        if key not in self.compiled:
            report = self._compile(stage, length, sampler=sampler)
            if not report.fits:
                raise ValueError(refusal(report))
        return self.compiled[key]

    def _compile(self, stage: Stage, length: int, *, sampler: bool = False) -> StageReport:
        """Compile a step or a sampler, keep the program if it fits, and return the report."""
        self.monitor.enter("compile")
        report, program = compile_stage(
            self.config,
            stage,
            self.meshes[stage.name],
            tokens=length,
            text_lengths=self._text_lengths(stage),
            memory=self._memory(),
            sampler=sampler,
        )
        if report.fits:
            logger.info(memory_line(report))
            key = (*self._key(stage, length), sampler)
            self.compiled[key], self.model_flops[key] = program, report.model_flops
            processes.wait(f"program {len(self.compiled)}")
        return report

    def _choose(self, stage: Stage, length: int) -> None:
        """Choose what is "auto" in a stage: as remembered if that fits, else the fastest."""

        def compiles(choice: Choice) -> StageReport:
            settled = choice.apply(stage)
            report = self._compile(settled, length)
            if report.fits and samples_groups(stage):
                sampler = self._compile(settled, length, sampler=True)
                return report if sampler.fits else sampler
            return report

        name, known = self._name(stage), self._remembered()
        if name in known and compiles(known[name]).fits:
            self.chosen[name] = known[name]
            return
        texts = sum(self._text_lengths(stage))
        mesh = self.meshes[stage.name]
        choice, report = choose(self.config, stage, mesh, length, texts, compiles)
        if not report.fits:
            raise ValueError(refusal(report))
        self.chosen[name] = choice
        logger.info(f"stage {stage.name!r} computes {choice}; {self.path} remembers it")
        if jax.process_index() == 0:
            kept = {n: c._asdict() for n, c in (known | self.chosen).items()}
            replace_text(self.path, json.dumps(kept, indent=1))

    def _remembered(self) -> dict[str, Choice]:
        """Return the choices that process 0 finds in the run, in every process."""
        text = b"{}"
        if jax.process_index() == 0 and self.path.is_file():
            text = self.path.read_bytes()
        if jax.process_count() > 1:
            processes.wait(f"choice {len(self.chosen)}")
            letters = np.zeros(int(same_for_all(len(text))), np.int32)
            letters[: len(text)] = list(text)[: len(letters)]
            text = np.asarray(same_for_all(letters)).astype(np.uint8).tobytes()
        try:
            return {name: Choice.read(fields) for name, fields in json.loads(text).items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning(f"{self.path} cannot be read: what is 'auto' is chosen again")
            return {}

    def _memory(self) -> int:
        """Return the memory of a device, in bytes, which is the smallest of all processes'."""
        if self.memory is None:
            self.memory = device_memory()
            if jax.process_count() > 1:
                processes.wait("memory")
                self.memory = int(multihost_utils.process_allgather(float(self.memory)).min())
        return self.memory

    def _text_lengths(self, stage: Stage) -> tuple[int, ...]:
        return tuple(len(text) for text in self.loaders[stage.name].empty)

    def _key(self, stage: Stage, length: int) -> tuple:
        """Return what the program of a stage without "auto" depends on."""
        return self.meshes[stage.name], *self._shape(stage, length)

    def _shape(self, stage: Stage, length: int) -> tuple:
        rows = microbatch_rows(stage, self.meshes[stage.name])
        save = self.config.of_stage(stage).model.kept
        return stage.in_channels, stage.batch_size, rows, save, length, stage.objective

    def _name(self, stage: Stage) -> str:
        """Return the key under which the choice for a stage is remembered: what it depends on."""
        longest = max(self.loaders[stage.name].plan.lengths)
        mesh = self.meshes[stage.name]
        device = mesh.devices.flat[0].device_kind
        own = () if stage.save is None else (stage.save,)
        key = self._shape(stage, longest), self.config, stage.microbatch, *own
        text = repr((*key, self._text_lengths(stage), dict(mesh.shape), device))
        return f"{stage.name} {blake2b(text.encode(), digest_size=8).hexdigest()}"
