"""A local folder whose files are kept in an object store, whole, whenever they have changed.

A store cannot append. So the files of a run that grow (metrics, events, logs) are written to a
local disk, and a thread uploads each file that is not as it was at the last upload.
"""

import getpass
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from easyanimate_jax.storage.stores import (
    Remote,
    download,
    list_files,
    list_names,
    replace_bytes,
    upload,
)
from easyanimate_jax.storage.whole import LEFT

logger = logging.getLogger(__name__)

MINUTE = 60.0  # seconds between uploads
LARGE = 2**26  # bytes from which a file goes up in parts, and not at once
LOCAL = ("lock", "heartbeats", "checkpoints")  # names in the folder that are not uploaded


class Mirror:
    """Keeps those files of `folder` in `remote` whose relative names are `wanted`.

    Nothing is uploaded once `held()` is false, because the files are then another process's. A file
    that cannot be uploaded costs a warning, and is tried again with the next ones.
    """

    def __init__(
        self,
        folder: Path,
        remote: Remote,
        wanted: Callable[[str], bool],
        held: Callable[[], bool] = lambda: True,
    ):
        self.folder, self.remote, self.wanted, self.held = folder, remote, wanted, held
        self.sent: dict[str, tuple[int, int]] = {}  # size and time of the file that was uploaded
        self.busy, self.ended = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def fetch(self, needed: Callable[[str], bool]) -> None:
        """Download the needed files, and delete all other wanted ones that an earlier run left."""
        for name in list_names(self.remote):
            if _is_shared(name) and needed(name):
                download(self.remote / name, self.folder / name)
                self.sent[name] = _stamp(self.folder / name)
        for name in self._local():
            if name not in self.sent:
                (self.folder / name).unlink(missing_ok=True)

    def start(self) -> None:
        """Begin to upload what changes, every minute."""
        self.thread.start()

    def upload(self) -> list[str]:
        """Upload the files that changed; return the names of those that could not be."""
        failed = []
        with self.busy:
            for name in self._local() if self.held() else ():
                path = self.folder / name
                try:
                    stamp = _stamp(path)
                    if self.sent.get(name) == stamp:
                        continue
                    _send(path, self.remote / name, stamp[0])
                    self.sent[name] = stamp
                except FileNotFoundError:  # deleted meanwhile, or the bucket is gone
                    failed += [name] if path.exists() else []
                except OSError as error:
                    failed.append(name)
                    logger.warning("%s was not uploaded, and is tried again: %s", path, error)
                    break  # the others would wait for the store as long
        return failed

    def close(self) -> None:
        """Upload for the last time, and end the thread."""
        self.ended.set()
        if self.thread.ident:
            self.thread.join()
        if failed := self.upload():
            logger.error("%s is not in %s: copy it from %s", *(failed[0], self.remote, self.folder))

    def _local(self) -> list[str]:
        names = (file.name for file in list_files(self.folder))
        return sorted(n for n in names if _is_shared(n) and self.wanted(n))

    def _run(self) -> None:
        while not self.ended.wait(MINUTE):
            self.upload()


def work_folder(remote: Remote) -> Path:
    """Return the local folder for the files of a run in a store, below the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):  # the user has no home
        caches = os.path.join(tempfile.gettempdir(), f"cache-{getpass.getuser()}")
    digest = hashlib.blake2b(str(remote).encode(), digest_size=8).hexdigest()
    return Path(caches, "easyanimate_jax", "runs", digest, remote.name or remote.bucket)


def _is_shared(name: str) -> bool:
    return name.split("/")[0] not in LOCAL and not LEFT.fullmatch(Path(name).name)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _send(path: Path, target: Remote, size: int) -> None:
    if size < LARGE:
        replace_bytes(target, path.read_bytes())
    else:
        upload(path, target)
