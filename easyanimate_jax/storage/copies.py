"""Local copies of folders and files of a store, for libraries that read local files only.

    CACHE/easyanimate_jax/stores/KEY/gs/BUCKET/NAME    KEY: a digest of the files and their ETags

CACHE is $XDG_CACHE_HOME or ~/.cache. So a file is copied once for all processes of a host, and
again when it is overwritten. A file is there completely or not at all, and a copy that was stopped
goes on. Nothing is deleted.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from easyanimate_jax.storage.local import cache_folder
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.storage.stores import Found, Place, Remote, download, list_files

logger = logging.getLogger(__name__)

TOGETHER = 4  # files that are copied at once
LARGE = 10**8  # bytes; a larger copy shows its progress
SINGLE = "."  # name of a single file, relative to itself


def local_copy(source: Place, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Return the local path of a place, after its files were copied if it is in a store.

    Of a folder, only the files with names that are `wanted` are copied; all are listed. Raises
    ValueError if there is nothing, or no folder for copies; OSError if the store or the disk fails.
    """
    if not isinstance(source, Remote):
        return source
    found = sorted(list_files(source))
    if not found and (stamp := source.stamp()):
        found = [Found(SINGLE, stamp.size, 0.0, stamp.tag)]
    if not found:
        raise ValueError(f"there is no {source}; give a folder or a file")
    root = _root(source, found)
    target = root / source.scheme / source.bucket / source.key
    files = {f: target / f.name for f in found if f.name == SINGLE or wanted(f.name)}
    if not all(path.exists() for path in files.values()):
        _copy(source, root, files)
    return target


def _root(source: Remote, found: Sequence[Found]) -> Path:
    """Return the folder of a copy."""
    cache = cache_folder()
    if cache is None:
        raise ValueError(f"{source} needs a folder for its copy; let XDG_CACHE_HOME name one")
    files = [[f.name, f.size, f.tag] for f in found]
    told = json.dumps([source.scheme, source.bucket, source.key, files]).encode()
    key = hashlib.blake2b(told, digest_size=16).hexdigest()
    return cache / "stores" / key


def _copy(source: Remote, root: Path, files: Mapping[Found, Path]) -> None:
    """Copy the files that are missing; other processes wait until this one has done it."""
    with FolderLock(root, option="XDG_CACHE_HOME", mode=0o700, wait=math.inf) as lock:
        lock.begun = True  # keep what is there when the rest fails
        missing = [found for found, path in files.items() if not path.exists()]
        total = sum(found.size for found in missing)
        logger.info(f"copying {source} to {root}: {len(missing)} files, {total:,} bytes")
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=total < LARGE, desc=source.name)

        def copy(found: Found) -> None:
            files[found].parent.mkdir(parents=True, exist_ok=True)
            whole = source if found.name == SINGLE else source / found.name
            download(whole, files[found], found.tag, progress=bar.update)

        with bar, ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(copy, missing))
