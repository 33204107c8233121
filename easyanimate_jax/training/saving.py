"""Write a checkpoint in the background: to a folder of a disk, or to an object store.

On a disk orbax writes the items and the metadata below a temporary name and renames the folder. In
a store the items go to a folder of their own save, every process says that it is done, and process
0 creates the commit that makes the save the step. Background threads use no collectives.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from easyanimate_jax.storage.local import without_patterns
from easyanimate_jax.storage.stores import Remote
from easyanimate_jax.training.safety.faults import Faults
from easyanimate_jax.weights import array_item
from easyanimate_jax.weights.steps import StepCommits, StepFolders, Steps, sealed

ITEMS = ("state", "ema")
SLICE = 2**20  # bytes of a replicated array that a device writes at least
SPARE_SPACE = 1.2  # required free disk space, as a multiple of the state's bytes
PATIENCE = 600  # seconds that a process waits for what the others write
LOOK = 0.5  # seconds between looks whether the others are done

Items = Mapping[str, dict[str, jax.Array]]


@runtime_checkable
class Saver(Protocol):
    """Writes one checkpoint at a time."""

    def refusal(self, size: int) -> str:
        """Return why a checkpoint of `size` bytes cannot be written; "" if it can."""

    def start(self, step: int, items: Items, meta: dict) -> None:
        """Copy the arrays to the host, and begin to write them."""

    def finished(self) -> bool:
        """Return True if the checkpoint is complete, or has failed."""

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises what made it fail."""

    def close(self) -> None:
        """End the background work."""


def saver_for(steps: Steps, faults: Faults, before_done: Callable[[], None]) -> Saver:
    """Return the saver of a place; a store's calls `before_done` in a thread."""
    if not isinstance(steps.folder, Remote):
        return FolderSaver(steps, faults)
    writer = OrbaxWriter() if steps.folder.scheme == "gs" else ArrayWriter()
    return StoreSaver(steps, writer, faults, before_done)


class FolderSaver:
    """Writes to a folder of a disk, by orbax."""

    def __init__(self, steps: StepFolders, faults: Faults):
        self.steps, self.folder = steps, steps.folder
        self.place = without_patterns(self.folder)
        self.latest = 0  # the step that orbax writes, or wrote last
        # At this callback all files are written, but the step does not have its name yet.
        self.checkpointer = checkpointer(lambda: faults.kill("finalising", self.latest))

    def refusal(self, size: int) -> str:
        """Return why a checkpoint of `size` bytes cannot be written; "" if it can."""
        free = shutil.disk_usage(self.folder).free
        if same_for_all(free >= SPARE_SPACE * size):
            return ""
        return f"{free / 1e9:.2f} GB are free, and {size / 1e9:.2f} GB to write"

    def start(self, step: int, items: Items, meta: dict) -> None:
        """Copy the arrays to the host, and begin to write them."""
        if jax.process_index() == 0:  # the threads of a failed save may have written until now
            self.steps.remove_leftovers()
        self.latest = step
        args = composite(items, meta=ocp.args.JsonSave(sealed(meta)))
        self.checkpointer.save(self.place / str(step), args=args)

    def finished(self) -> bool:
        """Return True if the step has its name."""
        return (self.folder / str(self.latest)).is_dir()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises what made it fail."""
        self.checkpointer.wait_until_finished()

    def close(self) -> None:
        """End the background work."""
        self.checkpointer.close()


class StoreSaver:
    """Writes to an object store: the items by `writer`, then the commit.

    A save counts as failed if the other processes are not done `PATIENCE` seconds after this one.
    """

    def __init__(
        self,
        steps: StepCommits,
        writer: "OrbaxWriter | ArrayWriter",
        faults: Faults,
        before_done: Callable[[], None],
    ):
        self.steps, self.writer, self.faults = steps, writer, faults
        self.before_done = before_done
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.thread, self.error = threading.Thread(), None

    def refusal(self, size: int) -> str:
        """Return "": only a write tells whether a store takes more."""
        return ""

    def start(self, step: int, items: Items, meta: dict) -> None:
        """Copy the arrays to the host, and begin to write them."""
        number = int(same_for_all(np.uint32(secrets.randbits(32))))
        name = f"{step}-{number:08x}"
        write = self.writer.start(self.steps.save_folder(name), items)
        meta = sealed(meta | {"data": name, "format": self.writer.format})
        self.error = None
        self.thread = threading.Thread(target=self._finish, args=(step, name, meta, write))
        self.thread.start()

    def finished(self) -> bool:
        """Return True if the checkpoint is complete, or has failed."""
        return not self.thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises what made it fail."""
        self.thread.join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the background work."""
        self.writer.close()

    def _finish(self, step: int, name: str, meta: dict, write: Callable[[], None]) -> None:
        try:
            write()
            self.faults.kill("uploaded", step)
            self.before_done()
            self.steps.done(name, self.process, self.processes)
            self.faults.kill("finalising", step)
            if self.process == 0:
                self._await(partial(self._all_done, name), name)
                self.steps.commit(step, meta)
            else:
                self._await(partial(self.steps.is_committed, step, name), name)
        except Exception as error:  # `wait` raises it in the thread that trains
            self.error = error

    def _all_done(self, name: str) -> bool:
        return self.steps.number_done(name, self.processes) == self.processes

    def _await(self, ready: Callable[[], bool], name: str) -> None:
        """Wait until `ready()`. Raises TimeoutError if the others take too long."""
        end = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > end:
                done = self.steps.number_done(name, self.processes)
                raise TimeoutError(
                    f"{done} of {self.processes} processes have written their arrays, and no more "
                    f"have in {PATIENCE} s"
                )
            time.sleep(LOOK)


class OrbaxWriter:
    """Writes the items of a save by orbax, which knows `gs://`."""

    format = "orbax"

    def __init__(self):
        self.checkpointer = checkpointer()

    def start(self, folder: Remote, items: Items) -> Callable[[], None]:
        """Copy the arrays to the host; return the function that waits until they are written."""
        self.checkpointer.save(epath.Path(str(folder)), args=composite(items))
        return self.checkpointer.wait_until_finished

    def close(self) -> None:
        """End the background work."""
        self.checkpointer.close()


class ArrayWriter:
    """Writes each array of a save by tensorstore."""

    format = "arrays"

    def start(self, folder: Remote, items: Items) -> Callable[[], None]:
        """Copy the arrays to the host; return the function that writes them."""
        held = {item: array_item.on_host(named) for item, named in items.items()}
        main = jax.process_index() == 0

        def write() -> None:
            for item in list(held):
                array_item.write(folder / item, held.pop(item), metadata=main)

        return write

    def close(self) -> None:
        """Do nothing: no work goes on."""


def checkpointer(named: Callable[[], None] | None = None) -> ocp.AsyncCheckpointer:
    """Return orbax's checkpointer of our items; `named` is called before a step gets its name.

    By default orbax splits every replicated array over its replicas, with a program for each shape.
    With small arrays these programs would hold the first save up for seconds.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    items = {item: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for item in ITEMS}
    handler = ocp.CompositeCheckpointHandler(**items, meta=ocp.JsonCheckpointHandler())
    options = ocp.options.AsyncOptions(post_finalization_callback=named)
    return ocp.AsyncCheckpointer(handler, timeout_secs=PATIENCE, async_options=options)


def composite(items: Items, **more) -> ocp.args.Composite:
    """Return orbax's arguments to save items."""
    saved = {item: ocp.args.PyTreeSave(named) for item, named in items.items()}
    return ocp.args.Composite(**saved, **more)


def same_for_all(value):
    """Return the value of process 0 in every process."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value))
