"""The models that come with the package, found by their names."""

import os
from pathlib import Path

from easyanimate_jax.storage.stores import Place, Remote, place

FOLDER = Path(__file__).parents[1] / "pretrained"
NAMES = ("emoji",)


def model_place(path: str | os.PathLike | Remote) -> Place:
    """Return the place of a model: of one that comes with the package, its folder there.

    Such a name counts if nothing else has it in the current folder. Raises ValueError as `place`
    does.
    """
    found = place(path)
    if isinstance(found, Path) and str(found) in NAMES and not found.exists():
        return FOLDER / found
    return found
