"""Decode files in separate processes, with limits of processor time and memory.

A damaged or hostile file can only kill a worker, not the run: the caller gets a `ValueError` with
the reason, and the next file a new worker. Requests and answers are JSON and raw bytes, so an
answer cannot run code. The time limit grows with the bytes to read and the pixels to decode, and
counts processor time, so a busy machine gives the same result. A worker that uses no processor time
is killed as stuck; one whose parent has ended exits. A worker opens a local file or an object of a
store by its name, and gets the bytes of a file inside another one. If the store or the system
fails, the caller gets that `OSError`, and not a `ValueError` about the file.

    python -m easyanimate_jax.data.decode SECONDS BYTES     one worker, on stdin and stdout
"""

import functools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from easyanimate_jax.data import media
from easyanimate_jax.data.media import Content, File, Frames, Picture, Probe, Sample
from easyanimate_jax.facts import FPS
from easyanimate_jax.storage.errors import is_of_the_system
from easyanimate_jax.storage.stores import Place, Remote, place

SECONDS = 10.0  # processor time for one file, plus 1 s for every
PIXELS = 5e6  # pixels to decode; H.264 on one core decodes 20 to 60 times as many in 1 s
STUCK = 60.0  # seconds of wall clock without any processor time used
BYTES = 2 * 2**30  # address space of a worker
START_SECONDS = 60.0  # limit for the start of a worker on a busy machine
PIPE = 2**20  # bytes of a pipe's buffer
LENGTH = 4  # bytes of an answer's length
MOST_ANSWER = 4 * media.MAX_PIXELS  # bytes


class Decoders:
    """`workers` processes that decode for any number of threads; a worker serves one at a time.

    A file may use `seconds` of processor time, and 1 s more for every `PIXELS` that it must decode;
    the bytes of a film count, too (data/streams.py). `memory` limits a worker's address space in
    bytes. After `stuck` seconds without processor time a worker is killed. All methods raise
    ValueError, naming the file, if it cannot be decoded, and OSError if its store does not answer.
    """

    def __init__(
        self, workers: int, seconds: float = SECONDS, memory: int = BYTES, stuck: float = STUCK
    ):
        self.workers, self.seconds, self.memory, self.stuck = workers, seconds, memory, stuck
        self.free = queue.LifoQueue()
        for _ in range(workers):
            self.free.put(None)

    def probe(self, path: File) -> Probe:
        """Return `media.probe(path)`, run in a worker."""
        return Probe(*self._ask(path, "probe")["probe"])

    def read_clip(self, path: File, start: int, count: int, stride: int, size) -> Frames:
        """Return `media.read_clip(...)`, run in a worker."""
        return self._ask(path, "clip", start, count, stride, size)["frames"]

    def read_at(
        self,
        path: File,
        start: float | int,
        count: int,
        size,
        first: int = 0,
        end: int | None = None,
        fps: float | int = FPS,
    ) -> Frames:
        """Return `media.read_at(...)`, run in a worker."""
        return self._ask(path, "at", start, count, size, first, end, fps)["frames"]

    def read_seconds(self, path: File) -> list[float]:
        """Return `media.read_seconds(path)`, run in a worker."""
        return self._ask(path, "seconds")["seconds"]

    def read_samples(self, path: File, samples: list[Sample]) -> Iterator[Picture]:
        """Yield the pictures of `media.read_samples(...)`, run in a worker.

        Close the iterator if you do not read it to its end; its worker serves nothing else before.
        """
        if samples:
            for answer in self._answers(path, len(samples), "samples", samples):
                yield answer["frames"]

    def read_frames(self, path: File, indices: list[int], side: int) -> Frames:
        """Return `media.read_frames(...)`, run in a worker."""
        return self._ask(path, "frames", indices, side)["frames"]

    def read_image(self, path: File, mask: bool = False) -> Picture:
        """Return `media.read_image(path, mask)`, run in a worker."""
        return self._ask(path, "image", None, mask)["frames"][0]

    def read_still(self, path: File, size: tuple[int, int] | None) -> Frames:
        """Return a picture as one frame, cropped to `size`, read in a worker."""
        return self._ask(path, "image", size)["frames"]

    def close(self) -> None:
        """End the workers; a later request starts new ones."""
        for _ in range(self.workers):
            worker = self.free.get()
            if worker:
                _end(worker)
            self.free.put(None)

    def _ask(self, path: File, *request) -> dict:
        [answer] = self._answers(path, 1, *request)
        return answer

    def _answers(self, path: File, count: int, *request) -> Iterator[dict]:
        """Yield the `count` answers to a request."""
        worker = self.free.get()
        try:
            if worker is None or worker.poll() is not None:  # killed between two files
                worker = self._start(path)
            content = b"" if isinstance(path, Place) else path.read()
            head = [str(path), _kind(path), len(content), *request]
            try:
                worker.stdin.write(json.dumps(head).encode() + b"\n")
                worker.stdin.write(content)
                worker.stdin.flush()
                for left in reversed(range(count)):
                    answer = _receive(worker, self.stuck)
                    if "error" in answer:
                        break
                    if left:
                        yield answer
            except TimeoutError:
                _end(worker)
                worker = None
                raise ValueError(
                    f"{path}: the decoder did nothing for {self.stuck:g} s; does its disk answer?"
                ) from None
            except (OSError, EOFError, ValueError):  # it has died, or its answer is not valid
                code = _end(worker)
                worker = None
                if code == -signal.SIGPROF:
                    raise ValueError(
                        f"{path}: not decoded within {self.seconds:g} seconds of processor time "
                        f"and one more for every {PIXELS / 1e6:g} million pixels"
                    ) from None
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise ValueError(
                    f"{path}: the decoder died of it ({name}); replace the file"
                ) from None
            except BaseException:  # also of a caller that has enough: the next would get its answer
                _end(worker)
                worker = None
                raise
        finally:
            self.free.put(worker)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["error"], answer["file"])
        if "error" in answer:
            raise ValueError(answer["error"])
        yield answer  # the last one, when the worker is free

    def _start(self, path: File) -> subprocess.Popen:
        command = [sys.executable, "-m", __spec__.name, str(self.seconds), str(self.memory)]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",  # the stack of each thread would use address space
            "OPENBLAS_NUM_THREADS": "1",
            "TOKIO_WORKER_THREADS": "2",  # of the client of a store
        }
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, pipesize=PIPE
        )
        try:
            _receive(worker, START_SECONDS)
        except (TimeoutError, OSError, EOFError):
            _end(worker)
            raise RuntimeError(f"{path}: {' '.join(command)} does not start") from None
        return worker


@functools.cache
def decoders() -> Decoders:
    """Return this process's decoders, one worker per core."""
    return Decoders(os.cpu_count())


def _receive(worker: subprocess.Popen, stuck: float) -> dict:
    """Return the next answer: the length of its JSON, the JSON, and the bytes that it announces.

    Raises TimeoutError after `stuck` seconds without processor time, EOFError if the worker ends.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)

        def wait() -> None:
            if selector.select(0):  # as for most frames of a film
                return
            used = _ticks(worker.pid)
            while not selector.select(stuck):
                before, used = used, _ticks(worker.pid)
                if used == before:
                    raise TimeoutError

        def read(count: int) -> np.ndarray:
            content = np.empty(min(count, MOST_ANSWER), np.uint8)
            view = memoryview(content)
            while view:
                wait()
                part = os.readv(worker.stdout.fileno(), [view])
                if not part:
                    raise EOFError
                view = view[part:]
            return content

        length = int.from_bytes(read(LENGTH).tobytes(), "big")
        answer = json.loads(read(length).tobytes())
        shape = answer.get("shape")
        if shape is None:
            return answer
        return {"frames": read(int(np.prod(shape, dtype=object))).reshape(shape)}


def _ticks(pid: int) -> float | str:
    """Return a value that grows while the process uses its processor.

    If the system does not report one, the value is the current time.
    """
    try:
        return Path(f"/proc/{pid}/schedstat").read_text().split()[0]
    except OSError:
        return time.monotonic()


def _end(worker: subprocess.Popen) -> int:
    """Kill the worker if it lives; return its exit code, negative for a signal."""
    try:
        code = worker.wait(0.05)
    except subprocess.TimeoutExpired:
        worker.kill()
        code = worker.wait()
    worker.stdin.close()
    worker.stdout.close()
    return code


def _kind(path: File) -> str:
    """Return how a worker gets a file: "local" and "remote" are opened by name."""
    if isinstance(path, Path):
        return "local"
    return "remote" if isinstance(path, Remote) else "content"


def _made(path: File, kind: str, *arguments, allow) -> Iterator[tuple[dict, np.ndarray | None]]:
    """Yield the answers to a request, with their frames."""
    if kind == "samples":
        samples = [(n, tuple(s) if isinstance(s, list) else s) for n, s in arguments[0]]
        for picture in media.read_samples(path, samples, allow):
            yield {"shape": picture.shape}, np.ascontiguousarray(picture)
    else:
        yield _answer(path, kind, *arguments, allow=allow)


def _answer(path: File, kind: str, *arguments, allow) -> tuple[dict, np.ndarray | None]:
    if kind == "probe":
        return {"probe": media.probe(path, allow)}, None
    if kind == "seconds":
        return {"seconds": media.read_seconds(path, allow)}, None
    if kind == "clip":
        start, count, stride, size = arguments
        frames = media.read_clip(path, start, count, stride, size and tuple(size), allow)
    elif kind == "at":
        start, count, size, first, end, fps = arguments
        size = size and tuple(size)
        frames = media.read_at(path, start, count, size, first, end, allow, fps)
    elif kind == "frames":
        frames = media.read_frames(path, *arguments, allow)
    else:
        size, *mask = arguments
        frames = media.read_image(path, *mask)[None]
        frames = media.resize_crop(frames, *size) if size else frames
    return {"shape": frames.shape}, np.ascontiguousarray(frames)


def _allow(pixels: int) -> None:
    """Extend the limit of processor time by the share of `pixels`."""
    left, _ = signal.getitimer(signal.ITIMER_PROF)
    signal.setitimer(signal.ITIMER_PROF, left + pixels / PIXELS)


def _work(seconds: float, memory: int) -> None:
    import resource  # some systems lack it, and only workers need it

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The signal must end this process; a parent that loaded libtpu passes on that it is ignored.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # text that a library prints must not mix with answers
    _send(output, {})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        name, kind, size, *request = json.loads(line)
        if kind == "content":
            path = Content(sys.stdin.buffer.read(size), name)
        else:
            path = place(name) if kind == "remote" else Path(name)
        try:
            for answer, frames in _made(path, *request, allow=_allow):
                _send(output, answer, frames)
        except ValueError as error:
            _send(output, {"error": str(error)})
        except Exception as error:  # a bad file may raise any exception
            answer = {"error": f"{name}: {type(error).__name__}: {error}"}
            if isinstance(error, OSError) and is_of_the_system(error):
                answer = {"errno": error.errno, "error": error.strerror, "file": name}
            _send(output, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _send(output: BinaryIO, answer: dict, frames: np.ndarray | None = None) -> None:
    line = json.dumps(answer).encode()
    parts = [len(line).to_bytes(LENGTH, "big") + line]
    for part in parts if frames is None else [*parts, frames]:
        view = memoryview(part).cast("B")
        while view:
            view = view[output.write(view) :]


if __name__ == "__main__":
    _work(float(sys.argv[1]), int(sys.argv[2]))
