"""`python -m easyanimate_jax doctor [CONFIG] [--field value ...]`: can this pod run the config?

Start it like `train.py`, on every host. It compares devices, versions and clocks of all processes
and sums an array over all devices. With a config it also checks that the mesh suits the weights,
that the state fits memory and disk, and that all processes see the same files. Process 0 prints one
table. The exit code is 0 if all checks pass, 1 if one fails, and 2 for invalid arguments.
"""

import contextlib
import hashlib
import json
import math
import platform
import shutil
import socket
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easyanimate_jax.memory import device_memory
from easyanimate_jax.runs.config import TrainConfig
from easyanimate_jax.runs.meshes import stage_meshes
from easyanimate_jax.storage.stores import (
    Place,
    Remote,
    list_names,
    make_folder,
    place,
    replace_text,
)
from easyanimate_jax.training.program import abstract_state
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.weights.pretrained import model_place
from easyanimate_jax.weights.run_folder import complete_steps

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")
MAX_CLOCK_SPREAD = 1.0  # seconds; more disturbs logs, heartbeats and certificates
LEAST_FILES = 1024  # open files of a process
# File systems that show a bucket as folders: a rename there copies each object of the folder.
BUCKETS = {f"fuse.{name}" for name in ("gcsfuse", "s3fs", "mountpoint-s3", "goofys", "rclone")}
BUCKETS |= {"fuse.mount-s3", "fuse.blobfuse2"}
MESSAGE = 1 << 14  # bytes of facts that a process sends to the others
REDUCED = 1 << 22  # float32 numbers that each device adds to the sum


class Finding(NamedTuple):
    """The result of one check: its name, whether it passed, and a line that explains it."""

    name: str
    good: bool
    what: str


def examine(config: TrainConfig | None) -> list[Finding]:
    """Return the findings of all checks; every process must call this."""
    facts = gather(facts_here(config))
    findings = [*compare(facts), all_reduce()]
    if config is not None:
        findings += [same_run_folder(place(config.run)), *fits(config)]
    return findings


def facts_here(config: TrainConfig | None) -> dict:
    """Return what this process sees: clock, host, devices, versions and files, as JSON values.

    The clock is read after all processes have arrived, so that the clocks can be compared.
    """
    multihost_utils.sync_global_devices("doctor clock")
    return {
        "clock": time.time(),
        "host": socket.gethostname(),
        "devices": [d.device_kind for d in jax.local_devices()],
        "versions": {"python": platform.python_version()} | _versions(),
        "open_files": _open_files(),
        "files": {str(path): _listing(path) for path in _inputs(config)} if config else {},
    }


def gather(facts: dict) -> list[dict]:
    """Return the facts of all processes, in process order; every process must call this."""
    message = json.dumps(facts).encode()
    assert len(message) <= MESSAGE, len(message)
    padded = np.frombuffer(message.ljust(MESSAGE), np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(-1, MESSAGE)
    return [json.loads(row.tobytes()) for row in rows]


def compare(facts: list[dict]) -> list[Finding]:
    """Return findings that say whether all processes see the same devices, versions and files."""
    devices = [f["devices"] for f in facts]
    kinds = sorted({kind for local in devices for kind in local})
    numbers = sorted({len(local) for local in devices})
    findings = [
        Finding(
            "devices",
            len(kinds) == 1 and len(numbers) == 1,
            f"{sum(map(len, devices))} x {', '.join(kinds)}: {' or '.join(map(str, numbers))} in "
            f"each of {len(facts)} processes",
        )
    ]
    for package in facts[0]["versions"]:
        seen = [f["versions"][package] for f in facts]
        findings.append(Finding(package, len(set(seen)) == 1, _differing(facts, seen)))
    clocks = [f["clock"] for f in facts]
    spread = max(clocks) - min(clocks)
    findings.append(Finding("clocks", spread <= MAX_CLOCK_SPREAD, f"{spread:.3f} s apart"))
    least = min((f["open_files"] for f in facts if f["open_files"]), default=0)
    if least:
        what = f"{least:,} of a process, at least" + "; raise `ulimit -n`" * (least < LEAST_FILES)
        findings.append(Finding("open files", least >= LEAST_FILES, what))
    for path in facts[0]["files"]:
        seen = [f["files"][path] for f in facts]
        good = None not in seen and len(set(seen)) == 1
        what = "the same everywhere" if good else _differing(facts, [s or "missing" for s in seen])
        findings.append(Finding(path, good, what))
    return findings


def all_reduce() -> Finding:
    """Sum an array over all devices; check the result and measure the rate in GB/s."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    parts = NamedSharding(mesh, PartitionSpec("all"))
    numbers = np.arange(mesh.size, dtype=np.float32)
    make = jax.jit(lambda x: jnp.repeat(x[:, None], REDUCED, axis=1), out_shardings=parts)
    given = make(jax.make_array_from_callback(numbers.shape, parts, lambda at: numbers[at]))
    whole = NamedSharding(mesh, PartitionSpec())
    add = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = jax.block_until_ready(add(given))
        seconds.append(time.perf_counter() - began)
    want = mesh.size * (mesh.size - 1) / 2
    good = bool(np.all(np.asarray(result.addressable_data(0)) == want))
    rate = 4 * REDUCED / min(seconds) / 1e9
    what = f"{4 * REDUCED / 1e6:.0f} MB a device in {min(seconds) * 1e3:.1f} ms, {rate:.1f} GB/s"
    return Finding("all-reduce", good, what if good else f"gives {result.ravel()[0]}, not {want}")


def same_run_folder(folder: Place) -> Finding:
    """Check that every process can read what each process writes into the run folder."""
    token = gather({"token": uuid.uuid4().hex})[0]["token"]
    problem, mine = "", folder / f"doctor.{token}.{jax.process_index()}"
    try:
        make_folder(folder, mode=0o700)
        replace_text(mine, token)
        if isinstance(folder, Path):
            problem = _mount_problem(folder) or _rename_problem(folder / f"{mine.name}.folder")
    except OSError as error:
        problem = f"cannot be written: {error}"
    multihost_utils.sync_global_devices("doctor wrote")
    names = {f"doctor.{token}.{i}" for i in range(jax.process_count())}
    seen = [] if problem else names & set(list_names(folder))
    multihost_utils.sync_global_devices("doctor read")
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
    if not problem and len(seen) < jax.process_count():
        problem = f"shows files of {len(seen)} of {jax.process_count()} processes"
    problems = [
        f"process {i}: {f['problem']}"
        for i, f in enumerate(gather({"problem": problem[:500]}))
        if f["problem"]
    ]
    return Finding(f"run {folder}", not problems, "; ".join(problems) or "shared and writable")


def _open_files() -> int | None:
    """Return how many files this process may open; None if the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _mount_problem(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return what is wrong with the file system of a folder, or ""."""
    if not mounts.is_file():
        return ""
    found = [line.split()[:3] for line in mounts.read_text().splitlines()]
    inside = [(Path(at), kind) for _, at, kind in found if folder.resolve().is_relative_to(at)]
    kind = max(inside, key=lambda mount: len(mount[0].parts), default=(None, ""))[1]
    if kind not in BUCKETS:
        return ""
    return (
        f"is a bucket that {kind.removeprefix('fuse.')} mounts, where a checkpoint cannot be "
        f"renamed in one step; give its URL: --run gs://... or s3://..."
    )


def _rename_problem(folder: Path) -> str:
    """Return why a folder with a file cannot be renamed, or ""; a checkpoint gets its name so."""
    other = folder.with_name(f"{folder.name}.renamed")
    try:
        folder.mkdir()
        (folder / "file").touch()
        folder.rename(other)
        return "" if (other / "file").is_file() else "loses a file when a folder is renamed"
    except OSError as error:
        return f"cannot rename a folder: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(other, ignore_errors=True)


def fits(config: TrainConfig) -> list[Finding]:
    """Check that the meshes suit devices and weights, and that the state fits memory and disk."""
    try:
        meshes = stage_meshes(config)
    except ValueError as error:
        return [Finding("mesh", False, str(error))]
    states = [
        abstract_state(config.step.with_channels(stage.in_channels), meshes[stage.name])[2]
        for stage in config.stages
    ]
    local = max(map(_bytes_of_device, states))
    memory = device_memory()
    saved = jax.tree.leaves(states[-1]._replace(frozen=None))
    needed = (max(2, config.keep) + 1) * sum(x.size * x.dtype.itemsize for x in saved)
    run, disk = place(config.run), []
    if isinstance(run, Path):
        nearest = next(p for p in (run, *run.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free
        what = f"{free / 1e9:.1f} GB free, {config.keep} + 1 checkpoints take {needed / 1e9:.1f} GB"
        disk = [Finding("disk", free > needed, what)]
    found = {}  # the axes of a mesh -> its stages
    for stage, mesh in meshes.items():
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        found.setdefault(axes, []).append(stage)
    parts = [f"{axes} in {', '.join(names)}" for axes, names in found.items()]
    return [
        Finding("mesh", True, "; ".join(parts if len(found) > 1 else found)),
        Finding(
            "memory",
            local < memory,
            f"the state takes {local / 1e9:.2f} of {memory / 1e9:.1f} GB a device; train.py checks "
            f"the whole step",
        ),
        *disk,
    ]


def _bytes_of_device(state: TrainState) -> int:
    leaves = jax.tree.leaves(state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def table(findings: list[Finding]) -> str:
    """Return the findings as a table, one line each, and a last line that sums them up."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{'ok' if f.good else 'FAIL':<6}{f.name.ljust(width)}  {f.what}" for f in findings]
    bad = sum(not finding.good for finding in findings)
    return "\n".join([*lines, f"{bad} of {len(findings)} checks failed" if bad else "all is well"])


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _inputs(config: TrainConfig) -> list[Place]:
    """Return the folders that training reads."""
    names = dict.fromkeys(stage.data for stage in config.stages)
    folders = [place(config.prepared) / name for name in names]
    folders += [model_place(config.vae)] if config.samples.prompts else []
    folders += [model_place(config.init)] if config.init else []
    return folders


def _listing(folder: Place) -> str | None:
    """Return a digest of what a folder holds; None if it does not exist.

    It is the names that stand in it, with the sizes of local files, and the header of a prepared
    set; of a run in a store, the complete steps.
    """
    if not folder.exists():
        return None
    if isinstance(folder, Remote) and (steps := complete_steps(folder / "checkpoints")):
        return hashlib.sha256(repr(steps).encode()).hexdigest()[:12]
    header = folder / "header.json"
    told = [list_names(folder), header.read_text() if header.is_file() else ""]
    if isinstance(folder, Path):
        told += [p.stat().st_size for p in (folder / name for name in told[0]) if p.is_file()]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _differing(facts: list[dict], seen: list[str]) -> str:
    """Return the value that all processes see, or each value with the processes that see it."""
    if len(set(seen)) == 1:
        return seen[0]
    hosts = {}
    for number, (fact, value) in enumerate(zip(facts, seen, strict=True)):
        hosts.setdefault(value, []).append(f"{number} ({fact['host']})")
    return "; ".join(f"{value} on {', '.join(h[:4])}" for value, h in hosts.items())
