"""Weights in a store as local files, because loaders read slices of local files."""

import os
from pathlib import Path

from easyanimate_jax.storage.copies import local_copy
from easyanimate_jax.storage.stores import Remote, place
from easyanimate_jax.weights.run_folder import is_run


def at_hand(path: str | os.PathLike | Remote, *parts: str) -> Path:
    """Return the local path of weights; those in a store are copied first (storage/copies.py).

    With `parts`, of a folder only its own files and those of these folders in it are copied. Raises
    ValueError for a run in a store, and as `place` and `local_copy` do.
    """
    source = place(path)
    if isinstance(source, Remote) and is_run(source):
        raise ValueError(
            f"{source} is a run; copy it to a local disk and give that path, or give the folder of "
            f"its weights that `convert` writes"
        )

    def wanted(name: str) -> bool:
        folder, slash, _ = name.partition("/")
        return not slash or (folder in parts if parts else folder != "checkpoints")

    return local_copy(source, wanted)
