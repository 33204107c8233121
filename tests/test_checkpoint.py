"""A checkpoint is what was saved, or is set aside; and room is made only for what was checked."""

import contextlib
import errno
import json
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import flip_a_bit

from easyanimate_jax.commands.checkpoint import main
from easyanimate_jax.training import checkpoint
from easyanimate_jax.training.checkpoint import (
    Checkpoints,
    NotFiniteError,
    StorageError,
    describe,
    differing,
    named_leaves,
)
from easyanimate_jax.training.metrics import MetricsWriter
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.training.trackers import open_trackers
from easyanimate_jax.weights import orbax_item, run_folder

META = {"step": 0, "stage": "only", "seed": 42}


def make_state(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    model = {
        "kernel": jnp.asarray(rng.standard_normal((24, 16)), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(16), jnp.bfloat16),
    }
    ema = jax.tree.map(lambda x: x / 2, model)
    return TrainState(jnp.int32(seed), jnp.int32(0), model, ema, (jnp.ones(5, jnp.int32),))


LIKE = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
)


def write(folder: Path, steps=(2, 4), **options) -> None:
    checkpoints = Checkpoints(folder, **{"keep": 3} | options)
    for step in steps:
        checkpoints.save(step, make_state(step), META | {"step": step})
    checkpoints.close(steps[-1])


def read(folder: Path, **options):
    checkpoints = Checkpoints(folder, keep=3)
    found = checkpoints.restore(lambda meta: LIKE, **options)
    checkpoints.close()
    return found


def assert_is(found, step: int) -> None:
    assert found[0] == step == found[2]["step"]
    jax.tree.map(np.testing.assert_array_equal, found[1], make_state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    write(folder / "checkpoints")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["lr=1e-4,bs#2", "12:30 a%41?[x]*{y}", "gs:b", "two\nlines"])
def test_a_run_may_have_any_name_that_a_folder_can_have(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path(name) / "checkpoints", steps=(2,))
    assert_is(read(Path(name) / "checkpoints"), 2)
    assert main(["verify", name]) == 0
    assert run_folder.read_meta(name)[0] == 2
    board = open_trackers(["tensorboard"], Path(name), 0, {})
    writer = MetricsWriter(Path(name), 0, board)
    writer.write({"step": 0, "loss": 1.0})
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = {path.name.partition(".")[0] for path in (tmp_path / name).rglob("*")}
    assert {"metrics", "events"} <= found


def test_what_was_saved_comes_back_and_is_known_to_be_right(saved):
    assert_is(read(saved / "checkpoints"), 4)
    assert_is(read(saved / "checkpoints", before=4), 2)
    assert all(run_folder.is_verified(saved / "checkpoints" / str(step)) for step in (2, 4))
    assert (saved / "checkpoints").stat().st_mode & 0o77 == 0


def bits(folder: Path) -> list[Path]:
    """The files of step 4 that hold something."""
    return [
        p
        for p in sorted((folder / "checkpoints" / "4").rglob("*"))
        if p.is_file() and p.stat().st_size
    ]


def hurt(path: Path, how: str, rng) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "flip":
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif how == "cut":
        del data[len(data) // 2 :]
    elif how == "zeros":
        data[:] = bytes(len(data))
    path.write_bytes(data)


@pytest.mark.reliability  # R6
def test_no_damage_to_any_file_is_silent(saved, tmp_path):
    """Of 220 damages each is found, or the files still hold what was saved.

    Every eleventh is restored, too: found there, and step 2 used, or step 4 is what was saved.
    """
    rng = np.random.default_rng(0)
    cases = ["flip"] * 200 + ["cut", "zeros", "delete", "cut", "zeros"] * 4
    names = [p.relative_to(saved) for p in bits(saved)]
    sizes = np.array([(saved / name).stat().st_size for name in names])
    folder, found, whole = tmp_path / "hurt", 0, 0
    shutil.copytree(saved, folder)
    for number, how in enumerate(cases):
        # Half of them where the bytes are, half where the files are.
        chance = sizes / sizes.sum() if number % 2 else np.full(len(names), 1 / len(names))
        path = folder / names[rng.choice(len(names), p=chance)]
        before = path.read_bytes()
        hurt(path, how, rng)
        wrong = checkpoint.damage(folder / "checkpoints" / "4")
        found += bool(wrong)
        if not wrong:
            for item, values in (("state", make_state(4).model), ("ema", make_state(4).ema)):
                for name, value in values.items():
                    stored = f"model.{name}" if item == "state" else name
                    here = orbax_item.tensor(folder / "checkpoints" / "4" / item, stored).read()
                    np.testing.assert_array_equal(here, value)
        if number % 11 == 0:
            copy = tmp_path / str(number)
            shutil.copytree(folder, copy)
            step, *_ = restored = read(copy / "checkpoints")
            assert_is(restored, step)
            assert (copy / "checkpoints" / "4.corrupt" / "reason").is_file() == (step == 2)
            whole += 1
        path.write_bytes(before)
    assert found > 60 and whole == 20


def test_the_last_good_step_is_used_and_the_damaged_set_aside(copy, capsys):
    flip_a_bit(copy / "checkpoints" / "4" / "ema")
    assert main(["verify", str(copy)]) == 1
    assert_is(read(copy / "checkpoints"), 2)
    assert main(["verify", str(copy)]) == 0
    assert main(["list", str(copy)]) == 0
    output = capsys.readouterr().out
    assert "4  ema." in output and "4.corrupt" in output and "2  only  verified" in output


def test_every_array_that_came_back_other_is_named():
    parts = {
        "state": {"step": jnp.int32(3), "model": {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}},
        "ema": {"a": jnp.zeros(3)},
    }
    arrays = {item: describe(named_leaves(part)) for item, part in parts.items()}
    assert differing({"arrays": arrays}, parts) == []
    leaves, structure = jax.tree.flatten(parts)
    names = ["ema.a", "state.model.a", "state.model.b", "state.step"]
    for number, name in enumerate(names):
        other = [x.at[(0,) * x.ndim].add(i == number) for i, x in enumerate(leaves)]
        assert differing({"arrays": arrays}, jax.tree.unflatten(structure, other)) == [name]


ERRORS = {  # of a reader, none of which says anything about the files
    "open files": (OSError(errno.EMFILE, "Too many open files"), "does not read now.*ulimit -n"),
    "a share that is gone": (
        OSError(errno.ESTALE, "Stale file handle"),
        "does not read now.*Stale",
    ),
    "rights": (PermissionError(errno.EACCES, "Permission denied"), "does not read now.*denied"),
    "memory": (MemoryError(), "does not read now"),
    "tensorstore": (ValueError("RESOURCE_EXHAUSTED: Error opening"), "does not read now.*Error op"),
    "a process": (
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset"),
        "^UNKNOWN: Gloo",
    ),
    "a device": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        "^RESOURCE_EXHAUSTED: Out of memory",
    ),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_a_sound_checkpoint_that_does_not_read_now_is_not_set_aside(
    copy, monkeypatch, case, wrapped
):
    error, message = ERRORS[case]

    def fail(*_):
        if wrapped:
            raise RuntimeError("the reader failed") from error
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read", fail)
        message = message if not wrapped else "the reader failed"
        with pytest.raises((StorageError, RuntimeError), match=message):
            read(copy / "checkpoints")
        patch.setattr(orbax_item, "fingerprint_on_disk", fail)
        with pytest.raises(StorageError, match="nothing says that it is damaged"):
            checkpoint.damage(copy / "checkpoints" / "4")
        if isinstance(error, OSError):
            patch.setattr(Path, "read_bytes", fail)
            with pytest.raises((OSError, RuntimeError), match="reader failed" if wrapped else None):
                read(copy / "checkpoints")
    assert_is(read(copy / "checkpoints"), 4)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "4"]


def test_without_free_files_no_checkpoint_is_set_aside(copy):
    """By the real limit of the system; each reads once files are free."""
    before, folder = resource.getrlimit(resource.RLIMIT_NOFILE), copy / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(open(os.devnull)) for _ in range(50)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (busy[-1].fileno() + 1, before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        with pytest.raises((StorageError, OSError), match="Too many open files"):
            checkpoints.restore(lambda meta: LIKE)
    assert run_folder.complete_steps(folder) == [2, 4]
    assert_is(checkpoints.restore(lambda meta: LIKE), 4)
    checkpoints.close()


def test_a_step_that_could_not_be_checked_stays_and_so_do_those_before(copy, monkeypatch, caplog):
    folder = copy / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(orbax_item, "fingerprint_on_disk", fail)
    checkpoints.save(6, make_state(6), META | {"step": 6})
    checkpoints.close(6)
    assert "checkpoint 6 was not checked" in caplog.text
    assert run_folder.complete_steps(folder) == [2, 4, 6] and not run_folder.is_verified(
        folder / "6"
    )


def test_diff_names_the_arrays(saved, capsys):
    assert main(["diff", str(saved), "2", "4"]) == 1
    assert "5 of 7 arrays differ" in capsys.readouterr().out
    assert main(["diff", str(saved), "2", "2"]) == 0
    assert main(["verify", str(saved / "nothing")]) == 2


def test_a_state_that_is_not_finite_is_not_saved(copy):
    checkpoints = Checkpoints(copy / "checkpoints", keep=3)
    state = make_state(6)
    state.ema["bias"] = state.ema["bias"].at[3].set(jnp.nan)
    with pytest.raises(NotFiniteError, match="bias"):
        checkpoints.save(6, state, META)
    checkpoints.close()
    assert run_folder.complete_steps(copy / "checkpoints") == [2, 4]


def test_kept_are_the_last_the_boundaries_and_the_multiples(tmp_path):
    write(tmp_path, range(1, 12), keep=1, keep_if=lambda meta: meta["step"] == 3, keep_every=5)
    assert run_folder.complete_steps(tmp_path) == [3, 5, 10, 11]


def test_opening_deletes_nothing_and_what_another_schedule_made_stays(tmp_path):
    write(tmp_path, range(1, 5), keep=4)
    checkpoints = Checkpoints(tmp_path, keep=2, keep_if=lambda meta: meta["step"] < 5)
    assert run_folder.complete_steps(tmp_path) == [1, 2, 3, 4]
    checkpoints.save(5, make_state(5), META | {"step": 5})
    checkpoints.save(6, make_state(6), META | {"step": 6})
    checkpoints.save(7, make_state(7), META | {"step": 7})
    checkpoints.close(7)
    assert run_folder.complete_steps(tmp_path) == [1, 2, 3, 4, 6, 7]


def test_nothing_is_deleted_for_what_is_not_verified(tmp_path, monkeypatch):
    write(tmp_path, (1, 2))
    monkeypatch.setattr(checkpoint, "damage", lambda *_, **__: ["as if"])
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 4):
        checkpoints.save(step, make_state(step), META | {"step": step})
    checkpoints.finish()
    checkpoints.saver.close()
    assert run_folder.complete_steps(tmp_path) == [1, 2]
    assert len(list(tmp_path.glob("*.corrupt"))) == 2


def test_leftovers_of_a_kill_are_removed(copy):
    folder = copy / "checkpoints"
    for name in ("6.orbax-checkpoint-tmp", "2.deleting"):
        shutil.copytree(folder / "2", folder / name)
    assert_is(read(folder), 4)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_a_full_disk_costs_the_save_and_nothing_else(copy, monkeypatch, caplog):
    free = namedtuple("usage", "total used free")
    checkpoints = Checkpoints(copy / "checkpoints", keep=3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free(10, 10, 100))
        checkpoints.save(6, make_state(6), META | {"step": 6})
        checkpoints.save(8, make_state(8), META | {"step": 8})
    checkpoints.save(10, make_state(10), META | {"step": 10})
    checkpoints.close(10)
    assert run_folder.complete_steps(copy / "checkpoints") == [2, 4, 10]
    assert "checkpoint 6 was not saved" in caplog.text
    assert_is(read(copy / "checkpoints"), 10)


@pytest.mark.parametrize("lost", [True, False])
def test_a_save_without_a_peer_is_no_fault_of_the_disk(copy, monkeypatch, lost):
    error = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    error = error if lost else OSError(errno.EIO, "Input/output error")
    checkpoints = Checkpoints(copy / "checkpoints", keep=3)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints.saver.checkpointer, "save", fail)
    checkpoints.processes = 2
    with pytest.raises(jax.errors.JaxRuntimeError if lost else StorageError, match=r"Gloo|output"):
        checkpoints.save(6, make_state(6), META)
    checkpoints.processes = 1
    checkpoints.close()
    assert run_folder.complete_steps(copy / "checkpoints") == [2, 4]


def test_three_failed_saves_end_the_run(copy, monkeypatch):
    free = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free(10, 10, 100))
    checkpoints = Checkpoints(copy / "checkpoints", keep=3)
    for step in (6, 8, 10):
        checkpoints.save(step, make_state(step), META)
    with pytest.raises(StorageError, match="3 saves in a row"):
        checkpoints.save(12, make_state(12), META)
    with pytest.raises(StorageError, match="checkpoint 12 could not"):
        checkpoints.close(12)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(copy):
    for step in ("2", "4"):
        (copy / "checkpoints" / step / "meta" / "metadata").write_text("{")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"only 2\.corrupt, 4\.corrupt; bring one back"):
            read(copy / "checkpoints")


def test_another_model_is_refused_and_nothing_set_aside(copy):
    other = LIKE._replace(model={"kernel": LIKE.model["kernel"]})
    checkpoints = Checkpoints(copy / "checkpoints", keep=3)
    with pytest.raises(ValueError, match=r"does not fit the config's model: model\.bias"):
        checkpoints.restore(lambda meta: other)
    checkpoints.close()
    assert run_folder.complete_steps(copy / "checkpoints") == [2, 4]


def test_a_checkpoint_from_before_fingerprints_is_used_and_said_to_be(copy, caplog):
    for step in ("2", "4"):
        file = copy / "checkpoints" / step / "meta" / "metadata"
        meta = json.loads(file.read_text())
        del meta["digest"], meta["arrays"]
        file.write_text(json.dumps(meta))
    assert_is(read(copy / "checkpoints"), 4)
    assert "checkpoint 4 is from before fingerprints: used unverified" in caplog.text
    assert main(["verify", str(copy)]) == 1
