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
    return FOLDER / found if _is_name(found) else found


def lasting_name(path: Place) -> str:
    """Return a name of a model that other folders know too: its own, or its absolute path."""
    return str(path) if _is_name(path) else str(path.absolute())


def _is_name(path: Place) -> bool:
    return isinstance(path, Path) and str(path) in NAMES and not path.exists()
