"""Find meshes, kept activations and microbatches with which a stage fits a pod.

An estimate orders the choices and excludes those that are far too large, so that few are compiled.
All returned choices have been compiled. They change the one stage: its mesh, its kept activations
and its microbatch.
"""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from easyanimate_jax.facts import ACTIVATIONS, BLOCK_MATRICES
from easyanimate_jax.pods.compile import suggest_mesh
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.training.auto import MATMUL_SHARE, activation_bytes
from easyanimate_jax.training.chips import Chip
from easyanimate_jax.training.compile import Change, StageReport, model_flops
from easyanimate_jax.training.stages import Stage

HOPELESS = 1.1  # choices with an estimate above this multiple of the memory are not compiled
CHANGES, TRIES = 3, 8  # changes to find, and programs to compile for them, at most
CompileChoice = Callable[[TrainConfig, Stage], StageReport]


@dataclass(frozen=True)
class Choice:
    """One way to run a stage."""

    mesh: MeshConfig
    save: tuple[str, ...]
    microbatch: int  # rows that go through the network at once

    def apply(self, stage: Stage) -> Stage:
        """Return the stage with this choice."""
        return dataclasses.replace(
            stage, mesh=self.mesh, save=self.save, microbatch=self.microbatch
        )

    def words(self) -> str:
        """Return the choice as the keywords of `dataclasses.replace` on a stage."""
        return f"mesh={self.mesh}, save={self.save}, microbatch={self.microbatch}"

    def differences(self, other: "Choice", stage_index: int) -> list[str]:
        """Return the overrides of `train.py` that change `other` to this choice."""
        words, option = [], f"--stages.{stage_index}"
        if self.mesh != other.mesh:
            for axis, size in dataclasses.asdict(self.mesh).items():
                words += [f"{option}.mesh.{axis}", str(size)]
        if self.save != other.save:
            words += [f"{option}.save", *self.save]
        if self.microbatch != other.microbatch:
            words += [f"{option}.microbatch", str(self.microbatch)]
        return words


def present(config: TrainConfig, stage: Stage, report: StageReport) -> Choice:
    """Return the choice that `report` describes; it also holds what is "auto" in the config."""
    mesh = suggest_mesh(config.mesh_of(stage), math.prod(report.mesh.values()))
    return Choice(mesh, report.save, min(report.microbatch, stage.batch_size))


def choices(config: TrainConfig, stage: Stage, num_devices: int) -> Iterator[Choice]:
    """Yield all choices: splits of the devices into `fsdp` and `context` that the heads allow.

    They keep the first n rows of `facts.ACTIVATIONS`, for each n, and split the batch into equal
    microbatches.
    """
    now = suggest_mesh(config.mesh_of(stage), num_devices)
    free = [name for name in ACTIVATIONS if name not in config.model.offload]
    inner = num_devices // (now.data * now.tensor)
    for context in (2**n for n in range(int(math.log2(inner)) + 1)):
        if inner % context or config.model.heads % context or config.model.width % context:
            continue
        mesh = MeshConfig(now.data, inner // context, context, now.tensor)
        groups = mesh.data * mesh.fsdp
        if config.model.width % mesh.fsdp or groups > stage.batch_size:
            continue
        most = -(-stage.batch_size // groups)  # rows of a group
        for rows in sorted({-(-most // parts) for parts in range(1, most + 1)}):
            for kept in range(len(free) + 1):
                yield Choice(mesh, tuple(free[:kept]), min(groups * rows, stage.batch_size))


def estimate(
    choice: Choice, config: TrainConfig, stage: Stage, tokens: int, chip: Chip
) -> tuple[float, float]:
    """Return rough (bytes per device, seconds per step), only good enough to order choices."""
    model, mesh = config.model, choice.mesh
    num_weights = 24 * model.depth * model.width**2  # text and video have their own
    groups, tensor = mesh.data * mesh.fsdp, mesh.tensor
    rows = -(-choice.microbatch // groups) * groups
    accumulate = -(-stage.batch_size // rows)
    parts = mesh.fsdp * mesh.context * tensor
    local = rows * tokens / (groups * mesh.context)  # tokens of a device in a microbatch

    value = 2 * local * model.width / tensor
    memory = 24 * num_weights / parts + 4 * num_weights / model.depth / tensor
    memory += activation_bytes(model, choice.save, local, tensor=tensor, padded=True)

    flops, share = model_flops(model, tokens, 0)
    again = BLOCK_MATRICES - sum(ACTIVATIONS[name].matrices for name in choice.save)
    linear = flops * (1 - share) * (1 + again / (3 * BLOCK_MATRICES))
    attention = flops * share * (1 if "attention" in choice.save else 4 / 3)
    done = accumulate * rows / (groups * mesh.context * tensor)  # samples of a device
    seconds = linear * done / (MATMUL_SHARE * chip.peak_flops)
    seconds += attention * done / chip.attention_backward
    sent = 6 * num_weights / tensor * accumulate  # gathered twice, summed once, in bfloat16
    sent += 0 if rows % (groups * mesh.context) == 0 else 24 * value * model.depth * accumulate
    return memory, seconds + sent / (4 * chip.link)


def ordered(
    config: TrainConfig, stage: Stage, chip: Chip, report: StageReport, *, one_change: bool
) -> list[Choice]:
    """Return the choices that may fit, the fastest first.

    With `one_change`, return only those that change one setting. The memory estimate is scaled by
    the compiler's figure for the present choice.
    """
    num_devices = math.prod(report.mesh.values())
    now = present(config, stage, report)
    tokens = report.tokens + report.text_tokens

    def rough(choice: Choice) -> tuple[float, float]:
        return estimate(choice, config, stage, tokens, chip)

    factor = (report.peak_bytes_per_chip or report.hbm_bytes) / rough(now)[0]
    found = []
    for choice in choices(config, stage, num_devices):
        changed = [getattr(choice, f.name) != getattr(now, f.name) for f in dataclasses.fields(now)]
        if sum(changed) < 1 or (one_change and sum(changed) > 1):
            continue
        if rough(choice)[0] * factor < HOPELESS * report.hbm_bytes:
            found.append(choice)
    return sorted(found, key=lambda choice: rough(choice)[1])


def _compiled(
    config: TrainConfig,
    stage: Stage,
    chip: Chip,
    report: StageReport,
    compile_choice: CompileChoice,
    *,
    one_change: bool,
) -> Iterator[tuple[Choice, StageReport]]:
    """Compile at most `TRIES` of the `ordered` choices; yield each with its report.

    A choice whose estimate is not smaller than that of a refused one is not compiled.
    """
    tokens, tries, refused = report.tokens + report.text_tokens, 0, math.inf
    for choice in ordered(config, stage, chip, report, one_change=one_change):
        needed = estimate(choice, config, stage, tokens, chip)[0]
        if needed >= refused or tries == TRIES:
            continue
        tries += 1
        found = compile_choice(config, choice.apply(stage))
        refused = refused if found.fits else needed
        yield choice, found


def changes_that_fit(
    config: TrainConfig,
    stage: Stage,
    chip: Chip,
    report: StageReport,
    compile_choice: CompileChoice,
) -> list[Change]:
    """Return at most three changes with which a stage fits, the fastest first.

    Each changes one setting; if no such change fits, several.
    """
    index = [s.name for s in config.stages].index(stage.name)
    now, fitting = present(config, stage, report), []
    for one_change in (True, False):
        tried = _compiled(config, stage, chip, report, compile_choice, one_change=one_change)
        for choice, found in itertools.islice((one for one in tried if one[1].fits), CHANGES):
            words = shlex.join(choice.differences(now, index))
            seconds = found.predicted_step_seconds
            fitting.append(Change(words, found.peak_bytes_per_chip, seconds))
        if fitting:
            break
    return sorted(fitting, key=lambda change: change.predicted_step_seconds)


def fastest(
    config: TrainConfig,
    stage: Stage,
    chip: Chip,
    report: StageReport,
    compile_choice: CompileChoice,
) -> tuple[Choice, StageReport]:
    """Return (choice, report) of the fastest choice that fits, by predicted seconds.

    It compiles the first choices of the estimate; the present choice is also compared. Raises
    ValueError if none of them fits.
    """
    tried = [
        (present(config, stage, report), report),
        *_compiled(config, stage, chip, report, compile_choice, one_change=False),
    ]
    fitting = [(choice, result) for choice, result in tried if result.fits]
    if not fitting:
        raise ValueError(
            f"stage {stage.name!r}: none of {len(tried)} ways to run it fits {report.topology}; "
            f"use more chips"
        )
    return min(fitting, key=lambda found: found[1].predicted_step_seconds)


def variant(path: str, found: Sequence[tuple[Stage, Choice, StageReport]]) -> str:
    """Return the text of a config file for `train.py`: that at `path`, with choices for stages."""
    topology = found[0][2].topology
    lines = "\n".join(_line(stage, report) for stage, _, report in found)
    ways = "\n".join(f"    {stage.name!r}: dict({way.words()})," for stage, way, _ in found)
    return f'''"""{path} for {topology}, found by `python -m easyanimate_jax aot --suggest`.

{lines}
"""

from dataclasses import replace

from easyanimate_jax.runs.config import load
from easyanimate_jax.sharding import MeshConfig

base = load({path!r})
ways = {{
{ways}
}}
config = replace(
    base, stages=tuple(replace(stage, **ways.get(stage.name, {{}})) for stage in base.stages)
)
'''


def _line(stage: Stage, report: StageReport) -> str:
    used, given = report.peak_bytes_per_chip / 1e9, report.hbm_bytes / 1e9
    memory, seconds = f"{used:.1f} of {given:.1f} GB a chip", report.predicted_step_seconds
    return f"Stage {stage.name!r}: {memory}, predicted {seconds:.1f} s a step."
