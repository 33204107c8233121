"""Where the checkpoints of a run live: folders on a disk, or commits in an object store.

On a disk a step is a folder, which gets its name by a rename when it is complete. A store cannot
rename, so there a step is one small object, created last and only if there is none:

    RUN/checkpoints/data/500-1f9c02ab/state/...    the arrays, of step 500 and this one save of it
    RUN/checkpoints/data/500-1f9c02ab/done/3-of-64    process 3 has written all it had to
    RUN/checkpoints/commits/000000500.json         the step: its metadata, and which data it has
    RUN/checkpoints/verified/500-1f9c02ab/3-of-64  the arrays were read and hold the saved bits
    RUN/checkpoints/corrupt/500-1f9c02ab           a tombstone: the step is damaged; why

Every save has a name of its own, so two never write the same object. Nobody looks at `data/` to
learn which steps exist, and one process of a run deletes.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from easyanimate_jax.storage.errors import AnotherRunError, is_of_the_system
from easyanimate_jax.storage.stores import (
    Place,
    Remote,
    create,
    delete_folder,
    list_files,
    list_names,
)

logger = logging.getLogger(__name__)

LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleting")
OLD = 6 * 3600.0  # seconds without a new object, after which a save in a store has ended
SAVE = re.compile(r"(\d+)-[0-9a-f]{8}")  # the name of a save: its step, and a random number


@runtime_checkable
class Steps(Protocol):
    """The checkpoints of a run, by the number of updates made."""

    folder: Place
    distant: bool  # whether a reader may fail because of a network

    def complete(self) -> list[int]:
        """Return the steps whose checkpoints are complete, in ascending order."""

    def meta(self, step: int) -> dict:
        """Return the metadata of a step. Raises ValueError if it is missing or damaged.

        Raises OSError if the system is the reason why it does not read.
        """

    def data(self, step: int, meta: dict) -> Place:
        """Return the folder of the arrays of a step with this metadata."""

    def is_verified(self, step: int) -> bool:
        """Return True if all processes of some run have read a step and found it intact."""

    def mark(self, step: int, process: int, processes: int) -> None:
        """Record that a process has read its share of a step and found it intact."""

    def set_aside(self, step: int, reason: str) -> None:
        """Store that a step is damaged, and why, so that it is never restored."""

    def damaged(self) -> dict[str, str]:
        """Return the reasons of the steps that were set aside, by their names."""

    def withdraw(self, step: int) -> list[Place]:
        """Make a step no step any more; return the folders to delete then."""

    def remove_leftovers(self) -> None:
        """Delete what killed or failed saves and killed deletions left."""


def steps_in(folder: str | os.PathLike | Remote) -> Steps:
    """Return the steps below a run's folder `checkpoints`."""
    return StepCommits(folder) if isinstance(folder, Remote) else StepFolders(Path(folder))


class StepFolders:
    """Steps on a disk: `FOLDER/500`, and `FOLDER/500.corrupt` once it was set aside."""

    distant = False

    def __init__(self, folder: Path):
        self.folder = folder

    def complete(self) -> list[int]:
        """Return the steps whose checkpoints are complete, in ascending order."""
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())

    def meta(self, step: int) -> dict:
        """Return the metadata of a step. Raises ValueError if it is missing or damaged.

        Raises OSError if the system is the reason why it does not read.
        """
        path = self.folder / str(step)
        file = path / "meta" / "metadata"
        try:
            content = file.read_bytes()
        except OSError as error:
            if is_of_the_system(error):
                raise
            raise ValueError(_no_meta(path, file)) from error
        return _opened(content, path, file)

    def data(self, step: int, meta: dict) -> Path:
        """Return the folder of a step."""
        return self.folder / str(step)

    def is_verified(self, step: int) -> bool:
        """Return True if all processes of some run have read a step and found it intact."""
        names = (self.folder / str(step)).glob("verified-*-of-*")
        return _all_of(path.name.removeprefix("verified-") for path in names)

    def mark(self, step: int, process: int, processes: int) -> None:
        """Record that a process has read its share of a step and found it intact."""
        (self.folder / str(step) / f"verified-{process}-of-{processes}").touch()

    def set_aside(self, step: int, reason: str) -> None:
        """Rename a damaged step to STEP.corrupt, and store `reason` in it."""
        path = self.folder / str(step)
        target, number = path.with_name(f"{step}.corrupt"), 1
        while target.exists():
            number += 1
            target = path.with_name(f"{step}.corrupt{number}")
        try:
            os.replace(path, target)
        except FileNotFoundError:  # another process found the damage, too
            return
        (target / "reason").write_text(reason + "\n")
        logger.error("checkpoint %d is damaged, set aside as %s: %s", step, target.name, reason)

    def damaged(self) -> dict[str, str]:
        """Return the reasons of the steps that were set aside, by their names, or ""."""
        reasons = {path.name: path / "reason" for path in sorted(self.folder.glob("*.corrupt*"))}
        return {n: r.read_text().strip() if r.is_file() else "" for n, r in reasons.items()}

    def withdraw(self, step: int) -> list[Place]:
        """Rename a step, so that no partial step has a valid name; return the new folder."""
        doomed = self.folder / f"{step}.deleting"
        os.replace(self.folder / str(step), doomed)
        return [doomed]

    def remove_leftovers(self) -> None:
        """Delete the files that killed or failed saves and killed deletions left."""
        for pattern in LEFTOVERS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


class StepCommits:
    """Steps in a store: objects `FOLDER/commits/000000500.json`, each created once and last."""

    distant = True

    def __init__(self, folder: Remote):
        self.folder = folder

    def complete(self) -> list[int]:
        """Return the steps with a commit and without a tombstone, in ascending order."""
        tombs = self._tombstones()
        suspects = {tomb.partition("-")[0] for tomb in tombs}
        return [s for s in self._committed() if str(s) not in suspects or not self._dead(s, tombs)]

    def meta(self, step: int) -> dict:
        """Return the metadata of a step. Raises ValueError if it is missing or damaged.

        Raises OSError if the store is the reason why it does not read.
        """
        file = self._commit(step)
        try:
            return _committed(file.read_bytes(), file)
        except FileNotFoundError as error:
            raise ValueError(f"there is no checkpoint {step}: no {file}") from error

    def data(self, step: int, meta: dict) -> Remote:
        """Return the folder of the arrays of a step with this metadata."""
        return self.save_folder(meta["data"])

    def is_verified(self, step: int) -> bool:
        """Return True if all processes of some run have read a step and found it intact."""
        try:
            name = self.meta(step)["data"]
        except ValueError:
            return False
        return _all_of(list_names(self.folder / "verified" / name))

    def mark(self, step: int, process: int, processes: int) -> None:
        """Record that a process has read its share of a step and found it intact."""
        marks = self.folder / "verified" / self.meta(step)["data"]
        create(marks / f"{process}-of-{processes}", b"")

    def set_aside(self, step: int, reason: str) -> None:
        """Create a tombstone with the reason and the old commit, then delete the commit."""
        try:
            body = self._commit(step).read_bytes()
        except FileNotFoundError:  # another process found the damage, too, or the step was deleted
            return
        name = self._name(step, body)
        text = json.dumps({"reason": reason, "commit": body.decode("utf-8", "backslashreplace")})
        create(self.folder / "corrupt" / name, text.encode())
        self._commit(step).unlink(missing_ok=True)
        where = f"corrupt/{name}"
        logger.error("checkpoint %d is damaged, set aside as %s: %s", step, where, reason)

    def damaged(self) -> dict[str, str]:
        """Return the reasons of the steps that were set aside, by their names."""
        tombs = {f"corrupt/{name}": self.folder / "corrupt" / name for name in self._tombstones()}
        return {name: json.loads(tomb.read_bytes())["reason"] for name, tomb in tombs.items()}

    def withdraw(self, step: int) -> list[Place]:
        """Delete the commit of a step; return the folders of its data and its marks."""
        try:
            name = self.meta(step)["data"]
        except ValueError as error:  # its data is not known, so that it stays
            self.set_aside(step, str(error))
            return []
        self._commit(step).unlink(missing_ok=True)
        return [self.save_folder(name), self.folder / "verified" / name]

    def remove_leftovers(self) -> None:
        """Delete saves without a commit to which nothing was added for six hours.

        Those of a step with a tombstone stay, because a damaged commit may have named them.
        """
        saves, marks = (list_names(self.folder / kind) for kind in ("data", "verified"))
        commits = {str(step): step for step in self._committed()}
        buried = {tomb.partition("-")[0] for tomb in self._tombstones()}
        for name in sorted({*saves, *marks}):
            step = name.partition("-")[0]
            if step in buried or not SAVE.fullmatch(name):
                continue
            others = [one for one in saves if one.startswith(f"{step}-")]
            if step in commits and others in ([name], []):  # the commit's own
                continue
            if step in commits and self._named(commits[step]) in (name, None):
                continue
            folder = self.save_folder(name)
            newest = max((found.changed for found in list_files(folder)), default=0.0)
            if time.time() - newest > OLD:
                delete_folder(folder)
                delete_folder(self.folder / "verified" / name)

    def save_folder(self, name: str) -> Remote:
        """Return the folder to which a save writes its arrays."""
        return self.folder / "data" / name

    def done(self, name: str, process: int, processes: int) -> None:
        """Record that a process has written all its arrays of a save."""
        create(self.save_folder(name) / "done" / f"{process}-of-{processes}", b"")

    def number_done(self, name: str, processes: int) -> int:
        """Return the number of processes that have written all their arrays of a save."""
        names = list_names(self.save_folder(name) / "done")
        return sum(one.endswith(f"-of-{processes}") for one in names)

    def is_committed(self, step: int, name: str) -> bool:
        """Return True once a save has become the step.

        Raises AnotherRunError if another save has.
        """
        try:
            found = self._name(step, self._commit(step).read_bytes())
        except FileNotFoundError:
            return False
        if found != name and found not in self._tombstones():
            raise AnotherRunError(self._taken(step))
        return found == name

    def commit(self, step: int, meta: dict) -> None:
        """Make a save the step, by its sealed metadata; replace a commit that has a tombstone.

        Raises AnotherRunError if the step has another commit.
        """
        place, body = self._commit(step), json.dumps(meta).encode()
        if create(place, body):
            return
        if self._dead(step, self._tombstones()):
            place.unlink(missing_ok=True)
            if create(place, body):
                return
        raise AnotherRunError(self._taken(step))

    def _taken(self, step: int) -> str:
        return (
            f"{self._commit(step)} was made by another run while this one trained: end that run, "
            f"or give this one a folder of its own (--run)"
        )

    def _commit(self, step: int) -> Remote:
        return self.folder / "commits" / f"{step:09d}.json"

    def _committed(self) -> list[int]:
        stems = (name.removesuffix(".json") for name in list_names(self.folder / "commits"))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _tombstones(self) -> list[str]:
        return list_names(self.folder / "corrupt")

    def _dead(self, step: int, tombs: list[str]) -> bool:
        """Return True if the commit of a step has a tombstone, or is gone."""
        try:
            return self._name(step, self._commit(step).read_bytes()) in tombs
        except FileNotFoundError:
            return True

    def _named(self, step: int) -> str | None:
        """Return the save that a commit names; None if the commit is damaged or gone."""
        try:
            return self.meta(step)["data"]
        except ValueError:
            return None

    def _name(self, step: int, body: bytes) -> str:
        """Return the name of the save that a commit names; that of its bytes if it is damaged."""
        try:
            return _committed(body, self._commit(step))["data"]
        except ValueError:
            return f"{step}-commit-{hashlib.blake2b(body, digest_size=8).hexdigest()}"


def sealed(meta: dict) -> dict:
    """Return `meta` with the digest of its other fields."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"digest": hashlib.blake2b(text, digest_size=16).hexdigest()}


def _committed(body: bytes, file: Remote) -> dict:
    """Return the metadata in a commit. Raises ValueError if it is damaged."""
    meta = _opened(body, file, file)
    if not SAVE.fullmatch(str(meta.get("data"))) or "digest" not in meta:
        raise ValueError(f"{file} is damaged: it names no data; use another checkpoint")
    return meta


def _opened(content: bytes, path: Place, file: Place) -> dict:
    """Return the metadata in a file of a checkpoint. Raises ValueError if it is damaged."""
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(_no_meta(path, file)) from error
    if not isinstance(meta, dict) or ("digest" not in meta and "arrays" in meta):
        raise ValueError(f"{file} is damaged: its digest is missing; use another checkpoint")
    if "digest" in meta and sealed(meta) != meta:
        raise ValueError(f"{file} is damaged: its digest does not match; use another checkpoint")
    return meta


def _no_meta(path: Place, file: Place) -> str:
    return f"{path} is no checkpoint of easyanimate_jax: {file} is missing or is not JSON"


def _all_of(marks: Iterable[str]) -> bool:
    """Return True if the names `k-of-n` are there for all k of some n."""
    done: dict[str, int] = {}
    for mark in marks:
        count = mark.rpartition("-")[2]
        done[count] = done.get(count, 0) + 1
    return any(str(number) == count for count, number in done.items())
