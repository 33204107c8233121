"""Feed one simulated host of a pod: how long it waits for data when every read takes 50 ms.

For each row of docs/pods.md with 128 or 512 chips: the trainer's own functions say which rows of a
microbatch a host holds. Records of their real shapes are written, a few of each set, which the plan
draws again and again. The trainer's loader reads them; only below it, in front of each read, there
is a delay, and a link that all reads of the host share. The device is a thread that sleeps: a step
takes the seconds that `aot` predicts. The main thread copies the rows that the host holds, as their
transfer to devices would, and its waits are counted as those of a run (`Progress.data_wait`). The
first step begins with an empty buffer and is not counted. Each row is measured in real time. A row
during which this process was stopped is not kept: measure it again. Figures are in
benchmarks/results/feeding.json, and names of rows as arguments measure only these. Writes
benchmarks/results/feeding.md.

    python benchmarks/feeding.py [NAME ...] [--latency 0.05] [--bandwidth 1.5e9] [--lanes 1]
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from clip_records import ROOT, write
from setting import setting
from tqdm import tqdm

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.data.loader import Batch, Loader
from easyanimate_jax.data.plan.plan import Plan
from easyanimate_jax.data.records import Records
from easyanimate_jax.diffusion.tasks import TASKS
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.storage import stores
from easyanimate_jax.training.metrics import Progress

RESULT = ROOT / "benchmarks" / "results" / "feeding.md"
CHIPS = (128, 512)
RECORDS = 4  # different records of a set
STEPS, FEWEST, SECONDS = 8, 4, 200.0  # steps that are measured; fewer if they take longer than that
STOPPED = 0.5  # seconds without running after which a process counts as stopped
LIMIT = 0.01  # share of the time that a host may wait
LARGE = 5e8  # bytes of a batch in memory from which on a row is measured alone


class Host(NamedTuple):
    """A host of a row of docs/pods.md, and what it holds of each step."""

    name: str
    config: str
    stage: str
    topology: str
    chips: int
    hosts: int
    tokens: int
    microbatch: int
    rows: tuple[int, ...]  # of a microbatch
    held: int  # rows of a step
    seconds: float  # of a step

    @property
    def steps(self) -> int:
        """Return the number of steps to measure."""
        return min(STEPS, max(FEWEST, int(SECONDS / self.seconds)))


class Stops(threading.Thread):
    """Adds up the seconds for which this process did not run at all, as when it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seconds, self.over = 0.0, threading.Event()

    def run(self) -> None:
        """Look ten times a second."""
        before = time.monotonic()
        while not self.over.wait(0.1):
            now = time.monotonic()
            self.seconds += now - before if now - before > STOPPED else 0.0
            before = now


class Link:
    """Reads of a host's store: each waits `latency` seconds, and all share `bandwidth` bytes/s."""

    def __init__(self, latency: float, bandwidth: float):
        self.latency, self.bandwidth, self.read = latency, bandwidth, stores.read_ranges
        self.lock, self.free, self.requests, self.bytes = threading.Lock(), 0.0, 0, 0

    def __call__(self, source, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        size, now = sum(end - begin for begin, end in ranges), time.monotonic()
        with self.lock:
            self.free = max(now + self.latency, self.free) + size / self.bandwidth
            ready = self.free
            self.requests, self.bytes = self.requests + 1, self.bytes + size
        time.sleep(max(0.0, ready - time.monotonic()))
        return self.read(source, ranges)


def hosts_of_pods() -> list[Host]:
    """Return the host with the most rows of each row of docs/pods.md with so many chips."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "pods"))
    import tables

    from easyanimate_jax.pods.compile import pod_mesh
    from easyanimate_jax.runs.batches import held_rows

    found = []
    for name, (path, topology, stage_name, overrides) in tables.RUNS.items():
        figures = tables.read(name)
        report = figures["stages"][0] if figures else {}
        if report.get("chips") not in CHIPS:
            continue
        config = load_config(path, overrides)
        stage = next(s for s in config.stages if s.name == stage_name)
        stage = dataclasses.replace(stage, microbatch=report["microbatch"])
        mesh, _ = pod_mesh(config, stage, topology)
        hosts = sorted({device.process_index for device in mesh.devices.flat})
        rows = max((held_rows(stage, mesh, host) for host in hosts), key=len)
        found.append(
            Host(
                **{"name": name, "config": path, "stage": stage_name, "topology": topology},
                chips=report["chips"],
                hosts=len(hosts),
                tokens=report["tokens"],
                microbatch=report["microbatch"],
                rows=tuple(sorted(rows)),
                held=len(own(stage.batch_size, report["microbatch"], rows)),
                seconds=report["predicted_step_seconds"],
            )
        )
    return found


def own(batch: int, microbatch: int, rows: Sequence[int]) -> list[int]:
    """Return the rows of a batch that a host holds."""
    return [row for row in range(batch) if row % microbatch in rows]


def make_loader(host: Host, config: TrainConfig, folder: Path) -> Loader:
    """Return the loader of a host as a run makes it."""
    stage = next(s for s in config.stages if s.name == host.stage)
    latents, records = config.set(stage.data), Records(folder / stage.data)
    plan = Plan(
        records.index,
        lengths=latents.budget.lengths,
        batch_size=stage.batch_size,
        seed=config.seed,
        name=stage.name,
    )
    return Loader(
        records,
        plan,
        task=stage.task,
        microbatch=host.microbatch,
        rows=frozenset(host.rows),
        text_drop=config.text_drop,
        drops=(stage.control_drop, stage.reference_drop, stage.picture_drop),
    )


def feed(
    loader: Loader, link: Link, seconds: float, steps: int, done: Callable[[], object] = int
) -> dict:
    """Return how long the host waits while a device takes `seconds` for each of its batches."""
    progress, read, first, cpu, stops = Progress(), loader.batches(), 0.0, 0.0, Stops()
    stops.start()
    with mock.patch.object(stores, "read_ranges", link):
        for step in range(1 + steps):
            began = time.perf_counter()
            length, batch = next(read)
            waited = time.perf_counter() - began
            _transfer(batch, loader.rows)
            time.sleep(max(0.0, seconds - (time.perf_counter() - began - waited)))
            if step:
                progress.add(time.perf_counter() - began, batch.weight.size * length, waited)
            else:
                first, cpu = waited, time.process_time()
            done()
        cpu = (time.process_time() - cpu) / steps
        stops.over.set()
        read.close()
    longest = max(waited for *_, waited in progress.window)
    found = {"first": first, "wait": progress.data_wait, "longest": longest}
    return found | {"steps": steps, "cpu": cpu, "stopped": stops.seconds}


def _transfer(batch: Batch, rows: Sequence[int]) -> None:
    """Copy the rows that a host holds, as their transfer to devices does."""
    arrays = [batch.mean, batch.logvar, batch.condition, *batch.texts]
    for array in (a for a in arrays if a is not None):
        for micro in array:
            for row in rows:
                np.array(micro[row])


def reads_of_a_step(host: Host, config: TrainConfig, folder: Path) -> tuple[int, int]:
    """Return (reads, bytes) of a host for a step in which no caption is dropped."""
    stage = next(s for s in config.stages if s.name == host.stage)
    records = Records(folder / stage.data)
    slots, kinds = list(records.cells(0).slots), {"latents", "text"}
    kinds |= {"condition"} if stage.task == "i2v" else set()
    kinds |= {"control"} if TASKS[stage.task].is_control else set()
    kinds |= {"reference"} if "reference picture" in TASKS[stage.task].holds else set()
    of_kind = {slot.split()[0]: records.index.spot(0, n).size for n, slot in enumerate(slots)}
    return host.held * len(kinds), host.held * sum(of_kind[kind] for kind in kinds)


def measure(host: Host, folder: Path, latency: float, bandwidth: float, told) -> dict:
    """Return the figures of a host; `told` gets the seconds of each step that ended."""
    config = load_config(host.config, ())
    place, link = folder / set_name(host), Link(latency, bandwidth)
    loader = make_loader(host, config, place)
    done = functools.partial(told.put, host.seconds)
    found = feed(loader, link, host.seconds, host.steps, done)
    reads, size = reads_of_a_step(host, config, place)
    found |= {"latency": latency, "bandwidth": bandwidth}
    return host._asdict() | found | {"reads": reads, "bytes": size}


def set_name(host: Host) -> str:
    """Return the name of the folder of the sets that a host reads."""
    return f"{Path(host.config).stem}-{host.tokens}-{host.stage}"


def _start(told) -> None:
    global TOLD
    TOLD = told


def _measure(task: tuple) -> dict:
    return measure(*task, TOLD)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each read")
    parser.add_argument("--bandwidth", type=float, default=1.5e9, help="bytes/s of a host")
    parser.add_argument(
        "--lanes", type=int, default=1, help="rows measured at once, but large ones"
    )
    options = parser.parse_args()
    kept = RESULT.with_suffix(".json")
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    how, about = {"latency": options.latency, "bandwidth": options.bandwidth}, setting()
    known = {name: row for name, row in known.items() if how.items() <= row.items()}
    every = hosts_of_pods()
    chosen = [host for host in every if not options.names or host.name in options.names]
    chosen.sort(key=lambda host: -host.seconds * (1 + host.steps))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        for host in {set_name(h): h for h in chosen}.values():
            config = load_config(host.config, ())
            stage = next(s for s in config.stages if s.name == host.stage)
            latents = config.set(stage.data)
            write(folder / set_name(host), config, latents, host.tokens, RECORDS)
        tasks = [(host, folder, options.latency, options.bandwidth) for host in chosen]
        large = [host.held * host.tokens * 512 > LARGE for host in chosen]
        groups = [[t for t, alone in zip(tasks, large, strict=True) if alone == a] for a in (0, 1)]
        for figures in _run(groups, (options.lanes, 1)):
            if figures["stopped"]:
                told = f"{figures['name']}: stopped for {figures['stopped']:.1f} s, not kept"
                print(told, file=sys.stderr)
                continue
            known[figures["name"]] = figures | {"setting": about}
            kept.write_text(json.dumps(known, indent=1))
    order = [host.name for host in every if host.name in known]
    missing = [host.name for host in every if host.name not in known]
    RESULT.write_text(page([known[name] for name in order], missing, options))
    print(RESULT.read_text())


def _run(groups: Sequence[Sequence[tuple]], lanes: Sequence[int]):
    """Yield the figures of each task; a bar shows the seconds of the steps, and those left."""
    context = multiprocessing.get_context("spawn")
    told, ended = context.Queue(), threading.Event()
    total = sum(host.seconds * (1 + host.steps) for tasks in groups for host, *_ in tasks)
    form = "{l_bar}{bar}| {n:.0f} of {total:.0f} [{elapsed}, {remaining} left]"
    bar = tqdm(total=total, desc="seconds of steps", mininterval=5, bar_format=form)

    def show() -> None:
        while not ended.is_set():
            try:
                bar.update(told.get(timeout=1))
            except queue.Empty:
                continue

    thread = threading.Thread(target=show)
    thread.start()
    try:
        for tasks, count in zip(groups, lanes, strict=True):
            with context.Pool(count, _start, (told,), maxtasksperchild=1) as pool:
                yield from pool.imap_unordered(_measure, tasks)
    finally:
        ended.set()
        thread.join()
        bar.close()


def page(rows: Sequence[dict], missing: Sequence[str], options: argparse.Namespace) -> str:
    """Return the result as Markdown."""
    worst = max(row["wait"] for row in rows)
    lines = [
        "# Feeding a host of a pod",
        "",
        *[f"{about}\n" for about in dict.fromkeys(row["setting"] for row in rows)],
        f"One simulated host, in real time: each read waits {1000 * options.latency:.0f} ms, and "
        f"the reads of a host share {options.bandwidth / 1e9:.1f} GB/s. Asked: a data wait below "
        f"{LIMIT:.0%}. The largest is {worst:.2%}. The device sleeps for the seconds that `aot` "
        f"predicts. The CPU time of an HTTP client and of TLS is not in it.",
        "",
        "The first batch is the time until a new loader has it; then the device has had nothing "
        "to do. The steps after it are counted. CPU seconds are those of the whole process.",
        "",
        "| config | stage | chips | hosts | rows a host | MB a step a host | reads | step, s "
        "| CPU, s a step | first batch, s | steps | wait | longest wait, ms |",
        f"|{'---|' * 13}",
    ]
    for row in rows:
        values = [
            Path(row["config"]).stem,
            row["stage"],
            row["chips"],
            row["hosts"],
            row["held"],
            f"{row['bytes'] / 1e6:,.0f}",
            row["reads"],
            f"{row['seconds']:.1f}",
            f"{row['cpu']:.2f}" if "cpu" in row else "",
            f"{row['first']:.2f}",
            row["steps"],
            f"{row['wait']:.2%}",
            f"{1000 * row['longest']:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, values))} |")
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
