"""The records of a run: metrics for each step, the progress line, and a summary at the end."""

import json
import logging
from pathlib import Path

import jax
import numpy as np

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.runs.config import TrainConfig, to_json
from easyanimate_jax.runs.position import Position
from easyanimate_jax.training.metrics import MetricsWriter, Progress, clock, now
from easyanimate_jax.training.stages import Stage, boundaries
from easyanimate_jax.training.trackers import open_trackers

logger = logging.getLogger(__name__)


class Journal:
    """The metrics of a run. The numbers of a step are fetched while the next step runs.

    Only process 0 writes files; the other processes keep the rows in memory.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.began = config, now()
        self.main = jax.process_index() == 0
        self.progress = Progress()
        self.row: dict = {}  # of the last step whose numbers were fetched
        self.pending: tuple[dict, dict] | None = None
        self.writer: MetricsWriter | None = None

    def open(self, step: int) -> None:
        """Open the metrics file to continue at `step`; drop the lines of that and later steps."""
        self.pending = None
        if self.writer:
            self.writer.close()
        if self.main:
            folder, config = Path(self.config.run), json.loads(to_json(self.config))
            trackers = open_trackers(self.config.trackers, folder, step, config)
            self.writer = MetricsWriter(folder, step, trackers)

    def add(
        self, place: Position, length: int, batch: Batch, rate: float, bad: int, metrics: dict
    ) -> None:
        """Store a step that was just dispatched; `metrics` are its arrays, not yet computed."""
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
            },
        )

    def flush(self) -> dict | None:
        """Fetch and write the numbers of the stored step. Return its row, or None without one."""
        if self.pending is None:
            return None
        metrics, row = self.pending
        self.pending = None
        self.row = row | {name: float(x) for name, x in jax.device_get(metrics).items()}
        self.row["seconds"] = round(self.progress.window[-1][0], 4) if self.progress.window else 0.0
        if self.main:
            self.writer.write(self.row)
        return self.row

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
            f"  grad {self.row['grad_norm']:.3f}  bucket {self.row['bucket']}",
            stage_left,
            stage_left + sum(self._tokens(s) * s.steps for s in later),
        )

    def close(self, step: int, programs: int, encode_programs: int) -> None:
        """Write the last row of metrics and `summary.json`."""
        self.flush()
        if not self.main:
            return
        self.writer.close()
        seconds = now() - self.began
        summary = {
            "steps": step,
            "seconds": seconds,
            "compiled_train_programs": programs,
            "compiled_encode_programs": encode_programs,
        }
        (Path(self.config.run) / "summary.json").write_text(json.dumps(summary, indent=1))
        logger.info("%d steps in %s, %d train programs", step, clock(seconds), programs)

    def _tokens(self, stage: Stage) -> int:
        return stage.batch_size * self.config.set(stage.data).budget.lengths[-1]
