"""Run tasks on the devices of a Ray cluster: `Hosts`, and what starts or finds the cluster.

The driver keeps a bounded number of tasks on every process with devices. If such a process dies,
or a disk or a store does not answer, its tasks are tried again, at most TRIES times in all. Hosts
may come and go. Ray is imported only here and in functions, so nothing else needs it.
"""

import contextlib
import functools
import importlib.util
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from easyanimate_jax.storage.errors import is_of_the_system
from easyanimate_jax.storage.stores import Place

logger = logging.getLogger(__name__)

Kind = Literal["any", "TPU", "GPU", "CPU"]

TRIES = 4  # of a task, before it counts as failed
DEEP = 2  # tasks of a process at once: one decodes or writes while another one encodes
LOOK = 20.0  # seconds after which the driver looks for new hosts, at most
ANSWER = 8.0  # seconds in which an address must answer
# How a client of gRPC begins: HTTP/2's preface and a frame of no settings. A server answers with a
# frame of its settings, whose fourth byte is SETTINGS.
HELLO, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", 4


class Unusable(ValueError):
    """A host cannot do what all hosts must, so no task is tried again."""


class Task(NamedTuple):
    """A call of a method of the process with the devices."""

    name: str  # for messages
    method: str
    arguments: tuple
    rows: int  # clips or captions, for the progress


class Failure(NamedTuple):
    """Why a task has no result."""

    reason: str
    again: bool  # another try may help


@dataclass(eq=False)
class Process:
    """A process with the devices of a host."""

    handle: object
    devices: float  # 0 on hosts with CPUs alone
    ready: bool = False
    tasks: int = 0  # that it has now


def check_ray() -> None:
    """Raise ValueError if Ray is not installed, or if nothing answers at RAY_ADDRESS."""
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # a folder of this name has no origin
        raise ValueError(
            "--engine ray: ray is not installed; run pip install 'easyanimate_jax[ray]'"
        )
    ray = sys.modules.get("ray")
    if not (ray and ray.is_initialized()):
        _check_address(os.environ.get("RAY_ADDRESS", ""))


def _check_address(address: str) -> None:
    """Raise ValueError if no cluster answers at an address within ANSWER seconds.

    Ray itself tries for minutes. Addresses of other kinds than HOST:PORT and ray://HOST:PORT are
    left to Ray.
    """
    scheme, _, rest = address.rpartition("://")
    if address in ("", "local") or scheme not in ("", "ray", "http", "https"):
        return
    try:
        where = _of_this_host() if address == "auto" else rest.partition("/")[0]
        host, _, port = where.rpartition(":")
        if not host or not port.isdecimal() or scheme.startswith("http"):
            raise ConnectionError("that is no address of a cluster")
        _greet(host.strip("[]"), int(port), where)
    except ConnectionError as error:
        raise ValueError(
            f"RAY_ADDRESS is {address!r}, and no cluster answers there ({error}); write HOST:6379 "
            f"or ray://HOST:10001 of a running cluster, or unset RAY_ADDRESS to start a local one"
        ) from error


def _of_this_host() -> str:
    """Return the address that "auto" stands for. Raises ConnectionError if there is none."""
    from ray._private.services import canonicalize_bootstrap_address  # no public one tells it

    try:
        return canonicalize_bootstrap_address("auto") or ""
    except ConnectionError as error:
        raise ConnectionError("this host runs none") from error


def _greet(host: str, port: int, where: str) -> None:
    """Raise ConnectionError unless a server of gRPC answers within ANSWER seconds."""
    told = []

    def greet() -> None:
        try:
            with socket.create_connection((host, port), ANSWER) as connection:
                if os.environ.get("RAY_USE_TLS", "0") == "0":  # else it speaks only after TLS
                    connection.sendall(HELLO)
                    answer = connection.makefile("rb").read(9)
                    known = len(answer) == 9 and answer[3] == SETTINGS
                    told.append("" if known else f"what listens at {where} is not Ray")
                told.append("")
        except (OSError, OverflowError) as error:  # the second one for a port above 65535
            told.append(f"{where}: {getattr(error, 'strerror', None) or error}")

    thread = threading.Thread(target=greet, daemon=True)  # a name may take minutes to resolve
    thread.start()
    thread.join(ANSWER + 0.5)
    if not told or told[0]:
        raise ConnectionError(told[0] if told else f"{where} did not answer in {ANSWER:.0f} s")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Use the cluster of RAY_ADDRESS, or the one of this process; else a local one, ended here.

    Raises ValueError if the cluster of RAY_ADDRESS does not answer.
    """
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(address or "local", logging_level="warning", **local)
    except (ConnectionError, RuntimeError) as error:
        if not address:
            raise
        raise ValueError(
            f"RAY_ADDRESS is {address!r}, and no cluster answers there ({error}); name the address "
            f"of a running cluster, or unset RAY_ADDRESS to start a local one"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class Hosts:
    """Processes with devices, one a host, made as `actor(*arguments)`; they begin with `start()`.

    `kind` are the devices: on hosts without them there is no process.
    """

    def __init__(self, actor: type, arguments: Sequence, kind: Literal["TPU", "GPU", "CPU"]):
        import ray

        self.ray, self.arguments = ray, arguments
        self.actor = ray.remote(max_restarts=0, max_concurrency=DEEP)(actor)
        self.kind, self.processes, self.lost = kind, [], 0  # starts in succession that died
        self.calls = {}  # reference -> (process, task); a start has no task

    def run(
        self, tasks: Sequence[Task], stops: tuple[type[Exception], ...]
    ) -> Iterator[tuple[Task, object]]:
        """Yield each task with its result, or with a `Failure`, in the order in which they end.

        Raises errors of the types `stops`, what `start()` raises, ValueError if processes die when
        they start, and ConnectionError if this host has lost the cluster.
        """
        queue, tries = deque(tasks), Counter()
        try:
            while queue or any(task for _, task in self.calls.values()):
                self._grow()
                self._give(queue, tries)
                done = self._wait()
                for ref in done:
                    process, task = self.calls.pop(ref)
                    process.tasks -= 1
                    result = self._result(ref, process, stops if task else (Exception,))
                    if task is None:
                        self._started(process, result)
                    elif isinstance(result, Failure) and result.again and tries[task.name] < TRIES:
                        logger.warning(f"{task.name}: {result.reason}; it is tried again")
                        queue.append(task)
                    else:
                        yield task, result
        finally:
            for process in self.processes:
                self.ray.kill(process.handle)

    def _grow(self) -> None:
        """Start a process on every host that has none."""
        own = self.ray.get_runtime_context().get_node_id()
        if not any(node["Alive"] and node["NodeID"] == own for node in self.ray.nodes()):
            raise ConnectionError("Ray has ended on this host; run the same command again")
        have = (resources.get(self.kind, 0) for resources in _nodes())
        wanted = Counter(count if self.kind != "CPU" else 0 for count in have if count)
        wanted -= Counter(process.devices for process in self.processes)
        for count in wanted.elements():
            needs = {"TPU": {"resources": {"TPU": count}}, "GPU": {"num_gpus": count}}
            how = needs.get(self.kind, {"scheduling_strategy": "SPREAD"})
            process = Process(self.actor.options(num_cpus=0, **how).remote(*self.arguments), count)
            self.processes.append(process)
            self._call(process, None)

    def _give(self, queue: deque, tries: Counter) -> None:
        """Give tasks to the processes that are ready, first to those with the fewest."""
        for depth in range(DEEP):
            for process in self.processes:
                if queue and process.ready and process.tasks <= depth:
                    task = queue.popleft()
                    tries[task.name] += 1
                    self._call(process, task)

    def _call(self, process: Process, task: Task | None) -> None:
        method, arguments = (task.method, task.arguments) if task else ("start", ())
        self.calls[getattr(process.handle, method).remote(*arguments)] = process, task
        process.tasks += 1

    def _wait(self) -> list:
        """Return the references that are done; after some seconds, maybe none."""
        if not self.calls:
            time.sleep(LOOK)
        done, _ = self.ray.wait(list(self.calls), timeout=LOOK) if self.calls else ([], [])
        if not any(process.ready for process in self.processes) and not done:
            logger.warning(
                f"waiting for a process with {self.kind}: it needs a host that is free, and loads "
                f"the models"
            )
        return done

    def _started(self, process: Process, result: object) -> None:
        process.ready = not isinstance(result, Failure)
        self.lost = 0 if process.ready else self.lost + 1
        if self.lost == TRIES:
            raise ValueError(
                f"{TRIES} processes on hosts with {self.kind} died when they started, the last "
                f"one of {result.reason}; the logs of Ray on these hosts hold more"
            )

    def _result(self, ref, process: Process, stops: tuple[type[Exception], ...]) -> object:
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, stops):
                raise cause from None
            passing = OSError, self.ray.exceptions.RayError
            return Failure(_line(cause), isinstance(cause, passing) or is_of_the_system(cause))
        except self.ray.exceptions.RayError as error:  # the process or its host is lost
            if process in self.processes:
                self.processes.remove(process)
                self.ray.kill(process.handle)  # it may only be cut off
            return Failure(_line(error), again=True)


@functools.cache
def check_seen(paths: tuple[Place, ...]) -> None:
    """Raise `Unusable` unless this host sees these files and folders."""
    for path in paths:
        if not path.exists():
            raise Unusable(
                f"host {socket.gethostname()} does not see {path}: keep source and output in a "
                f"folder that all hosts see under this name, or in a store (gs://, s3://)"
            )


def on_cpus(function: Callable, **options):
    """Return a function for tasks of one CPU each, tried again if a store does not answer.

    JAX uses the CPU in them, because a host's devices belong to its one process with devices.
    """
    import ray

    options |= {"runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu"}}}
    # The process is replaced now and then: what a library leaks goes with it.
    return ray.remote(
        num_cpus=1, max_retries=3, retry_exceptions=[OSError], max_calls=1000, **options
    )(function)


def on_all_cpus(
    function: Callable, calls: Iterable[tuple], stops: tuple[type[Exception], ...]
) -> Iterator[tuple[tuple, object]]:
    """Yield the arguments of each call of a function with its result, or with a `Failure`.

    Two calls a CPU are in the cluster at once. Raises errors of the types `stops`.
    """
    import ray

    task, calls, running = on_cpus(function), iter(calls), {}
    while True:
        room = 2 * int(sum(resources.get("CPU", 0) for resources in _nodes())) - len(running)
        running |= {task.remote(*call): call for call in itertools.islice(calls, max(0, room))}
        if not running:
            return
        done, _ = ray.wait(list(running), timeout=LOOK)
        for ref in done:
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, stops):
                    raise cause from None
                result = Failure(_line(cause), again=False)
            yield running.pop(ref), result


def chosen(kind: Kind) -> Literal["TPU", "GPU", "CPU"]:
    """Return the devices to use: "any" is TPUs, else GPUs, else CPUs, as the cluster has now."""
    have = _nodes()
    best = (one for one in ("TPU", "GPU") if any(one in resources for resources in have))
    return next(best, "CPU") if kind == "any" else kind


def cpus_a_host(kind: Literal["TPU", "GPU", "CPU"]) -> int:
    """Return the CPUs of the cluster for each host that has these devices now."""
    have = _nodes()
    hosts = sum(kind in resources for resources in have)
    return int(sum(resources.get("CPU", 0) for resources in have) // max(1, hosts))


def _nodes() -> list[dict[str, float]]:
    """Return what each host of the cluster has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
