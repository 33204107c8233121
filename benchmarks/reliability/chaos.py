"""Kills and bit flips in numbers: does every run end in the bits of a run without faults?

    python benchmarks/reliability/chaos.py kills [--minutes 60] [--ranks 2] [--goal 1000]
    python benchmarks/reliability/chaos.py flips [--minutes 10] [--goal 10000]

`kills` trains a tiny schedule under the supervisor and kills a random rank at random times with
SIGKILL; when a run is through, its last checkpoint is compared with that of a run nobody disturbed,
and the next run begins. `flips` changes one bit of a checkpoint at a time. Both add to what is in
runs/chaos, so calls can be repeated until the goal is reached, and write the results here.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "runs" / "chaos"
RESULTS = Path(__file__).parent / "results"
STEPS = 400
CONFIG = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.config import SampleConfig

config = replace(
    demo,
    prepared="{folder}/latents",
    run="{folder}/{run}",
    stages=(replace(demo.stages[0], steps={steps}, batch_size=4),),
    model=replace(demo.model, depth=1, mmdit_depth=1, heads=2, head_width=16, text_widths=(8, 12)),
    samples=SampleConfig(),
    save_every=10,
    log_every=100,
)
"""


def write_latents() -> None:
    """Random numbers in the form of the demo's image set."""
    from easyanimate_jax.data.records import INDEX_TYPES, Writer, write_texts

    rng = np.random.default_rng(0)
    records, rows = [], []
    for clip in range(64):
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
        records.append(
            {
                "mean": draw(48, 64),
                "logvar": draw(48, 64) - 4,
                "text0": draw(2, 4, 8),
                "text1": draw(2, 3, 12),
            }
        )
        values = (f"{clip}.png", "image", 1, 96, 128, 1, 6, 8, 48, 512, 512, 2, "")
        rows.append(dict(zip(INDEX_TYPES, values, strict=True)))
    writer = Writer(FOLDER / "latents" / "image", {"set": {"condition_draws": 0}})
    writer.write(0, records, rows)
    writer.finish(1)
    empty = (np.zeros((1, 4, 8)), np.zeros((1, 3, 12)))
    write_texts(FOLDER / "latents" / "empty.safetensors", empty)


def supervise(run: str, ranks: int) -> subprocess.Popen:
    """A run under the supervisor, on CPUs, one device a rank."""
    config = FOLDER / f"{run}.py"
    config.write_text(CONFIG.format(folder=FOLDER, run=run, steps=STEPS))
    words = [sys.executable, "-m", "easyanimate_jax.training.supervisor", "--ranks", str(ranks)]
    return subprocess.Popen(
        [*words, "--", sys.executable, "train.py", str(config)],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "EASYANIMATE_HEARTBEATS": str(FOLDER / "heartbeats"),
            "JAX_COMPILATION_CACHE_DIR": str(FOLDER / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=(FOLDER / f"{run}.log").open("a"),
        stderr=subprocess.STDOUT,
    )


def prints(run: str) -> dict:
    from easyanimate_jax.training.checkpoint import damage, read_step_meta

    path = FOLDER / run / "checkpoints" / str(STEPS)
    wrong = damage(path)
    if wrong:
        raise SystemExit(f"{path}: {wrong}")
    return read_step_meta(path)["arrays"]


def beats(ranks: int) -> list[dict]:
    """The heartbeats of all ranks, or none if one is missing."""
    try:
        files = [FOLDER / "heartbeats" / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]
    except (OSError, ValueError):
        return []


def kills(minutes: float, ranks: int, goal: int) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "latents" / "empty.safetensors").is_file():
        write_latents()
    reference = f"reference{ranks}"
    if supervise(reference, ranks).wait() != 0:
        raise SystemExit(f"the run without faults failed; see {FOLDER / reference}.log")
    expected = prints(reference)
    file = FOLDER / "kills.json"
    done = json.loads(file.read_text()) if file.is_file() else []
    deadline = time.monotonic() + 60 * minutes
    while len(done) < goal and time.monotonic() < deadline:
        run = f"run{ranks}"
        process = supervise(run, ranks)
        while process.poll() is None:
            recovered = wait_for_steps(process, ranks)
            if recovered is None:
                break
            if done and done[-1].get("recovery") is None and "killed" in done[-1]:
                done[-1]["recovery"] = round(recovered - done[-1]["killed"], 2)
                file.write_text(json.dumps(done))
            if len(done) >= goal or time.monotonic() > deadline:
                continue  # let it come to its end
            time.sleep(random.uniform(0, 10))
            now = beats(ranks)
            if process.poll() is None and now:
                victim = random.randrange(ranks)
                try:
                    os.kill(now[victim]["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    continue
                done.append(
                    {
                        "killed": time.time(),
                        "rank": victim,
                        "step": now[victim]["step"],
                        "section": now[victim]["section"],
                        "ranks": ranks,
                    }
                )
                file.write_text(json.dumps(done))
                while any(b.get("pid") == now[victim]["pid"] for b in beats(ranks)):
                    time.sleep(0.1)
        code = process.wait()
        if code != 0:
            raise SystemExit(f"the supervisor gave up with code {code}; see {FOLDER / run}.log")
        same = prints(run) == expected
        corrupt = len(list((FOLDER / run / "checkpoints").glob("*.corrupt*")))
        done[-1]["ended"] = {"same_bits": same, "corrupt": corrupt}
        done[-1].setdefault("recovery", None)
        file.write_text(json.dumps(done))
        if not same:
            raise SystemExit(f"{FOLDER / run} ended in other bits than {FOLDER / reference}")
        shutil.rmtree(FOLDER / run)
        report_kills(done)
    report_kills(done)


def wait_for_steps(process: subprocess.Popen, ranks: int) -> float | None:
    """The time at which all ranks make steps; None if the run ended before."""
    while process.poll() is None:
        now = beats(ranks)
        if now and all(beat["section"] in ("step", "rework") for beat in now):
            return time.time()
        time.sleep(0.05)
    return None


def report_kills(done: list[dict]) -> None:
    times = sorted(k["recovery"] for k in done if k.get("recovery"))
    ends = [k["ended"] for k in done if "ended" in k]
    p95 = times[int(0.95 * (len(times) - 1))] if times else float("nan")
    lines = [
        f"kills: {len(done)} of 1,000 (SIGKILL of a random rank at a random time, "
        f"{STEPS} steps a run, checkpoint every 10)",
        f"runs that came to their end: {len(ends)}, with the bits of the run without faults: "
        f"{sum(e['same_bits'] for e in ends)}",
        f"checkpoints that had to be set aside: {sum(e['corrupt'] for e in ends)}",
        f"seconds from the kill to the next step of all ranks: median "
        f"{times[len(times) // 2] if times else float('nan'):.1f}, p95 {p95:.1f}, "
        f"largest {times[-1] if times else float('nan'):.1f}",
        "people who had to do something: 0",
    ]
    write_results("kills", "python benchmarks/reliability/chaos.py kills", lines)


def flips(minutes: float, goal: int) -> None:
    """One bit at a time, in checkpoints of three layouts with three types of numbers."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from easyanimate_jax.sharding import MeshConfig, make_mesh
    from easyanimate_jax.tensors import orbax_item
    from easyanimate_jax.training.checkpoint import Checkpoints, damage
    from easyanimate_jax.training.step import TrainState

    rng = np.random.default_rng(time.time_ns() % 2**32)
    FOLDER.mkdir(parents=True, exist_ok=True)
    layouts = {"whole": (), "rows": ("fsdp",), "tiles": ("fsdp", "tensor")}
    mesh = make_mesh(MeshConfig(1, 2, 1, 2))
    values = rng.standard_normal((64, 64))
    paths, truth = {}, {}
    for name, spec in layouts.items():
        place = NamedSharding(mesh, PartitionSpec(*spec))
        model = {
            kind: jax.device_put(jnp.asarray(1000 * values, kind), place)
            for kind in ("float32", "bfloat16", "int32")
        }
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        whole = jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec()))
        checkpoints = Checkpoints(FOLDER / name, keep=2)
        checkpoints.save(1, TrainState(whole, whole, model, model, ()), {"step": 1})
        checkpoints.close(1)
        paths[name], truth[name] = FOLDER / name / "1", {k: np.asarray(v) for k, v in model.items()}

    file = FOLDER / "flips.json"
    counts = json.loads(file.read_text()) if file.is_file() else {}
    counts = {"flips": 0, "detected": 0, "harmless": 0, "silent": 0} | counts
    names = list(layouts)
    deadline = time.monotonic() + 60 * minutes
    while counts["flips"] < goal and time.monotonic() < deadline:
        layout = names[counts["flips"] % 3]
        files = [p for p in sorted(paths[layout].rglob("*")) if p.is_file() and p.stat().st_size]
        sizes = np.array([p.stat().st_size for p in files], float)
        victim = files[rng.choice(len(files), p=sizes / sizes.sum())]
        before = victim.read_bytes()
        data = bytearray(before)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        victim.write_bytes(data)
        if damage(paths[layout]):
            counts["detected"] += 1
        else:
            same = all(
                np.array_equal(orbax_item.tensor(paths[layout] / "ema", k).read(), v)
                and np.array_equal(
                    orbax_item.tensor(paths[layout] / "state", f"model.{k}").read(), v
                )
                for k, v in truth[layout].items()
            )
            counts["harmless" if same else "silent"] += 1
        victim.write_bytes(before)
        counts["flips"] += 1
        if counts["flips"] % 100 == 0:
            file.write_text(json.dumps(counts))
    file.write_text(json.dumps(counts))
    lines = [
        f"single bits flipped in the files of a checkpoint: {counts['flips']:,} of 10,000",
        f"detected: {counts['detected']:,}; harmless, in bytes that no reader uses: "
        f"{counts['harmless']:,}; **silent: {counts['silent']}**",
        "three layouts (whole, rows over 2, tiles over 2 x 2 devices), float32, bfloat16 and int32",
    ]
    write_results("flips", "python benchmarks/reliability/chaos.py flips", lines)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kills", "flips"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--goal", type=int)
    a = parser.parse_args()
    if a.what == "kills":
        kills(a.minutes, a.ranks, a.goal or 1000)
    else:
        flips(a.minutes, a.goal or 10_000)


if __name__ == "__main__":
    main()
