"""The compiled train steps of a run: one for each input width, batch and token length."""

import logging
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from easyanimate_jax import processes
from easyanimate_jax.data.loader import Loader
from easyanimate_jax.memory import device_memory
from easyanimate_jax.training.compile import compile_stage
from easyanimate_jax.training.fits import memory_line, refusal
from easyanimate_jax.training.program import StepConfig, microbatch_rows, samples_groups
from easyanimate_jax.training.safety.monitor import Monitor
from easyanimate_jax.training.stages import Stage

logger = logging.getLogger(__name__)


class Programs:
    """Compiles the step of a stage at its first use, and keeps the program.

    Stages of equal shapes share a program. `loaders` give each stage's token lengths and texts.
    """

    def __init__(
        self, config: StepConfig, mesh: Mesh, loaders: Mapping[str, Loader], monitor: Monitor
    ):
        self.config, self.mesh, self.loaders, self.monitor = config, mesh, loaders, monitor
        self.compiled: dict[tuple, jax.stages.Compiled] = {}
        self.model_flops: dict[tuple, float] = {}
        self.ran: set[tuple] = set()

    def __len__(self) -> int:
        return len(self.compiled)

    def __call__(self, stage: Stage, length: int) -> jax.stages.Compiled:
        """Return the compiled step (state, batch, key, learning rate) for a token length.

        Raises ValueError if it does not fit a device's memory; the message lists what takes it.
        """
        return self._compiled(stage, length)

    def groups(self, stage: Stage, length: int) -> jax.stages.Compiled:
        """Return the compiled sampler (state, batch, key) of a stage that samples its videos.

        Raises ValueError as a call does.
        """
        return self._compiled(stage, length, sampler=True)

    def _compiled(self, stage: Stage, length: int, *, sampler: bool = False) -> jax.stages.Compiled:
        key = (*self._key(stage, length), sampler)
        if key not in self.compiled:
            self.monitor.enter("compile")
            report, program = compile_stage(
                self.config,
                stage,
                self.mesh,
                tokens=length,
                text_lengths=tuple(len(text) for text in self.loaders[stage.name].empty),
                memory=device_memory(),
                sampler=sampler,
            )
            if not report.fits:
                raise ValueError(refusal(report))
            logger.info(memory_line(report))
            self.model_flops[key] = report.model_flops
            self.compiled[key] = program
            processes.wait(f"program {len(self.compiled)}")
        return self.compiled[key]

    def flops(self, stage: Stage, length: int) -> float:
        """Return the model FLOPs of a compiled step, without the sampling of its videos."""
        return self.model_flops[*self._key(stage, length), False]

    def check(self, stage: Stage) -> None:
        """Compile the stage at its longest bucket, which decides whether it fits the devices."""
        longest = max(self.loaders[stage.name].plan.lengths)
        self(stage, longest)
        if samples_groups(stage):
            self.groups(stage, longest)

    def first_run(self, stage: Stage, length: int) -> bool:
        """Return whether the program runs for the first time, and remember that it ran.

        The first run waits for processes that compile more slowly.
        """
        key = self._key(stage, length)
        first = key not in self.ran
        self.ran.add(key)
        return first

    def _key(self, stage: Stage, length: int) -> tuple:
        rows = microbatch_rows(stage, self.mesh)
        return stage.in_channels, stage.batch_size, rows, length, stage.objective
