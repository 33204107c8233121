"""What a device holds, and what a program would take of it, told before it runs."""

import logging
import math
import os

import jax

logger = logging.getLogger(__name__)

GB = 1e9
PACKED = 2**22  # bytes a CPU device copies a product's operands into, which XLA does not plan


def device_memory() -> int:
    """Bytes that a program may use on a device that is here; of a CPU, its share of the host's."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or host // jax.local_device_count()


def memory_in_use() -> int:
    """Bytes that arrays hold of a device; a CPU does not count them, so the parts of all arrays."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    if used is not None:
        return used
    shapes = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.live_arrays())
    return sum(math.prod(shape) * size for shape, size in shapes)


def peak_bytes(compiled: jax.stages.Compiled, platform: str) -> int:
    """Bytes of a device, arguments among them. Only the TPU compiler's own peak knows which
    buffers share their place."""
    memory = compiled.memory_analysis()
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    planned = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return planned + (PACKED if platform == "cpu" else 0)


def check_fit(what: str, function, *args, **options) -> None:
    """Compile the jitted `function` for these arguments, arrays or shapes, and log what it takes.

    A call with them afterwards compiles nothing more. Raises ValueError where a device has less
    left than that: its arguments are taken to be there already.
    """
    device, used, limit = jax.local_devices()[0], memory_in_use(), device_memory()
    advice = "ask for fewer frames, a smaller size or fewer at once"
    try:
        compiled = function.lower(*args, **options).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        held = f"{limit / GB:.1f} GB of a device"
        raise ValueError(f"{what} does not fit {held}: {advice}") from error
    peak = peak_bytes(compiled, device.platform)
    more = peak - compiled.memory_analysis().argument_size_in_bytes
    line = (
        f"{what} takes {more / GB:.2f} GB of a device's {limit / GB:.1f} GB, beside the "
        f"{used / GB:.2f} GB that are in use"
    )
    if used + more > limit:
        raise ValueError(f"{line}: {advice}, or read the parts one after another")
    logger.info(line, extra={"once": what})  # a program may run often
