"""The files below a folder of a source: a local folder is walked, one in a store is listed once."""

from functools import cached_property
from pathlib import Path

from easyanimate_jax.storage.stores import Place, Remote, Version, list_files


class Folder:
    """A folder and the names below it, relative to it and with slashes."""

    def __init__(self, place: Place):
        self.place = place

    def __str__(self) -> str:
        return str(self.place)

    @cached_property
    def names(self) -> list[str]:
        """Return the names of files, also in folders of the folder, in order of their parts.

        Names of local folders and of links to nothing are among them.
        """
        if isinstance(self.place, Remote):
            return sorted(self._listed, key=lambda name: name.split("/"))
        return [path.relative_to(self.place).as_posix() for path in sorted(self.place.rglob("*"))]

    def has_file(self, name: str) -> bool:
        """Return True if a name of `names` is one of a file."""
        return isinstance(self.place, Remote) or (self.place / name).is_file()

    def has(self, name: str) -> bool:
        """Return True if a file, or a local folder, has this name."""
        local = isinstance(self.place, Path)
        return (self.place / name).exists() if local else name in self._listed

    def stamp(self, name: str) -> Version | None:
        """Return size and ETag of an object; None for a local file."""
        return self._listed.get(name)

    @cached_property
    def _listed(self) -> dict[str, Version]:
        if not isinstance(self.place, Remote):
            return {}
        return {found.name: Version(found.size, found.tag) for found in list_files(self.place)}
