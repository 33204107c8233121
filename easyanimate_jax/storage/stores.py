"""Files in object stores (`gs://`, `s3://`) and on local disks, through the same calls.

A place is a `Path` or a `Remote`; `place` makes one of text. A `Remote` has the names of a `Path`
and no `__fspath__`: a library that opens local files refuses it. A store has objects and no
folders, cannot rename, and cannot append. What both stores and disks can do is to create a file
only if there is none (`create`), which is how everything that has one owner is committed.
"""

import contextlib
import errno
import io
import mmap
import os
import posixpath
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from easyanimate_jax.storage import whole
from easyanimate_jax.storage.clients import client_of, endpoint, obstore
from easyanimate_jax.storage.errors import of_store
from easyanimate_jax.storage.local import SCHEME, local_path, quoted
from easyanimate_jax.storage.ranges import BUFFER, MOST, Part, Ranges

SCHEMES = {"gs": "Google Cloud Storage", "s3": "S3"}
TOGETHER = 16  # requests of one call at once, at most
PIECES = 4  # requests for parts of one file at once
ALIKE = 64 * 1024  # ranges with at most this many bytes between them are one request


class Found(NamedTuple):
    """A file of a listing."""

    name: str  # relative to the folder that was listed, with slashes
    size: int  # bytes
    changed: float  # seconds since 1970
    tag: str = ""  # the store's ETag; a local file has none


class Version(NamedTuple):
    """The store's mark of an object's content; another content has another mark."""

    size: int  # bytes
    tag: str


@dataclass(frozen=True)
class Remote:
    """An object, or the objects below a name, in a bucket."""

    scheme: str
    bucket: str
    key: str  # without a slash at its end; "" is the whole bucket
    listed: Version | None = field(default=None, compare=False, repr=False)  # see `stamp`

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def __truediv__(self, name: str | os.PathLike) -> "Remote":
        key = posixpath.normpath(posixpath.join("/", self.key, os.fspath(name)))
        return Remote(self.scheme, self.bucket, key.lstrip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "Remote":
        return Remote(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def absolute(self) -> "Remote":
        return self

    def with_name(self, name: str) -> "Remote":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "Remote":
        return self.parent / f"{self.stem}{suffix}"

    def is_file(self) -> bool:
        """Return True if the object exists."""
        return self.version() is not None

    def is_dir(self) -> bool:
        """Return True if an object below this name exists."""
        with _told(self):
            pages = obstore().list(_client(self), _folder(self.key), chunk_size=1)
            return any(len(page) for page in pages)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def version(self) -> Version | None:
        """Return size and tag of the object; None if there is none."""
        try:
            with _told(self):
                meta = obstore().head(_client(self), self.key)
        except FileNotFoundError:
            return None
        return Version(meta["size"], str(meta["version"] or meta["e_tag"]))

    def stamp(self) -> Version | None:
        """Return size and ETag, as the listing that found the object said; else ask for them.

        An ETag changes with the content. Listings state it, but no generation.
        """
        if self.listed:
            return self.listed
        try:
            with _told(self):
                meta = obstore().head(_client(self), self.key)
        except FileNotFoundError:
            return None
        return Version(meta["size"], _tag(meta))

    def read_bytes(self) -> bytes:
        with _told(self):
            return bytes(obstore().get(_client(self), self.key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self) -> io.BufferedReader:
        """Return a file to read, with seek and tell; storage/ranges.py says what it asks for."""
        return io.BufferedReader(Ranges(str(self), self.part), BUFFER)

    def part(self, begin: int, end: int) -> Part:
        """Return the bytes of a range, by one request; it may end after the object does."""
        from obstore.exceptions import GenericError

        with _told(self):
            try:
                found = obstore().get(_client(self), self.key, options={"range": (begin, end)})
            except GenericError as error:
                if "416 Range" not in str(error):
                    raise
                return Part(b"", *self.stamp())  # a store refuses every range of an empty object
            return Part(bytes(found.bytes()), found.meta["size"], _tag(found.meta))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        with contextlib.suppress(FileNotFoundError), _told(self):  # GCS says so, S3 does not
            obstore().delete(_client(self), self.key)


Place = Path | Remote


def place(text: str | os.PathLike | Remote) -> Place:
    """Return the place that a path or a URL names.

    Raises ValueError for another scheme, a bucket without a name, and as `local_path` does.
    """
    if isinstance(text, Remote):
        return text
    match = SCHEME.match(os.fspath(text))
    scheme = match[1].lower() if match else "file"
    if scheme == "file":
        return local_path(text)
    if scheme not in SCHEMES:
        raise ValueError(
            f"{quoted(os.fspath(text))} is no local path, and {scheme}:// is not supported; give a "
            f"local path, {' or '.join(f'{known}://BUCKET/NAME' for known in SCHEMES)}"
        )
    rest = os.fspath(text)[match.end() :]
    bucket, _, key = rest.partition("/")
    parts = [part for part in key.split("/") if part]
    slashes = match[0].count("/")
    if slashes > 2 or not bucket or {"..", "."} & set(parts) or "\0" in rest:
        raise ValueError(f"{quoted(os.fspath(text))} names no object: write {scheme}://BUCKET/NAME")
    obstore()
    return Remote(scheme, bucket, "/".join(parts))


def read_ranges(source: Place, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of ranges (begin, end) of a file; near ones of a store are one request.

    Raises FileNotFoundError, and ValueError if the file ends before a range does.
    """
    if isinstance(source, Remote):
        asked = [(begin, end) for begin, end in ranges if end > begin]  # stores refuse empty ones
        options = {"starts": [b for b, _ in asked], "ends": [e for _, e in asked]}
        with _told(source):
            found = asked and obstore().get_ranges(
                _client(source), source.key, **options, coalesce=ALIKE
            )
        read = iter(found)
        parts = [bytes(next(read)) if end > begin else b"" for begin, end in ranges]
    else:
        file = os.open(source, os.O_RDONLY)
        try:
            parts = [_pread(file, begin, end) for begin, end in ranges]
        finally:
            os.close(file)
    for part, (begin, end) in zip(parts, ranges, strict=True):
        if len(part) != end - begin:
            raise ValueError(f"{source} ends before byte {end:,}")
    return parts


def create(target: Place, content: bytes) -> bool:
    """Write a file if there is none, and return True if it now holds `content`.

    False means that it holds something else, which stays. Of several callers with different
    contents one gets True. A caller whose first answer was lost reads its own bytes back, so the
    content must tell the callers apart if they must be told apart.
    """
    made = create_file(target, lambda new: new.write(content))
    return made or target.read_bytes() == content


def create_file(target: Place, write: Callable[[BinaryIO], object]) -> bool:
    """Write a file by `write(open file)` if there is none; return whether there was none.

    A store gets it as one request, so it takes at most 5 GB.
    """
    if not isinstance(target, Remote):
        target.parent.mkdir(parents=True, exist_ok=True)
        return whole.create(target, write)
    with tempfile.TemporaryFile() as file:
        write(file)
        file.flush()
        if not os.fstat(file.fileno()).st_size:  # nothing to map
            return _create(target, b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _create(target, content)


def _create(target: Remote, content: bytes | mmap.mmap) -> bool:
    try:
        with _told(target), memoryview(content) as view:
            obstore().put(_client(target), target.key, view, mode="create", use_multipart=False)
        return True
    except FileExistsError:
        return False


def replace_bytes(target: Place, content: bytes) -> None:
    """Write a file completely or not at all; an earlier one of this name is gone."""
    if isinstance(target, Remote):
        with _told(target):
            obstore().put(_client(target), target.key, content)
    else:
        whole.replace(target, lambda new: new.write_bytes(content))


def read_tagged(source: Remote) -> tuple[bytes, dict]:
    """Return the content of an object and its tag, for `replace_if`."""
    with _told(source):
        found = obstore().get(_client(source), source.key)
        return bytes(found.bytes()), _condition(found.meta)


def replace_if(target: Remote, content: bytes, tag: dict) -> dict | None:
    """Write an object if it has still the tag, and return its new tag; None if it has not."""
    from obstore.exceptions import PreconditionError

    with contextlib.suppress(FileNotFoundError):
        with _told(target), contextlib.suppress(PreconditionError):
            how = {"mode": tag, "use_multipart": False}
            return _condition(obstore().put(_client(target), target.key, content, **how))
        now, new = read_tagged(target)
        return new if now == content else None  # as after an answer that was lost
    return None


def replace_text(target: Place, text: str) -> None:
    """Write a file as UTF-8 text, completely or not at all."""
    replace_bytes(target, text.encode())


def replace(target: Place, write: Callable[[Path], object]) -> None:
    """Write a file by `write(path of a temporary file)`, completely or not at all."""
    if not isinstance(target, Remote):
        whole.replace(target, write)
        return
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / target.name
        write(new)
        upload(new, target)


def upload(source: Path, target: Remote) -> None:
    """Copy a local file into a store, completely or not at all, in parts if it is large."""
    with _told(target):
        obstore().put(_client(target), target.key, source, max_concurrency=TOGETHER)


def download(
    source: Remote,
    target: Path,
    tag: str | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Copy an object to a local file, completely or not at all; `progress` gets numbers of bytes.

    With a `tag`, raises OSError if the object has another ETag now.
    """

    def write(new: Path) -> None:
        with open(new, "wb") as file, ThreadPoolExecutor(PIECES) as pool:
            first, lock = source.part(0, MOST), threading.Lock()

            def copy(begin: int) -> None:
                part = source.part(begin, begin + MOST) if begin else first
                if part.tag != first.tag or tag not in (None, part.tag):
                    told = "the object was overwritten meanwhile; run the same command again"
                    raise OSError(errno.ESTALE, told, str(source))
                with lock:
                    file.seek(begin)
                    progress(file.write(part.content))

            list(pool.map(copy, range(0, first.size, MOST)))

    whole.replace(target, write)


def list_files(folder: Place) -> Iterator[Found]:
    """Yield the files below a folder, also those in folders of it."""
    if isinstance(folder, Remote):
        prefix, before = _folder(folder.key), None
        with _told(folder):
            for page in obstore().list(_client(folder), prefix or None):
                for meta in page:
                    name, changed = meta["path"].removeprefix(prefix), meta["last_modified"]
                    found = Found(name, meta["size"], changed.timestamp(), _tag(meta))
                    if before and not (before.size == 0 and name.startswith(f"{before.name}/")):
                        yield before  # else it stands for the folder itself, as consoles make them
                    before = found if meta["path"].startswith(prefix) else None
            if before:
                yield before
        return
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                stat = path.stat()
            except FileNotFoundError:  # deleted meanwhile
                continue
            yield Found(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime)


def list_names(folder: Place) -> list[str]:
    """Return the sorted names of the files and folders that stand directly in a folder."""
    if isinstance(folder, Remote):
        prefix = _folder(folder.key)
        with _told(folder):
            found = obstore().list_with_delimiter(_client(folder), prefix or None)
        paths = [meta["path"] for meta in found["objects"]] + list(found["common_prefixes"])
        return sorted(path.removeprefix(prefix).rstrip("/") for path in paths)
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def delete_folder(folder: Place) -> None:
    """Delete all files below a folder; none is no error."""
    if isinstance(folder, Remote):
        keys = [f"{_folder(folder.key)}{found.name}" for found in list_files(folder)]
        with _told(folder):
            for first in range(0, len(keys), 1000):
                obstore().delete(_client(folder), keys[first : first + 1000])
    else:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Place, mode: int = 0o777) -> None:
    """Make a local folder and its parents; a store has none to make."""
    if not isinstance(folder, Remote):
        folder.mkdir(parents=True, exist_ok=True, mode=mode)


def kvstore(folder: Place) -> dict:
    """Return the tensorstore spec of a folder."""
    if not isinstance(folder, Remote):
        return {"driver": "file", "path": f"{folder}/"}
    spec = {"bucket": folder.bucket, "path": _folder(folder.key)}
    if folder.scheme == "gs":
        return {"driver": "gcs", **spec}
    server = endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    where = {"endpoint": server, "aws_region": region} if server else {}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else tensorstore looks at more places, and says so
        where["aws_credentials"] = {"type": "environment"}
    return {"driver": "s3", **spec, **where}


def _client(remote: Remote):
    return client_of(remote.scheme, remote.bucket)


@contextlib.contextmanager
def _told(remote: Remote) -> Iterator[None]:
    """Turn obstore's errors into OSErrors that name the object, as those of a local file do.

    Raises ValueError for a range after the end of the object, and for names that are no paths.
    """
    from obstore.exceptions import BaseError, InvalidPathError

    try:
        yield
    except InvalidPathError as error:  # of an object in a listing: a//b, a/../b
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{remote}: {told}; rename the object") from error
    except (BaseError, FileNotFoundError) as error:  # obstore's readers raise the second
        if "416 Range" in str(error):
            raise ValueError(f"{remote} ends before the bytes that are wanted") from error
        raise of_store(error, str(remote)) from error


def _tag(meta: dict) -> str:
    return (meta["e_tag"] or "").strip('"')


def _condition(meta: dict) -> dict:
    """Return what obstore wants to know of the version that an update replaces."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}


def _folder(key: str) -> str:
    return f"{key}/" if key else ""


def _pread(file: int, begin: int, end: int) -> bytes:
    parts = []
    while begin < end and (part := os.pread(file, end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return b"".join(parts)
