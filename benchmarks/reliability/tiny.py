"""The tiny run of the long reliability tests: its data, its config, and comparisons of runs."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]  # for configs/ and tests/fast_compiles.py
from fast_compiles import FAST_COMPILES  # noqa: E402

FOLDER = ROOT / "runs" / "chaos"
RESULTS = Path(__file__).parent / "results"
LENGTHS = {"image": (48,), "mixed": (16, 32)}  # tokens
RECORDS = 64
STEPS, SAVE_EVERY = 120, 5
CONFIG = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.runs.config import SampleConfig
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.training.stages import Stage

config = replace(
    demo,
    prepared="{folder}/latents",
    run="{folder}/{run}",
    sets=(LatentSet("{data}", Budget({lengths}[-1], {lengths}, (64,), 1)),),
    stages=(Stage("only", "{data}", batch_size=4, steps={steps}, learning_rate=1e-3, warmup=1),),
    model=replace(demo.model, depth=1, mmdit_depth=1, heads=2, head_width=16, text_widths=(8, 12)),
    optimizer=replace(demo.optimizer, matrices="adam"),  # it compiles faster
    samples=SampleConfig(),
    save_every={save_every},
    log_every=100,
)
"""


def write_latents() -> None:
    """Write random prepared latents; the first token of a record holds its number."""
    from easyanimate_jax.data.index import INDEX_TYPES
    from easyanimate_jax.data.records import write_set, write_texts

    rng = np.random.default_rng(0)
    for name, lengths in LENGTHS.items():
        records, rows = [], []
        for number in range(RECORDS):
            tokens = lengths[number % len(lengths)]
            draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
            mean = draw(tokens, 64)
            mean[0, 0] = number / RECORDS
            texts = {"text0": draw(2, 4, 8), "text1": draw(2, 3, 12)}
            records.append({"mean": mean, "logvar": draw(tokens, 64) - 4} | texts)
            values = (f"{number}", "image", 1, 64, 16 * tokens // 4, 1, 4, tokens // 4, tokens)
            row = dict(zip(INDEX_TYPES, (*values, 512, 512, 2, ""), strict=True))
            rows.append(row)
        write_set(FOLDER / "latents" / name, {"set": {"condition_draws": 0}}, records, rows)
    empty = (np.zeros((1, 4, 8)), np.zeros((1, 3, 12)))
    write_texts(FOLDER / "latents" / "empty.safetensors", empty)


def supervise(run: str, ranks: int, devices: int = 1, data: str = "image") -> subprocess.Popen:
    """Start a run under the supervisor on CPUs, with `devices` devices per rank."""
    config = FOLDER / f"{run}.py"
    settings = {"folder": FOLDER, "run": run, "steps": STEPS, "save_every": SAVE_EVERY}
    config.write_text(CONFIG.format(**settings, data=data, lengths=LENGTHS[data]))
    words = [sys.executable, "-m", "easyanimate_jax", "supervise", "--ranks", str(ranks)]
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILES}"
    return subprocess.Popen(
        [*words, "--", sys.executable, str(Path(__file__).parent / "rank.py"), str(config)],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(ROOT),
            "EASYANIMATE_HEARTBEATS": str(FOLDER / f"heartbeats-{run}"),
            "JAX_COMPILATION_CACHE_DIR": str(FOLDER / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=(FOLDER / f"{run}.log").open("a"),
        stderr=subprocess.STDOUT,
    )


def finished(run: str) -> bool:
    return (FOLDER / run / "checkpoints" / str(STEPS) / "meta" / "metadata").is_file()


def reference(run: str, ranks: int, data: str = "image") -> str:
    """Return the name of an undisturbed run; train it once."""
    if not finished(run) and supervise(run, ranks, data=data).wait() != 0:
        raise SystemExit(f"the run without faults failed; see {FOLDER / run}.log")
    return run


def beats(run: str, ranks: int) -> list[dict]:
    """Return the heartbeats of all ranks, or an empty list if one is missing."""
    try:
        files = [FOLDER / f"heartbeats-{run}" / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]
    except (OSError, ValueError):
        return []


def stepping(now: list[dict]) -> bool:
    """Return True if all ranks have passed their start."""
    return bool(now) and all(beat["section"] in ("step", "rework", "data", "save") for beat in now)


def fingerprints(run: str) -> dict:
    """Return the fingerprints of the last checkpoint, after a check of its files."""
    from easyanimate_jax.training.checkpoint import damage
    from easyanimate_jax.weights.run_folder import read_step_meta

    path = FOLDER / run / "checkpoints" / str(STEPS)
    wrong = damage(path)
    if wrong:
        raise SystemExit(f"{path}: {wrong}")
    return read_step_meta(path)["arrays"]


def losses(run: str) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of each step. Exit if a step is missing or repeated."""
    lines = (FOLDER / run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if [row["step"] for row in rows] != list(range(STEPS)):
        raise SystemExit(f"{FOLDER / run}: steps are missing or repeated in metrics.jsonl")
    return [(row["loss"], row["grad_norm"]) for row in rows]


def samples_not_as_planned(run: str) -> int:
    """Return the number of steps whose records differ from the plan's, are lost or are repeated.

    Only the last run of each step counts: a kill discards the earlier ones.
    """
    from easyanimate_jax.data.plan.plan import Plan
    from easyanimate_jax.data.records import Records
    from easyanimate_jax.runs.config import load

    made = {}  # step -> {start: (time, length, {row: record})}
    for file in (FOLDER / run).glob("used-*.jsonl"):
        for line in filter(None, file.read_text().splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            of_step = made.setdefault(entry["step"], {})
            before, _, rows = of_step.get(entry["start"], (0.0, 0, {}))
            rows |= {int(row): record for row, record in entry["records"].items()}
            of_step[entry["start"]] = max(before, entry["time"]), entry["length"], rows
    config = load(str(FOLDER / f"{run}.py"))
    (stage,) = config.stages
    plan = Plan(
        Records(Path(config.prepared) / stage.data).index,
        lengths=config.set(stage.data).budget.lengths,
        batch_size=stage.batch_size,
        seed=config.seed,
        name=stage.name,
    )
    wrong, seen = 0, {length: [] for length in plan.lengths}
    for step in range(STEPS):
        _, length, rows = max(made[step].values(), key=lambda found: found[0])
        records = [rows.get(row) for row in range(stage.batch_size)]
        wrong += (length, records) != (plan(step)[0], plan(step)[1].tolist())
        seen[length] += records
    for numbers in seen.values():  # a whole epoch holds each record of the bucket once
        size = RECORDS // len(seen)
        epochs = [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]
        wrong += sum(len(set(epoch)) < size for epoch in epochs)
    return wrong


def write_results(name: str, command: str, lines: list[str]) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    head = [
        f"# {name}\n",
        f"{date.today()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.machine()}; "
        f"`{command}`\n",
    ]
    text = "\n".join([*head, *(f"* {line}" for line in lines)]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
