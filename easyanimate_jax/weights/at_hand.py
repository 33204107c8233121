"""Weights in a store as local files, because loaders read slices of local files."""

import os

from easyanimate_jax.storage.copies import local_copy
from easyanimate_jax.storage.stores import Place, Remote
from easyanimate_jax.weights.pretrained import model_place
from easyanimate_jax.weights.run_folder import is_run


def at_hand(path: str | os.PathLike | Remote, *parts: str) -> Place:
    """Return the local path of weights; those in a store are copied first (storage/copies.py).

    A name of `weights.pretrained` is a path too.

    With `parts`, of a folder only its own files and those of these folders in it are copied. A run
    stays where it is, for its checkpoints are read in place. Raises ValueError as `model_place` and
    `local_copy` do.
    """
    source = model_place(path)
    if is_run(source):
        return source

    def wanted(name: str) -> bool:
        folder, slash, _ = name.partition("/")
        return not slash or (folder in parts if parts else folder != "checkpoints")

    return local_copy(source, wanted)
