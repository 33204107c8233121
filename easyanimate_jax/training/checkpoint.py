"""Verified checkpoints: three orbax items for each step, and a fingerprint of every array.

    RUN/checkpoints/500/state       weights, moments, counters
    RUN/checkpoints/500/ema         the averaged weights: sampling reads only these
    RUN/checkpoints/500/meta        JSON: position, plan, config, versions, fingerprints, digest
    RUN/checkpoints/500/verified-0-of-1    the files were read and hold the bits that were saved
    RUN/checkpoints/500.corrupt     a damaged step; the file `reason` inside says why

Arrays are written in the background, and no reader checks what it reads. So the fingerprint of each
array is computed on the device at the save. It is compared with the files after the write, and with
the arrays after a restore. A step gets its name only when it is complete, and is removed by one
rename. In an object store, where nothing can be renamed, it is a commit (weights/steps.py).
See also `python -m easyanimate_jax checkpoint verify|list|diff DIR`.
"""

import logging
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from easyanimate_jax.storage.errors import AnotherRunError, is_of_jax, is_of_the_system
from easyanimate_jax.storage.stores import Place, make_folder, place
from easyanimate_jax.training.retention import Retention
from easyanimate_jax.training.safety.faults import NO_FAULTS, Faults
from easyanimate_jax.training.saving import same_for_all, saver_for
from easyanimate_jax.weights.fingerprint import fingerprint
from easyanimate_jax.weights.run_folder import reader
from easyanimate_jax.weights.steps import Steps, steps_in

logger = logging.getLogger(__name__)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
MAX_FAILURES = 3  # saves in a row

State = tuple  # a NamedTuple of pytrees; its field `ema` is saved as a separate item


class NotFiniteError(Exception):
    """The state holds NaN or infinity; such a state is never saved."""


class DamagedError(Exception):
    """A checkpoint whose files do not hold what was saved; `unreadable` if a reader failed."""

    def __init__(self, reason: str, *, unreadable: bool = False):
        super().__init__(reason)
        self.unreadable = unreadable


class StorageError(Exception):
    """Checkpoints cannot be written, or none of them can be read."""


class Checkpoints:
    """The checkpoints of one run. Saves, and the checks of saved files, run in the background.

    The last `keep` verified steps are kept (at least two), and all steps that are multiples of
    `keep_every` or whose metadata satisfies `keep_if`. A step is deleted only after a later one was
    saved and verified, never when the folder is opened. A failed save is logged and counted; after
    three in a row the next save raises StorageError. In an object store, every process calls
    `before_done` in a thread before it says that its part of a save is written. Only tests pass
    `faults`.
    """

    def __init__(
        self,
        folder: str | Place,
        *,
        keep: int,
        keep_every: int | None = None,
        keep_if: Callable[[dict], bool] = lambda meta: False,
        before_done: Callable[[], None] = lambda: None,
        faults: Faults = NO_FAULTS,
    ):
        self.folder = place(folder).absolute()
        self.steps = steps_in(self.folder)
        self.retention = Retention(self.steps, max(2, keep), keep_every, keep_if, faults)
        self.faults = faults
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.writing: int | None = None  # the step whose save is not yet settled
        self.failures = 0
        self.checking = threading.Thread()
        if self.process == 0:
            make_folder(self.folder, mode=0o700)
            self.steps.remove_leftovers()
        _wait_for_all("checkpoints")
        self.saver = saver_for(self.steps, faults, before_done)
        self.there = set(self.steps.complete())  # as this run knows

    def save(self, step: int, state: State, meta: dict) -> None:
        """Start writing `state` as checkpoint `step`; do nothing if that step exists.

        Raises NotFiniteError, and saves nothing, if an array is not finite; the message names the
        arrays. Raises StorageError after three failed saves in a row, and AnotherRunError if
        another run has saved in this folder meanwhile.
        """
        self.settle()
        if self.failures >= MAX_FAILURES:
            raise StorageError(f"{self.failures} saves in a row failed; see the lines above")
        if step in self.there:
            return
        items = {item: named_leaves(part) for item, part in items_of(state).items()}
        meta = meta | {"versions": {name: version(name) for name in PACKAGES}}
        meta["arrays"] = {item: describe(named) for item, named in items.items()}
        size = sum(leaf.nbytes for named in items.values() for leaf in named.values())
        if reason := self.saver.refusal(size):
            self._failed(step, reason)
            return
        self.faults.limit_files(step)
        self.writing = step
        try:
            self.saver.start(step, items, meta)
        except Exception as error:  # orbax, tensorstore and the file system raise different types
            self.writing = None
            self._failed(step, error)
        self.faults.kill("writing", step)

    def settle(self) -> None:
        """Wait for the write in progress, log a failure, and start to check the written files."""
        step, self.writing = self.writing, None
        if step is None:
            return
        try:
            self.saver.wait()
        except AnotherRunError:
            raise
        except Exception as error:  # as in save
            self._failed(step, error)
            return
        self.there.add(step)
        self.faults.kill("written", step)
        if self.checking.ident:
            self.checking.join()
        self.checking = threading.Thread(target=self._check, args=(step,))
        self.checking.start()

    def poll(self) -> None:
        """Settle the write in progress if it has finished; call this between steps."""
        if self.writing is not None and self.saver.finished():
            self.settle()

    def restore(
        self, like: Callable[[dict], State], *, before: int | None = None
    ) -> tuple[int, State, dict] | None:
        """Return (step, state, meta) of the newest step whose restored arrays have the saved bits.

        `like` takes the meta of a step and returns the abstract state: shapes and shardings, on any
        mesh. It may raise ValueError for a checkpoint of another run. A damaged step is set aside
        as STEP.corrupt. With `before`, only earlier steps count. Returns None if there is no step.
        Raises StorageError if all steps are damaged: a run never starts over by itself. An error
        that says nothing about the files, as of a lost process, leaves them as they are.
        """
        self.finish()
        while (step := self._newest(before)) is not None:
            self.faults.kill("restoring", step)
            try:
                state, meta = _load(self.steps, step, like)
            except DamagedError as error:
                if error.unreadable and (self.processes > 1 or self.steps.distant):
                    bad = damage(self.folder / str(step))  # else the reader has another reason
                    if bad:
                        self.steps.set_aside(step, str(error))
                    if self.processes > 1 or not bad:
                        raise StorageError(f"checkpoint {step} {error}") from error
                self._set_aside(step, str(error))
                continue
            if "arrays" not in meta:
                logger.warning("checkpoint %d is from before fingerprints: used unverified", step)
            elif self.process == 0:
                self.steps.mark(step, 0, 1)
            return step, state, meta
        damaged = self.steps.damaged()
        if damaged and before is None:
            raise StorageError(
                f"no good checkpoint is left in {self.folder}, only {', '.join(damaged)}; bring "
                f"one back from a backup, or remove the folder to start over"
            )
        return None

    def drop_after(self, step: int) -> None:
        """Delete all steps after `step`: the run went back and makes these updates again."""
        if self.process == 0:
            self.retention.drop_after(step)
        self.there = {one for one in self.there if one <= step}
        _wait_for_all(f"dropped after {step}")

    def finish(self) -> None:
        """Wait until everything is written and checked."""
        self.settle()
        if self.checking.ident:
            self.checking.join()

    def close(self, last: int | None = None) -> None:
        """Finish all work. Raises StorageError if the step `last` does not exist then."""
        self.finish()
        self._clean()
        self.saver.close()
        if last is not None and last not in self.steps.complete():
            raise StorageError(f"checkpoint {last} could not be saved in {self.folder}")

    def _check(self, step: int) -> None:
        """Compare this process's share of the arrays with the files; then delete old steps."""
        try:
            wrong = damage(self.folder / str(step), share=(self.process, self.processes))
            if wrong:
                self.failures += 1
                self.there.discard(step)
                self.steps.set_aside(step, "; ".join(wrong))
                return
            self.failures = 0
            self.steps.mark(step, self.process, self.processes)
            self.faults.kill("checked", step)
            if self.process == 0:
                self.retention.prune()
        except (StorageError, OSError) as error:  # it stays, and so do the steps before it
            logger.error("checkpoint %d was not checked: %s", step, error)

    def _failed(self, step: int, error: Exception | str) -> None:
        self.failures += 1
        reason = " ".join(str(error).split())[:300]
        logger.error("checkpoint %d was not saved: %s", step, reason)
        self._clean()
        if self.processes > 1:  # the others wait for us; the next start tries again
            if isinstance(error, Exception) and is_of_jax(error):  # one of them is gone
                raise error
            raise StorageError(f"checkpoint {step} was not saved: {reason}")

    def _clean(self) -> None:
        """Remove files of failed saves. Their threads may still write, so this is called again."""
        if self.process == 0:
            self.steps.remove_leftovers()

    def _newest(self, before: int | None) -> int | None:
        fitting = [step for step in self.steps.complete() if before is None or step < before]
        newest = same_for_all(fitting[-1] if fitting else -1)
        return None if newest < 0 else int(newest)

    def _set_aside(self, step: int, reason: str) -> None:
        self.there.discard(step)
        if self.process == 0:
            self.steps.set_aside(step, reason)
        _wait_for_all(f"set aside {step}")


def describe(named: dict[str, jax.Array]) -> dict[str, list]:
    """Return {name: [fingerprint, dtype, shape]} of arrays.

    Raises NotFiniteError if a value is not finite; the message names the arrays.
    """
    prints = [_inspect(x) for x in named.values()]
    bad = [name for name, (_, finite) in zip(named, prints, strict=True) if not finite]
    if bad:
        raise NotFiniteError(f"not finite: {', '.join(bad)}")
    return {
        name: [f"{value:08x}", str(leaf.dtype), list(leaf.shape)]
        for (name, leaf), (value, _) in zip(named.items(), prints, strict=True)
    }


def differing(meta: dict, parts: dict) -> list[str]:
    """Return the names of restored arrays whose fingerprints differ from those in `meta`."""
    if "arrays" not in meta:
        return []
    named = {item: named_leaves(part) for item, part in parts.items()}
    return [
        f"{item}.{name}"
        for item, arrays in named.items()
        for name, array in arrays.items()
        if f"{_inspect(array)[0]:08x}" != meta["arrays"][item][name][0]
    ]


def damage(path: Place, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Return what is wrong with the files of the step FOLDER/STEP, one line each; [] if nothing is.

    `share` (k, n) reads every n-th array from the k-th on. No device is used. Raises StorageError
    if the system, and not the files, is the reason why they do not read.
    """
    steps, step = steps_in(path.parent), int(path.name)
    try:
        meta = steps.meta(step)
        items = reader(meta)
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        raise StorageError(_not_now(path, error)) from error
    if "arrays" not in meta:
        return ["it is from before fingerprints: nothing to compare its arrays with"]
    folder, wrong = steps.data(step, meta), []
    for item, expected in meta["arrays"].items():
        try:
            missing = sorted(set(expected) ^ set(items.names(folder / item)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            missing, expected = [f"the list of arrays ({error})"], {}
        wrong += [f"{item}.{name} is missing or unknown" for name in missing]
        for name in list(expected)[share[0] :: share[1]]:
            try:
                same = f"{items.fingerprint_on_disk(folder / item, name):08x}" == expected[name][0]
            except Exception as error:  # a reader may raise any type for damaged bytes
                if is_of_the_system(error):
                    raise StorageError(_not_now(path, error)) from error
                wrong.append(f"{item}.{name} cannot be read: {str(error)[:200]}")
                continue
            if not same:
                wrong.append(f"{item}.{name} has other bits than were saved")
    return wrong


def items_of(state: State) -> dict:
    """Return {item: part of the state}; a state without averaged weights has no item "ema"."""
    items = {"state": state._replace(ema=None)}
    return items if state.ema is None else items | {"ema": state.ema}


def named_leaves(tree) -> dict:
    """Return a flat dict of a tree's leaves, with keys like `model.blocks.norm1.linear.kernel`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(_key(k) for k in path): leaf for path, leaf in paths}


def _key(key) -> str:
    return str(next(getattr(key, a) for a in ("name", "key", "idx") if hasattr(key, a)))


def _inspect(x: jax.Array) -> tuple[int, bool]:
    """Return (fingerprint, whether all values are finite) of an array.

    It waits for the result: on CPUs, two sums over a mesh that run at the same time can deadlock.
    """
    value, finite = np.asarray(_fingerprint_and_finite(x))
    return int(value), bool(finite)


@jax.jit
def _fingerprint_and_finite(x: jax.Array) -> jax.Array:
    """Return both values of `_inspect` from one program, because compiling is the slow part."""
    return jnp.stack([fingerprint(x), jnp.isfinite(x).all().astype(jnp.uint32)])


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _check_fit(step: int, meta: dict, wanted: dict) -> None:
    """Raise ValueError if the saved arrays differ from the config's model in name or shape."""
    for item, tree in wanted.items():
        saved = meta.get("arrays", {}).get(item)
        here = {name: list(leaf.shape) for name, leaf in named_leaves(tree).items()}
        if saved is not None and {name: shape for name, (_, _, shape) in saved.items()} != here:
            other = [n for n in here if n not in saved or saved[n][2] != here[n]]
            other += [n for n in saved if n not in here]
            raise ValueError(
                f"checkpoint {step} does not fit the config's model: {', '.join(other[:8])} differ "
                f"in shape or exist in only one of them; restore the config, or start a new run"
            )


def _load(steps: Steps, step: int, like: Callable[[dict], State]) -> tuple[State, dict]:
    """Return (state, metadata) of a step. Raises DamagedError where its bits differ.

    Raises StorageError if the system, and not the files, is the reason why they do not read.
    """
    try:
        meta = steps.meta(step)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    abstract = like(meta)
    wanted = items_of(abstract)
    _check_fit(step, meta, wanted)
    path = steps.data(step, meta)
    load = _from_orbax if isinstance(path, Path) else reader(meta).load
    try:
        parts = {item: _read(load, path / item, part) for item, part in wanted.items()}
    except Exception as error:  # a reader may raise any type for damaged bytes
        if is_of_jax(error):  # another process is gone, or the memory of a device is too small
            raise
        if is_of_the_system(error):
            raise StorageError(_not_now(path, error)) from error
        raise DamagedError(f"cannot be read: {error}", unreadable=True) from error
    wrong = differing(meta, parts)
    if wrong:
        raise DamagedError(f"other bits than were saved, in {', '.join(wrong)}")
    return parts["state"]._replace(ema=parts.get("ema")), meta


def _not_now(path: Place, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"{path} does not read now, and nothing says that it is damaged: {reason}; repair that "
        f"(memory, `ulimit -n`, the mount), then run the same command again"
    )


def _from_orbax(item: Path, named: dict) -> dict[str, jax.Array]:
    """Return the arrays of an orbax item, with the shapes and shardings of `named`."""
    args = ocp.checkpoint_utils.construct_restore_args(named)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(item, item=named, restore_args=args)


def _read(load: Callable, item: Place, like):
    named = named_leaves(like)
    read = load(item, named)
    wrong = [
        f"{name}: {getattr(read.get(name), 'shape', 'missing')} for {leaf.shape}"
        for name, leaf in named.items()
        if getattr(read.get(name), "shape", None) != leaf.shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(wrong)}")
    return jax.tree.unflatten(jax.tree.structure(like), [read[name] for name in named])
