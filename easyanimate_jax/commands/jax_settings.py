"""Settings of JAX that all commands with compiled programs share; JAX reads them at its import.

JAX keeps compiled programs in a folder, its compilation cache, so that a later start does not
compile them again. The variables of the user come first: JAX_COMPILATION_CACHE_DIR names another
folder, and keeps nothing if it is empty.
"""

import logging
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

from easyanimate_jax.storage.local import cache_folder

logger = logging.getLogger(__name__)

MAX_BYTES = 10 * 2**30  # of the cache; beyond it JAX deletes what was not used for longest
MIN_SECONDS = 0.1  # programs that compile faster are not kept; JAX's default, 1, leaves out many
SETTLED = 60.0  # seconds after which an entry is not being written any more


def set_up_jax(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have JAX use more of a GPU's memory, and keep compiled programs, unless the user says how.

    A folder that cannot be written costs the cache and one line of warning.
    """
    # JAX reserves 75 % of GPU memory by default.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(MIN_SECONDS))
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        return
    caches = cache_folder(environment)
    if caches is None:  # the user has no home
        return
    folder = caches / "compiled"
    try:
        # Programs are code: other users must not write them.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_halves(folder)
        (folder / ".writable").touch()
    except OSError as error:
        logger.warning(
            "compiled programs are not kept, because %s cannot be written (%s); name a folder by "
            "JAX_COMPILATION_CACHE_DIR",
            *(folder, error.strerror),
        )
        return
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))


def _remove_halves(folder: Path) -> None:
    """Remove entries that a kill cut short.

    They lack the file with the time of their last use. JAX would fail at each of them whenever it
    looks for entries to delete, and then keep no program any more.
    """
    for entry in folder.glob("*-cache"):
        used = folder / f"{entry.name.removesuffix('-cache')}-atime"
        if not used.exists() and time.time() - entry.stat().st_mtime > SETTLED:
            entry.unlink(missing_ok=True)
