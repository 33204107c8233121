"""Measure the memory of a device, and check that a program fits before it runs."""

import contextlib
import logging
import math
import os
from pathlib import Path, PurePosixPath

import jax

logger = logging.getLogger(__name__)

GB = 1e9
OWN = 1_500_000_000  # bytes of a process beside its programs, on a CPU
UNKNOWN = 8_000_000_000  # bytes that a host is assumed to have that does not say
GROUPS = Path("/sys/fs/cgroup")
PACKED = 2**22  # bytes of a CPU's buffer for operands of a product, which XLA does not count


def device_memory() -> int:
    """Return the bytes that programs may use on a local device.

    A CPU has its share of `host_memory`, after what the interpreter, its libraries and batches that
    are read ahead take.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or max(0, host_memory() - OWN) // jax.local_device_count()


def host_memory() -> int:
    """Return the bytes of the host's memory that this process may use.

    This is the smallest of the machine's memory, the limits of the process's control groups (of a
    container or a batch system) and its own limits (`ulimit -v`, `ulimit -d`).
    """
    limits = [*_group_limits(), *_own_limits()]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=UNKNOWN)


def _own_limits() -> list[int]:
    """Return the limits of the process's memory, in bytes."""
    try:
        import resource
    except ImportError:  # on Windows
        return []
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]


def _group_limits(process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Return the limits of the control groups that the process is in, in bytes.

    A line of the file is `number:controllers:path`. Version 2 has no controllers there.
    """
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, place in lines:
        if "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        elif not controllers:
            root, name = GROUPS, "memory.max"
        else:
            continue
        path = PurePosixPath(place)
        for group in (path, *path.parents):  # in a container, the path may be the host's
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                found.append(int((root / group.relative_to("/") / name).read_text()))
    return found


def memory_in_use() -> int:
    """Return the bytes in use on a local device.

    A CPU does not count them, so the result is then the sum of all arrays' parts on one device.
    """
    used = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    if used is not None:
        return used
    shapes = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.live_arrays())
    return sum(math.prod(shape) * size for shape, size in shapes)


def peak_bytes(compiled: jax.stages.Compiled, platform: str) -> int:
    """Return the peak bytes of a program on one device, including its arguments.

    Only the TPU compiler reports a peak. Elsewhere the result is the sum of all buffers.
    """
    memory = compiled.memory_analysis()
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    planned = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return planned + (PACKED if platform == "cpu" else 0)


def check_fit(what: str, function, *args, **options) -> None:
    """Compile the jitted `function` for these arguments, and log the memory that it needs.

    Arguments are arrays or shapes; arrays are assumed to be on the device already. A later call
    with the same shapes does not compile again. Raises ValueError if the program does not fit.
    """
    device, used, limit = jax.local_devices()[0], memory_in_use(), device_memory()
    advice = "ask for fewer frames, a smaller size or fewer at once"
    try:
        compiled = function.lower(*args, **options).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        held = f"the {limit / GB:.1f} GB of a device"
        raise ValueError(f"{what} does not fit into {held}: {advice}") from error
    peak = peak_bytes(compiled, device.platform)
    more = peak - compiled.memory_analysis().argument_size_in_bytes
    line = (
        f"{what} takes {more / GB:.2f} GB of a device's {limit / GB:.1f} GB, in addition to the "
        f"{used / GB:.2f} GB in use"
    )
    if used + more > limit:
        raise ValueError(f"{line}: {advice}, or load the parts of the pipeline one after another")
    logger.info(line, extra={"once": what})  # `Terminal` shows it once per program
