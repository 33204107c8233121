"""The loss on held-out clips while a run trains, with the same noise, times and captions each time.

    RUN/validation.jsonl   a line for each validation, and each of trained and averaged weights

A clip's noise, caption, mask and control follow from its name, so that the loss depends on neither
the mesh, the batch, the step nor a resume, and changes only with the weights.
"""

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from easyanimate_jax.data.loader import Loader
from easyanimate_jax.runs.batches import place
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.storage.whole import replace_text
from easyanimate_jax.training.metrics import MetricsWriter, now
from easyanimate_jax.training.program import graph_of
from easyanimate_jax.training.saving import same_for_all
from easyanimate_jax.training.stages import Stage
from easyanimate_jax.training.step import TrainState, row_losses, whole

logger = logging.getLogger(__name__)


class Validator:
    """Computes the loss on the held-out clips of a stage, with its loader and on its mesh.

    Without loaders it does nothing.
    """

    def __init__(self, config: TrainConfig, meshes: Mapping[str, Mesh], loaders: dict[str, Loader]):
        self.config, self.meshes, self.loaders = config, meshes, loaders
        self.programs = {}  # (mesh, number of input channels) -> jitted function
        self.path = config.folder / "validation.jsonl"
        self.done: set[tuple[int, str]] = set()  # (updates made, stage) of the file's lines
        self.writer: MetricsWriter | None = None

    def open(self, step: int, writer: MetricsWriter | None) -> None:
        """Drop the lines after `step` updates, which a resumed run makes again.

        `writer` is that of the run's metrics; it is None in all processes but the first, which
        write nothing.
        """
        self.writer, lines = writer, []
        if writer is not None and self.path.is_file():
            lines = self.path.read_text().splitlines()
            lines = [line for line in lines if _is_row(line) and json.loads(line)["step"] <= step]
            replace_text(self.path, "".join(line + "\n" for line in lines))
        self.done = {(row["step"], row["stage"]) for row in map(json.loads, lines)}

    def due(self, stage: Stage, made: int, *, border: bool) -> bool:
        """Return whether to validate after `made` updates, at a `border` of the stage or between.

        A validation that the file already has is not made again.
        """
        every = self.config.validation.every
        if not self.loaders or not every or not (border or made % every == 0):
            return False
        return bool(same_for_all((made, stage.name) not in self.done))

    def __call__(self, stage: Stage, state: TrainState, made: int) -> None:
        """Write and log the losses of a state after `made` updates."""
        began, loader = now(), self.loaders[stage.name]
        weights = {"trained": state.model}
        if state.ema is not None:
            weights["averaged"] = state.ema
        program = self._program(stage)
        programs = {name: partial(program, part, state.frozen) for name, part in weights.items()}
        with jax.set_mesh(self.meshes[stage.name]):
            losses, lengths = losses_of(loader, self.meshes[stage.name], programs)
        about = {"step": made, "stage": stage.name, "task": stage.task}
        rows = [
            about | {"weights": name} | summary(found, lengths) for name, found in losses.items()
        ]
        self.done.add((made, stage.name))
        if self.writer is not None:
            seconds = round(now() - began, 3)
            text = "".join(json.dumps(row | {"seconds": seconds}) + "\n" for row in rows)
            try:
                with self.path.open("a") as file:
                    file.write(text)
            except OSError as error:  # a full disk costs the lines, not the run
                logger.warning("the validation of step %d was not written: %s", made, error)
            for row in rows:
                self._show(row)

    def _program(self, stage: Stage):
        mesh = self.meshes[stage.name]
        key = mesh, stage.in_channels
        if key not in self.programs:
            config = self.config.step.with_channels(stage.in_channels)
            graph = graph_of(config) if config.partial else None
            self.programs[key] = loss_program(self.config, mesh, graph)
        return self.programs[key]

    def _show(self, row: dict) -> None:
        name, made = f"validation {row['weights']}", row["step"]
        numbers = {f"{name}/loss": row["loss"]}
        for number, value in enumerate(row["by_time"]):
            numbers[f"{name}/time {(number + 0.5) / len(row['by_time']):.2f}"] = value
        numbers |= {f"{name}/{n} tokens": value for n, value in row["by_length"].items()}
        self.writer.numbers(made, numbers)
        logger.info(
            "validation at step %d (stage %r): loss %.5f of the %s weights on %d held-out clips",
            made,
            row["stage"],
            row["loss"],
            row["weights"],
            row["clips"],
        )


def _is_row(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except ValueError:  # cut short by a kill
        return False


def losses_of(
    loader: Loader, mesh: Mesh, programs: Mapping[str, Callable]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the losses (times, clips) of the clips of a loader, and the token length of each.

    Each program is called with the arrays of a batch and the keys of its rows.
    """
    losses, lengths = {name: [] for name in programs}, []
    for number in range(len(loader.plan)):
        length, batch = loader.batch(number)
        ids = loader.plan(number)[1].tolist()
        keys = np.zeros(batch.weight.size, np.uint32)
        keys[: len(ids)] = [loader.plan.keys[i] for i in ids]
        arrays = place(batch, mesh)
        lengths += [length] * len(ids)
        for name, program in programs.items():
            losses[name].append(np.asarray(program(arrays, keys))[:, : len(ids)])
    joined = {name: np.concatenate(parts, axis=1) for name, parts in losses.items()}
    return joined, np.array(lengths)


def summary(losses: Float[np.ndarray, "_times _clips"], lengths: Int[np.ndarray, "_clips"]) -> dict:
    """Return the mean of the losses, its standard error, and the means by time and by length."""
    clips = losses.mean(axis=0)
    return {
        "clips": len(clips),
        "loss": float(clips.mean()),
        "error": float(clips.std() / max(1, len(clips) - 1) ** 0.5),
        "by_time": [float(x) for x in losses.mean(axis=1)],
        "by_length": {str(n): float(clips[lengths == n].mean()) for n in np.unique(lengths)},
    }


def loss_program(config: TrainConfig, mesh: Mesh, graph=None) -> Callable:
    """Return the compiled `validation_losses` of a config's process, times and seed."""
    return jax.jit(
        partial(
            validation_losses,
            graph=graph,
            process=config.process,
            times=config.validation.times,
            key=jax.random.key(config.validation.seed),
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def validation_losses(weights, frozen, batch, keys, *, graph, process, times: int, key):
    """Return the losses of the rows of a batch, (times, rows), at fixed times and noise.

    The times are those below which (k + 1/2) / `times` of the training times lie.
    """
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # one microbatch

    def at(number):
        u = (number + 0.5) / times
        time = process.time_of(jnp.full(keys.shape, u), batch.lengths)
        noise = jax.random.fold_in(key, number)
        model = whole(graph, weights, frozen)
        return row_losses(model, batch, time, keys, noise, process=process)

    return jax.lax.map(at, jnp.arange(times))
