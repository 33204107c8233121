"""Kill, restart and flip bits many times: does every run end like the run without faults?

    python benchmarks/reliability/chaos.py kills [--minutes 60] [--goal 1000]
    python benchmarks/reliability/chaos.py elastic [--minutes 30] [--goal 50]
    python benchmarks/reliability/chaos.py flips [--minutes 10] [--goal 10000]

`kills` trains a tiny schedule on two and four processes in turn. It kills one process or all of
them at random times: during start, steps, or the writing or deletion of checkpoints. A finished run
is compared with an undisturbed one: the bits of the last checkpoint, the loss of each step, and the
records of each batch. `elastic` stops a run repeatedly and resumes it with other numbers of
processes and devices. `flips` changes one bit of a checkpoint at a time. All three write a report
to benchmarks/reliability/results and keep what they counted beside it, so a call continues the
committed count, also in a fresh checkout. The runs themselves are in runs/chaos.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
from tiny import (
    FOLDER,
    RESULTS,
    SAVE_EVERY,
    STEPS,
    beats,
    fingerprints,
    losses,
    reference,
    samples_not_as_planned,
    stepping,
    supervise,
    write_latents,
    write_results,
)

EARLY = 0.25  # share of the kills during the start of the ranks
ALL = 0.2  # share of the kills that hit all ranks at once


class Log:
    """A list of dicts in a committed file, one a line.

    A row of `what` "earlier" sums up calls of which only the report is left.
    """

    def __init__(self, name: str):
        FOLDER.mkdir(parents=True, exist_ok=True)
        if not (FOLDER / "latents" / "empty.safetensors").is_file():
            write_latents()
        self.file = RESULTS / f"{name}.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows = [json.loads(line) for line in lines]

    def write(self) -> None:
        new = self.file.with_suffix(".tmp")
        new.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))
        new.replace(self.file)

    def add(self, **row) -> dict:
        self.rows.append(row)
        self.write()
        return row

    def of(self, what: str) -> list[dict]:
        return [row for row in self.rows if row["what"] == what]

    def earlier(self, name: str) -> int:
        """Return a count of the rows that are not left."""
        return sum(row["counts"].get(name, 0) for row in self.of("earlier"))


def count_kills(log: Log) -> int:
    return log.earlier("kills") + len(log.of("kill"))


def count_restarts(log: Log) -> int:
    return log.earlier("restarts") + len(log.of("restart"))


def kills(minutes: float, goal: int) -> None:
    log, deadline = Log("kills"), time.monotonic() + 60 * minutes
    while count_kills(log) < goal and time.monotonic() < deadline:
        ranks = (2, 4)[len(log.of("end")) % 2]  # 3 does not divide the model's width
        run, undisturbed = f"killed{ranks}", reference(f"whole{ranks}", ranks)
        process = supervise(run, ranks)
        strike(process, run, ranks, log, goal, deadline)
        if process.wait() != 0:
            raise SystemExit(f"the supervisor gave up; see {FOLDER / run}.log")
        end = log.add(
            what="end",
            ranks=ranks,
            same_bits=fingerprints(run) == fingerprints(undisturbed),
            same_losses=losses(run) == losses(undisturbed),
            other_samples=samples_not_as_planned(run),
            set_aside=len(list((FOLDER / run / "checkpoints").glob("*.corrupt*"))),
        )
        report_kills(log)
        if not (end["same_bits"] and end["same_losses"]) or end["other_samples"]:
            raise SystemExit(f"{FOLDER / run} did not end as {FOLDER / undisturbed}: {end}")
        shutil.rmtree(FOLDER / run)


def strike(process, run: str, ranks: int, log: Log, goal: int, deadline: float) -> None:
    """Kill ranks of a run until it ends, or until the time is over."""
    furthest, last, start, pids = -1, None, 20.0, set()
    while pids := await_ranks(process, ranks, pids):
        early = random.random() < EARLY and not (last and last["early"])
        if early:
            time.sleep(random.uniform(0, start))
        else:
            recovered = await_steps(process, run, ranks, furthest)
            if last and recovered:
                last["recovery"] = round(recovered - last["killed"], 2)
                start = last["recovery"]
                log.write()
            time.sleep(random.uniform(0, 6))
        if count_kills(log) >= goal or time.monotonic() > deadline:
            return
        now = beats(run, ranks)
        victims = pids if random.random() < ALL else {random.choice(sorted(pids))}
        load = round(os.getloadavg()[0], 1)
        seen = {"doing": doing(run, now), "load": load, "victims": len(victims)}
        if process.poll() is not None or not kill(victims):
            continue  # the run has just ended
        killed = round(time.time(), 2)
        last = log.add(what="kill", killed=killed, early=early, ranks=ranks, **seen)
        furthest = max([furthest, *(beat["step"] for beat in now)])


def kill(pids: set[int]) -> bool:
    """Send SIGKILL to all; return False if one has already ended."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def await_ranks(process: subprocess.Popen, ranks: int, before: set[int]) -> set[int]:
    """Return the process ids of the ranks once all are new; empty if the supervisor has ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        try:
            now = set(map(int, children.read_text().split()))
        except OSError:
            continue
        if len(now) == ranks and not now & before:
            return now
        time.sleep(0.05)
    return set()


def await_steps(process: subprocess.Popen, run: str, ranks: int, furthest: int) -> float | None:
    """Wait until a step after `furthest`; return the time when all ranks began to run steps.

    The wait also ends if the supervisor ends: it gives up after three restarts in a row that do
    not get further. Return None if the ranks never ran steps.
    """
    recovered = None
    while process.poll() is None:
        now = beats(run, ranks)
        if stepping(now):
            recovered = recovered or time.time()
            if max(beat["step"] for beat in now) > furthest:
                break
        time.sleep(0.05)
    return recovered


def doing(run: str, now: list[dict]) -> str:
    """Return the current activity of a run."""
    folder = FOLDER / run / "checkpoints"
    if any(folder.glob("*.deleting")):
        return "deleting a checkpoint"
    if any(folder.glob("*.orbax-checkpoint-tmp*")):
        return "writing a checkpoint"
    return "stepping" if stepping(now) else "starting"


def report_kills(log: Log) -> None:
    done, ends = log.of("kill"), log.of("end")
    times = sorted(kill["recovery"] for kill in done if "recovery" in kill)
    if not times:
        return
    days = Counter({row["day"]: row["counts"]["kills"] for row in log.of("earlier")})
    days.update(str(date.fromtimestamp(kill["killed"])) for kill in done)
    counts = Counter()
    for row in log.of("earlier"):
        counts.update(row["counts"])
    counts.update(kill["doing"] for kill in done)
    counts.update(f"processes {kill['ranks']}" for kill in done)
    counts["at once"] += sum(kill["victims"] > 1 for kill in done)
    counts["ends"] += len(ends)
    for name in ("same_bits", "same_losses", "set_aside"):
        counts[name] += sum(end[name] for end in ends)
    counts["other_samples"] += sum(end["other_samples"] > 0 for end in ends)
    phases = ("stepping", "writing a checkpoint", "starting", "deleting a checkpoint")
    lines = [
        f"SIGKILLs at random times: {count_kills(log)} of 1,000; of one rank, or of all at once in "
        f"{counts['at once']}",
        f"by day: {', '.join(f'{day} {n}' for day, n in sorted(days.items()))}",
        f"processes of the run: 2 in {counts['processes 2']}, 4 in {counts['processes 4']}",
        f"while it was {', '.join(f'{name} {counts[name]}' for name in phases)}",
        f"runs of {STEPS} steps, a checkpoint every {SAVE_EVERY}, that came to their end: "
        f"{counts['ends']}; with the bits of the run without faults {counts['same_bits']}, with "
        f"the same loss in every step {counts['same_losses']}, with samples lost or repeated "
        f"{counts['other_samples']}",
        f"checkpoints that had to be set aside: {counts['set_aside']}",
        f"seconds from the kill until all ranks made steps again: median "
        f"{statistics.median(times):.1f}, p95 {times[int(0.95 * (len(times) - 1))]:.1f}, largest "
        f"{times[-1]:.1f}, in {len(times)} kills that no other followed before; load average "
        f"{statistics.median(kill['load'] for kill in done):.0f} (median)",
        *(f"the same of {row['day']}: {row['recovery']}" for row in log.of("earlier")),
        "people who had to do something: 0",
    ]
    write_results("kills", "python benchmarks/reliability/chaos.py kills", lines)


def elastic(minutes: float, goal: int) -> None:
    log, deadline = Log("elastic"), time.monotonic() + 60 * minutes
    run, fixed = "walk", reference("fixed", 1, data="mixed")
    while count_restarts(log) < goal and time.monotonic() < deadline:
        ranks, devices = other_shape(log.of("restart"))
        code = go_a_little(run, ranks, devices)
        if code == 42:
            log.add(what="restart", ranks=ranks, devices=devices)
        elif code != 0:
            raise SystemExit(f"exit code {code}; see {FOLDER / run}.log")
        else:
            compare(run, fixed, log)
        report_elastic(log)
    if (FOLDER / run).is_dir():  # finish it on its first mesh
        if supervise(run, 1, data="mixed").wait() != 0:
            raise SystemExit(f"see {FOLDER / run}.log")
        compare(run, fixed, log)
        report_elastic(log)


def other_shape(done: list[dict]) -> tuple[int, int]:
    """Return (processes, devices per process): each shape once, then fewer large, slow ones."""
    shapes = list(itertools.product((1, 2, 4), (1, 2, 4, 8)))
    seen = {(row["ranks"], row["devices"]) for row in done}
    new = [shape for shape in shapes if shape not in seen]
    weights = [1 / (ranks * devices) for ranks, devices in shapes]
    return random.choice(new) if new else random.choices(shapes, weights)[0]


def go_a_little(run: str, ranks: int, devices: int) -> int:
    """Run some steps, then send SIGTERM; return the exit code: 42, or 0 if the run has ended."""
    process, first, more = supervise(run, ranks, devices, "mixed"), None, random.randint(2, 7)
    while process.poll() is None:
        now = beats(run, ranks)
        if stepping(now):
            step = min(beat["step"] for beat in now)
            first = step if first is None else first
            if step >= first + more:
                process.send_signal(signal.SIGTERM)
                break
        time.sleep(0.05)
    return process.wait()


def compare(run: str, fixed: str, log: Log) -> None:
    pairs = zip(losses(run), losses(fixed), strict=True)
    worst = max(abs(a / b - 1) for (a, _), (b, _) in pairs)
    end = log.add(what="end", worst=worst, other_samples=samples_not_as_planned(run))
    if worst > 1e-4 or end["other_samples"]:
        raise SystemExit(f"{FOLDER / run} did not end as {FOLDER / fixed}: {end}")
    shutil.rmtree(FOLDER / run)


def report_elastic(log: Log) -> None:
    done, ends = log.of("restart"), log.of("end")
    shapes = {(row["ranks"], row["devices"]) for row in done}
    changes = log.earlier("changes") + sum(
        (a["ranks"], a["devices"]) != (b["ranks"], b["devices"])
        for a, b in itertools.pairwise(done)
    )
    shown = max([len(shapes), *(row["counts"]["shapes"] for row in log.of("earlier"))])
    worst = max([end["worst"] for end in [*ends, *log.of("earlier")]], default=float("nan"))
    lines = [
        f"stops by SIGTERM after a few steps, and starts elsewhere: {count_restarts(log)} of 50; "
        f"{changes} with another number of processes or devices",
        f"of the twelve of {{1, 2, 4}} processes x {{1, 2, 4, 8}} devices each: {shown}",
        f"runs of {STEPS} steps in buckets of 16 and 32 tokens that came to their end: "
        f"{log.earlier('ends') + len(ends)}; with samples lost or repeated "
        f"{log.earlier('other_samples') + sum(e['other_samples'] > 0 for e in ends)}",
        f"largest relative difference of a step's loss from the run on one device: {worst:.1e}",
    ]
    write_results("elastic", "python benchmarks/reliability/chaos.py elastic", lines)


def flips(minutes: float, goal: int) -> None:
    """Flip one bit at a time, in checkpoints of three layouts with three dtypes."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    from easyanimate_jax.training.checkpoint import damage

    rng = np.random.default_rng(time.time_ns() % 2**32)
    saved = save_layouts(rng)
    file = RESULTS / "flips.json"
    counts = json.loads(file.read_text()) if file.is_file() else {}
    counts = {"flips": 0, "detected": 0, "harmless": 0, "silent": 0} | counts
    deadline = time.monotonic() + 60 * minutes
    while counts["flips"] < goal and time.monotonic() < deadline:
        path, truth = saved[counts["flips"] % len(saved)]
        with one_bit_flipped(path, rng):
            if damage(path):
                counts["detected"] += 1
            else:
                counts["harmless" if reads_as(path, truth) else "silent"] += 1
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


def save_layouts(rng: np.random.Generator) -> list[tuple[Path, dict[str, np.ndarray]]]:
    """Return one checkpoint of each layout, with the values that it holds."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from easyanimate_jax.sharding import MeshConfig, make_mesh
    from easyanimate_jax.training.checkpoint import Checkpoints
    from easyanimate_jax.training.step import TrainState

    FOLDER.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(MeshConfig(1, 2, 1, 2))
    values, saved = rng.standard_normal((64, 64)), []
    for name, spec in {"whole": (), "rows": ("fsdp",), "tiles": ("fsdp", "tensor")}.items():
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
        saved.append((FOLDER / name / "1", {k: np.asarray(v) for k, v in model.items()}))
    return saved


@contextmanager
def one_bit_flipped(folder: Path, rng: np.random.Generator) -> Iterator[None]:
    """Flip a random bit of a random file; restore the file at the end."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    sizes = np.array([p.stat().st_size for p in files], float)
    victim = files[rng.choice(len(files), p=sizes / sizes.sum())]
    before = victim.read_bytes()
    data = bytearray(before)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    victim.write_bytes(data)
    yield
    victim.write_bytes(before)


def reads_as(checkpoint: Path, truth: dict[str, np.ndarray]) -> bool:
    """Return True if a checkpoint's weights and their average still have these values."""
    from easyanimate_jax.weights import orbax_item

    return all(
        np.array_equal(orbax_item.tensor(checkpoint / "ema", name).read(), value)
        and np.array_equal(orbax_item.tensor(checkpoint / "state", f"model.{name}").read(), value)
        for name, value in truth.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kills", "elastic", "flips"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--goal", type=int)
    a = parser.parse_args()
    run, goal = {"kills": (kills, 1000), "elastic": (elastic, 50), "flips": (flips, 10_000)}[a.what]
    run(a.minutes, a.goal or goal)


if __name__ == "__main__":
    main()
