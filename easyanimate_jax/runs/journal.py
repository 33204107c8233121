"""The records of a run: metrics for each step, the progress line, and a summary at the end."""

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import jax
import numpy as np
from jax.sharding import Mesh

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.runs.config import TrainConfig, to_json
from easyanimate_jax.runs.position import Position
from easyanimate_jax.training.metrics import MetricsWriter, Progress, clock, now, read_rows
from easyanimate_jax.training.speed import COLUMNS, Meter, Speed, cells, speeds, table
from easyanimate_jax.training.stages import Stage, boundaries
from easyanimate_jax.training.trackers import open_trackers

logger = logging.getLogger(__name__)


class Journal:
    """The metrics of a run. The numbers of a step are fetched while the next step runs.

    Only process 0 writes files; the other processes keep the rows in memory. Until the first update
    of the process has ended, `startup` returns the seconds since the process began, by part.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.began, self.meter = config, now(), Meter(mesh)
        self.startup: Callable[[], dict[str, float]] | None = None
        self.start_seconds: dict[str, float] = {}
        self.main = jax.process_index() == 0
        self.progress = Progress()
        self.row: dict = {}  # of the last step whose numbers were fetched
        self.pending: tuple[dict, dict, Future | None, float] | None = None
        self.ends_stage = False  # whether the pending step is the last of its stage
        self.writer: MetricsWriter | None = None

    def open(self, step: int) -> None:
        """Open the metrics file to continue at `step`; drop the lines of that and later steps."""
        self.pending = None
        if self.writer:
            self.writer.close()
        if self.main:
            folder, config = self.config.folder, json.loads(to_json(self.config))
            trackers = open_trackers(self.config.trackers, folder, step, config)
            self.writer = MetricsWriter(folder, step, trackers)

    def add(
        self,
        place: Position,
        length: int,
        batch: Batch,
        rate: float,
        bad: int,
        metrics: dict,
        *,
        waited: float,
        flops: float,
        seconds: Future | None,
    ) -> None:
        """Store a step that was just dispatched; `metrics` are its arrays, not yet computed.

        It `waited` so many seconds for data. `seconds` are those of the meter for the step, None
        for a step that does not count; `flops` its model FLOPs.
        """
        self.ends_stage = place.last
        self.pending = (
            metrics,
            {
                "step": place.made,
                "stage": place.stage.name,
                "task": place.stage.task,
                "bucket": length,
                "learning_rate": rate,
                "real_tokens": int(np.sum(batch.lengths * batch.weight)),
                "tokens": batch.weight.size * length,
                "bad_records": bad,
                "data_seconds": round(waited, 4),
            },
            seconds,
            flops,
        )

    def flush(self) -> dict | None:
        """Fetch and write the numbers of the stored step. Return its row, or None without one."""
        if self.pending is None:
            return None
        metrics, row, seconds, flops = self.pending
        self.pending = None
        self.row = row | {name: float(x) for name, x in jax.device_get(metrics).items()}
        self.row["seconds"] = round(self.progress.window[-1][0], 4) if self.progress.window else 0.0
        if seconds is not None:
            self.row |= self.meter.rates(seconds.result(), row["real_tokens"], flops)
        if self.startup:
            self._started()
        if self.main:
            self.writer.write(self.row)
            if self.ends_stage:
                rows = read_rows(self.config.folder)
                _tell(speeds(row for row in rows if row["stage"] == self.row["stage"]))
        return self.row

    def _started(self) -> None:
        """Add the time to the first update to the row, and log its parts."""
        self.start_seconds, self.startup = self.startup(), None
        self.row["first_step_seconds"] = sum(self.start_seconds.values())
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.start_seconds.items())
        logger.info(f"first step after {self.row['first_step_seconds']:.1f} s: {parts}")

    def show(self, place: Position) -> None:
        """Print the position of the run, its speed, and when stage and schedule will end."""
        if not self.main:
            return
        stage, stages = place.stage, self.config.stages
        later = stages[stages.index(stage) + 1 :]
        stage_left = self._tokens(stage) * (stage.steps - place.step - 1)
        self.progress.show(
            f"{stage.name} {place.step + 1}/{stage.steps}  step {place.made + 1}"
            f"/{boundaries(stages)[-1]}  loss {self.row['loss']:.4f}"
            f"  grad {self.row['grad_norm']:.3f}  bucket {self.row['bucket']}{self._pace()}",
            stage_left,
            stage_left + sum(self._tokens(s) * s.steps for s in later),
        )

    def _pace(self) -> str:
        """Return MFU of the last row as text; the FLOP/s of a device if its peak is not known."""
        if "mfu" in self.row:
            return f"  MFU {self.row['mfu']:.0%}"
        return f"  {self.row['tflops']:.3g} TFLOP/s" if "tflops" in self.row else ""

    def close(self, step: int, programs: int, encode_programs: int) -> None:
        """Write the last row of metrics and `summary.json`; log the speed in the last stage."""
        self.flush()
        if not self.main:
            return
        self.writer.close()
        found = speeds(read_rows(self.config.folder))
        if not self.ends_stage:  # else it was logged
            _tell(speed for speed in found if speed.stage == self.row.get("stage"))
        seconds = now() - self.began
        summary = {
            "steps": step,
            "seconds": seconds,
            "compiled_train_programs": programs,
            "compiled_encode_programs": encode_programs,
            "speed": [speed._asdict() for speed in found],
        }
        if self.start_seconds:
            summary["first_step_seconds"] = sum(self.start_seconds.values())
            summary["start_seconds"] = self.start_seconds
        (self.config.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        logger.info("%d steps in %s, %d train programs", step, clock(seconds), programs)

    def _tokens(self, stage: Stage) -> int:
        return stage.batch_size * self.config.set(stage.data).budget.lengths[-1]


def _tell(found: Iterable[Speed]) -> None:
    """Log a table of speeds, if there are any."""
    if rows := [cells(speed) for speed in found]:
        logger.info("speed on the devices:\n%s", table(COLUMNS, rows))
