"""The process that samples for a server: it alone holds the models and the device.

It reads lines of JSON from stdin: a batch of jobs, or the id of a job to cancel. It writes lines of
JSON to stdout: how far a batch is, and how each job ended. Its end can therefore fail the jobs of
one batch, and never the server. It ends with its parent.

    python -m easyanimate_jax.serving.engine FOLDER SETTINGS
"""

import errno
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from easyanimate_jax.data import media
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.generation.guard import suspicion
from easyanimate_jax.generation.outputs import Origin, record, write_as
from easyanimate_jax.generation.request import FILES, SAMPLING, Asked, SampleRequest
from easyanimate_jax.runs import load
from easyanimate_jax.runs.parts import Opened, open_parts
from easyanimate_jax.runs.sample import evaluations, examine, generate, shape_of, warn
from easyanimate_jax.serving.store import RESERVE, check_room
from easyanimate_jax.storage.stores import place
from easyanimate_jax.training.safety.supervisor import die_with_parent
from easyanimate_jax.weights.adapters import open_loras
from easyanimate_jax.weights.folder import Weights

FIRST = "_first.png"  # the first frame of ID.mp4 is ID_first.png
SHEET = "_sheet.png"
WRITERS = 4  # threads that write the videos of a batch
LORA = "lora"  # the field of a request with [name, weight] of each LoRA
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk takes no more


class Settings(NamedTuple):
    """The models and LoRAs of an engine, and the options with which it loads them."""

    models: dict[str, str]  # the folder of each model, by its name in requests
    loras: Mapping[str, str] = MappingProxyType(
        {}
    )  # the file of each LoRA, by its name in requests
    weights: str = "full"  # or int8
    weights_of: Weights = "ema"
    low_memory: bool = False
    tile: int | None = None


class Cancelled(Exception):
    """All jobs of the batch are cancelled."""


class Engine:
    """Samples batches of jobs with one of several models; one is in memory at a time.

    `tell` is called with each event: a dict with "event" and its values. `folder` is that of
    `serving.store.Store`.
    """

    def __init__(self, folder: Path, settings: Settings, tell: Callable[[dict], None]):
        self.folder, self.settings, self.tell = folder, settings, tell
        self.cancelled: set[str] = set()
        self.files = Decoders(1)
        self.name: str | None = None  # of the model in memory
        self.loras: list = []  # [name, weight] of those in it
        self.opened: Opened | None = None
        self.run: load.Pipeline | None = None

    def work(self, model: str, jobs: Sequence[dict]) -> None:
        """Sample a batch of jobs, {"id", "request"}, and tell how each ended."""
        ids = [job["id"] for job in jobs]
        try:
            self._use(model, jobs[0]["request"].get(LORA, []))
            asked = [Asked(request_of(job["request"], self.folder, job["id"])) for job in jobs]
            asked = examine(asked, self.opened, self.files)
            self._sample(ids, asked)
        except Cancelled:
            for id in ids:
                self._fail(id, "cancelled", "the job was cancelled")
        except Exception as error:
            code, message = cause_of(error)
            if code != "internal" or len(ids) == 1:  # else each is tried alone
                for id in ids:
                    self._fail(id, code, message)
            if code == "internal":
                raise  # the engine ends, with a traceback in the log

    def load(self, model: str) -> None:
        """Read the weights of a model now, and tell why if they cannot be read."""
        try:
            self._use(model, [])
            if not self.settings.low_memory:
                _ = self.run.diffusion.model, self.run.diffusion.vae, self.run.encoder
        except Exception as error:
            code, message = cause_of(error)
            if code == "internal":
                raise
            self.name = None  # each job tries again
            self.tell({"event": "unusable", "model": model, "message": message})

    def _use(self, model: str, loras: list) -> None:
        if (self.name, self.loras) == (model, loras):
            return
        how = self.settings
        gone = [model] * (model not in how.models) + [n for n, _ in loras if n not in how.loras]
        if gone:  # a job of an earlier server
            raise ValueError(f"{', '.join(gone)}: not served any more; ask for what is")
        self.run = self.opened = self.name = None  # its memory is free before the next is read
        self.opened = open_model(how, model)
        weighted = open_loras((how.loras[name], weight) for name, weight in loras)
        self.run = load.load_opened(
            self.opened,
            low_memory=how.low_memory,
            int8=how.weights == "int8",
            loras=weighted,
        )
        self.name, self.loras = model, loras

    def _sample(self, ids: Sequence[str], asked: Sequence[Asked]) -> None:
        total, began = evaluations(asked[0]), time.perf_counter()
        done = 0

        def progress(number: int) -> None:
            nonlocal done
            done += 1
            if self.cancelled.issuperset(ids):
                raise Cancelled
            self.tell({"event": "progress", "ids": ids, "done": done, "of": total})

        said: list[str] = []
        warn(asked, self.run.encoder, said.append)
        how = {"progress": progress, "files": self.files}
        videos = generate(asked, self.run, self.settings.tile, said.append, **how)
        seconds = (time.perf_counter() - began) / len(ids)

        def finish(id: str, one: Asked, frames) -> None:
            if id in self.cancelled:
                self._fail(id, "cancelled", "the job was cancelled")
                return
            file = self._write(id, one, frames, seconds)
            notes = [*said, *filter(None, [suspicion(frames)])]
            self.tell({"event": "made", "id": id, "file": file, "seconds": seconds, "notes": notes})

        with ThreadPoolExecutor(WRITERS) as pool:  # encoders and the disk work side by side
            list(pool.map(finish, ids, asked, videos))

    def _write(self, id: str, one: Asked, frames, seconds: float) -> str:
        """Write the files of a job to disk, and return the name of the video."""
        videos, settings = self.folder / "videos", self.settings
        options = {"weights": settings.weights, "weights-of": settings.weights_of}
        options |= {"tile": settings.tile} if settings.tile else {}
        if self.opened.step is not None:
            options["step"] = self.opened.step
        if self.loras:
            options["lora"] = [f"{settings.loras[name]}:{weight}" for name, weight in self.loras]
        origin = Origin(place(settings.models[self.name]), options, {}, self.opened.meta)
        sidecar = record(one, origin, videos, seconds)
        check_room(self.folder, RESERVE // 2)
        try:
            path = write_as(id, videos, frames, sidecar, fps=one.request.fps)
            media.write_png(videos / f"{id}{FIRST}", frames[0])
            for written in videos.glob(f"{id}*"):
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        except OSError:  # such as a full disk
            for written in videos.glob(f"{id}*"):
                written.unlink()
            raise
        return path.name

    def _fail(self, id: str, code: str, message: str) -> None:
        self.tell({"event": "failed", "id": id, "code": code, "message": message})


def open_model(settings: Settings, name: str) -> Opened:
    """Return the paths and configs of a model; no weight is read. Raises ValueError."""
    return open_parts(settings.models[name], weights=settings.weights_of)


def request_of(fields: dict, folder: Path, id: str) -> SampleRequest:
    """Return a job's request, with the paths of its files."""
    fields = {name: value for name, value in fields.items() if name != LORA}
    for name in set(FILES) & set(fields):
        fields[name] = str(folder / "uploads" / id / fields[name])
    if "guided" in fields:
        fields["guided"] = tuple(fields["guided"])
    return SampleRequest(**fields)


def likeness(model: str, loras: list, request: SampleRequest, id: str) -> str:
    """Return a text that is equal for jobs that one batch may sample; `request` is examined.

    With TeaCache a video depends on the others of its batch, so such a job is like no other.
    """
    same = [getattr(request, name) for name in (*SAMPLING, "picture_noise")]
    alone = id if request.teacache else None
    return json.dumps([model, loras, shape_of(request), same, alone])


def cause_of(error: Exception) -> tuple[str, str]:
    """Return the code and the message of a failed job; "internal" is a fault of this program."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out_of_memory", "there is too little memory; use fewer frames or a smaller size"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return "disk_full", "the disk of the server is full"
    if isinstance(error, FloatingPointError):
        return "not_finite", text
    if isinstance(error, ValueError):
        return "invalid_input", text
    return "internal", "this is a fault of the server; its log says more"


def main(arguments: Sequence[str]) -> None:
    """Work for the server on stdin and stdout until stdin ends."""
    die_with_parent()  # also while it denoises and reads no order
    folder, settings = Path(arguments[0]), Settings(**json.loads(arguments[1]))
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with events
    lock = threading.Lock()

    def tell(event: dict) -> None:
        with lock:
            output.write(json.dumps(event) + "\n")
            output.flush()

    engine, batches = Engine(folder, settings, tell), queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if "cancel" in order:
                engine.cancelled.add(order["cancel"])
            else:
                batches.put(order)
        os._exit(0)  # the server has ended

    threading.Thread(target=listen, daemon=True).start()
    tell({"event": "started"})
    while True:
        order = batches.get()
        if "load" in order:
            engine.load(order["load"])
        else:
            engine.work(order["model"], order["jobs"])
        engine.cancelled.clear()
        tell({"event": "idle"})


if __name__ == "__main__":
    main(sys.argv[1:])
