"""Connect the processes of a run: on a TPU pod, under Slurm, or at a given address.

A run has one process per TPU host or GPU host; under Slurm it may also have one per GPU. All
processes run the same command. The log lines of each process start with its number.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Mapping

PATIENCE = 3600  # seconds to wait for other processes, which may compile more slowly
HEARTBEAT = 10  # seconds without a heartbeat after which a process counts as lost


def several_processes(environment: Mapping[str, str]) -> bool:
    """Return True if this process is one of several, or if the environment asks JAX to find out."""
    # Only processes that srun starts are in a Slurm step; a script under sbatch is not.
    tasks = int(environment.get("SLURM_NTASKS", 1)) if "SLURM_STEP_NODELIST" in environment else 1
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or tasks > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1
    )


def meeting_point(environment: Mapping[str, str]) -> dict:
    """Return arguments of `jax.distributed.initialize`; JAX asks the cluster for missing ones.

    JAX_COORDINATOR_ADDRESS is host:port of the first process, or "auto" on TPU VMs, which find each
    other through their metadata server. With an address, also set JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. XPK on GPUs gives the port as JAX_COORDINATOR_PORT, and the other two as NNODES
    and NODE_RANK. Raises ValueError for an address without a port, and for words as numbers.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS", "auto")
    given = {"heartbeat_timeout_seconds": HEARTBEAT}
    if address == "auto":
        return given
    if ":" not in address:
        if "JAX_COORDINATOR_PORT" not in environment:
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS is {address!r}, without a port; write {address}:PORT, or "
                f"set JAX_COORDINATOR_PORT"
            )
        address = f"{address}:{environment['JAX_COORDINATOR_PORT']}"
    given["coordinator_address"] = address
    if address.startswith("127."):
        # By default JAX listens on all interfaces, and it does not authenticate clients.
        given["coordinator_bind_address"] = address
    for name, of_xpk in (("num_processes", "NNODES"), ("process_id", "NODE_RANK")):
        variable = next((v for v in (f"JAX_{name.upper()}", of_xpk) if v in environment), None)
        if variable is not None:
            if not environment[variable].isdecimal():
                raise ValueError(f"{variable} is {environment[variable]!r}; use a whole number")
            given[name] = int(environment[variable])
    return given


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Return the indices of the visible GPUs that this process uses under Slurm, None elsewhere.

    By default JAX uses one GPU per process under Slurm. Here a single process on a host uses all
    GPUs, and several processes split them, unless Slurm shows each process only its own GPUs.
    Raises ValueError if the GPUs do not divide.
    """
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_LOCALID" not in environment:
        return None
    on_host = _count(environment.get("SLURM_GPUS_ON_NODE", ""))
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    visible = len([name for name in shown.split(",") if name]) if shown else on_host
    if not visible:
        return None
    tasks = _tasks_here(environment)
    if tasks == 1 or visible < on_host:
        return list(range(visible))
    if visible % tasks:
        raise ValueError(
            f"{tasks} tasks of this host share {visible} GPUs, which do not divide evenly: use one "
            f"task per host (--ntasks-per-node=1), or one task per GPU"
        )
    share, first = visible // tasks, int(environment["SLURM_LOCALID"]) * (visible // tasks)
    return list(range(first, first + share))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Return the number of tasks on this host; "8(x2),4" is 8 on two hosts and 4 on a third."""
    counts = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def _count(text: str) -> int:
    """Return the number in "8" or "h100:8", or 0 if there is none."""
    number = text.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def join() -> None:
    """Connect to the other processes, if any; call it before the first use of a device."""
    if not several_processes(os.environ):
        return
    import jax

    given = meeting_point(os.environ)
    if (gpus := own_gpus(os.environ)) is not None:
        given["local_device_ids"] = gpus
    if "coordinator_address" not in given:
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # JAX would read "auto" as an address
    jax.distributed.initialize(**given)


def wait(what: str) -> None:
    """Wait until all processes have called this with the same `what`, for at most `PATIENCE`.

    Processes may arrive minutes apart. A collective cannot wait that long: on CPUs it fails after
    30 seconds.
    """
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=1000 * PATIENCE)


class Terminal(logging.Handler):
    """A handler that writes each record as a line to stderr: `prefix`, then the message.

    It writes only the first of the records with the same `once`, so that a program that runs for
    every sample is described once.
    """

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix, self.seen = prefix, set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless one with the same `once` was written before."""
        once = getattr(record, "once", None)
        if once in self.seen:
            return
        if once is not None:
            self.seen.add(once)
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # erases a progress line
        with contextlib.suppress(OSError):  # the reader may have closed the pipe
            print(f"{clear}{self.prefix}{self.format(record)}", file=sys.stderr, flush=True)


def start_logging() -> None:
    """Write the package's log records of level INFO and above to stderr; call it after `join`.

    Only commands call this. A program that imports the package configures `logging` itself.
    """
    prefix = ""
    if several_processes(os.environ):
        import jax

        prefix = f"[{jax.process_index()}] "
    logger = logging.getLogger(__package__)
    logger.handlers = [Terminal(prefix)]
    root = logging.getLogger()
    if not root.handlers:  # else a library that calls `logging.info` adds one, for us too
        others = logging.StreamHandler()
        others.setLevel(logging.WARNING)
        others.addFilter(lambda record: not record.name.startswith(__package__))
        root.addHandler(others)
    logger.setLevel(logging.INFO)
