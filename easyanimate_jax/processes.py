"""Meeting the other processes of a run: on a TPU pod, under Slurm, or where one is told where.

One process per TPU host or per GPU host; under Slurm also one per GPU. All run the same command,
and each one's log lines begin with its number.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Mapping

PATIENCE = 3600  # seconds for others that compile more slowly
HEARTBEAT = 10  # seconds without a word after which a process counts as lost


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several, or is told to ask the cluster whether it is."""
    # A script under sbatch has no step; what srun starts in it has.
    tasks = int(environment.get("SLURM_NTASKS", 1)) if "SLURM_STEP_NODELIST" in environment else 1
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or tasks > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1
    )


def meeting_point(environment: Mapping[str, str]) -> dict:
    """Arguments of `jax.distributed.initialize`; what is not there JAX asks the cluster for.

    JAX_COORDINATOR_ADDRESS is host:port of the first process, or "auto" on TPU VMs, which hear
    of each other from their metadata server. JAX_NUM_PROCESSES and JAX_PROCESS_ID go with it.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS", "auto")
    given = {"heartbeat_timeout_seconds": HEARTBEAT}
    if address == "auto":
        return given
    given["coordinator_address"] = address
    if address.startswith("127."):
        # JAX would listen on all interfaces, and asks nobody who they are.
        given["coordinator_bind_address"] = address
    for name in ("num_processes", "process_id"):
        value = environment.get(f"JAX_{name.upper()}")
        if value is not None:
            given[name] = int(value)
    return given


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Return which of the GPUs that it sees a process under Slurm takes; None elsewhere.

    JAX takes one GPU a process under Slurm. A process that is alone on its host takes all of them;
    several share them out, unless Slurm shows each only its own.
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
            f"{tasks} tasks of this host share {visible} GPUs, which does not divide: use one task "
            f"a host (--ntasks-per-node=1), or one a GPU"
        )
    share, first = visible // tasks, int(environment["SLURM_LOCALID"]) * (visible // tasks)
    return list(range(first, first + share))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Return the tasks of this host in the step: "8(x2),4" is 8 on two hosts, 4 on a third."""
    counts = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def _count(text: str) -> int:
    """Return the number in "8" or "h100:8"; 0 where there is none."""
    number = text.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def join() -> None:
    """Meet the other processes, if there are any; before the first use of a device."""
    if not several_processes(os.environ):
        return
    import jax

    given = meeting_point(os.environ)
    if (gpus := own_gpus(os.environ)) is not None:
        given["local_device_ids"] = gpus
    if "coordinator_address" not in given:
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # JAX would take "auto" for an address
    jax.distributed.initialize(**given)


def wait(what: str) -> None:
    """Until all processes have come here; they may come minutes apart.

    A collective is no place to wait at: on CPUs it gives up after 30 seconds.
    """
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=1000 * PATIENCE)


class Terminal(logging.Handler):
    """Writes each record as a line to stderr: `prefix`, then the message.

    Of records that carry the same `once`, it writes the first alone: a program that runs for every
    sample is described one time.
    """

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix, self.seen = prefix, set()

    def emit(self, record: logging.LogRecord) -> None:
        once = getattr(record, "once", None)
        if once in self.seen:
            return
        if once is not None:
            self.seen.add(once)
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # of a progress line
        with contextlib.suppress(OSError):  # nobody may read any more
            print(f"{clear}{self.prefix}{self.format(record)}", file=sys.stderr, flush=True)


def start_logging() -> None:
    """Write the package's log records from INFO on to stderr, for a command; after `join`.

    A program that imports the package sets up `logging` its own way instead.
    """
    prefix = ""
    if several_processes(os.environ):
        import jax

        prefix = f"[{jax.process_index()}] "
    logger = logging.getLogger(__package__)
    logger.handlers = [Terminal(prefix)]
    logger.setLevel(logging.INFO)
